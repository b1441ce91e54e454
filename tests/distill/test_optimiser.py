import math

import pytest
import torch
from torch import nn

from thinkfast_distill import optimiser
from thinkfast_distill.config import StageConfig
from thinkfast_distill.distributed import World
from thinkfast_distill.students import build as build_student
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

STAGE = StageConfig(
    kind="sft", data="d", tokens=8, batch_tokens=8, seq_len=8, lr=0.1, weight_decay=0.5
)
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}


def llamba():
    return build_student(LlambaConfig(**SIZES, num_heads=2, n_groups=2, ssm_state_size=4))


def hybrid(version):
    return build_student(
        MambaInLlamaConfig(
            **SIZES,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_layers=[1],
            mamba_version=version,
            mamba_num_heads=2,
            mamba_n_groups=1,
            ssm_state_size=4,
        )
    )


@pytest.mark.parametrize("make", [llamba, lambda: hybrid("mamba1"), lambda: hybrid("mamba2")])
def test_weight_decay_is_on_projections_and_embedding_alone(make):
    decayed = {
        name for name, p in make().named_parameters() if optimiser.has_weight_decay(name, p.ndim)
    }
    tails = {".".join(name.split(".")[-2:]) for name in decayed}
    assert tails <= {
        *(
            f"{part}_proj.weight"
            for part in ("in", "out", "gate", "up", "down", "q", "k", "v", "o")
        ),
        "embed_tokens.weight",
        "lm_head.weight",
    }
    assert {"in_proj.weight", "out_proj.weight", "gate_proj.weight"} <= tails


def test_build_puts_every_parameter_into_one_group():
    parameters = optimiser.named_trainable(hybrid("mamba1"))
    kept = next(name for name in parameters if name.endswith("in_proj.weight"))
    optimizer = optimiser.build(STAGE, parameters, [kept])
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in parameters.values())
    (without,) = [g for g in optimizer.param_groups if g["weight_decay"] == 0]
    assert any(p is parameters[kept] for p in without["params"])
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.5, 0.0}


def test_group_of_names_the_parts():
    parts = {
        optimiser.group_of(name) for name, _ in hybrid("mamba2").named_parameters()
    }  # untied: embedding and head
    assert parts == {"ssm", "attention", "mlp", "norm", "embedding"}
    assert optimiser.group_of("model.layers.0.mamba.norm.weight") == "ssm"


def test_squared_norms_and_clip_match_torch():
    torch.manual_seed(0)
    student = llamba()
    for parameter in student.parameters():
        parameter.grad = torch.randn_like(parameter)
    parameters = optimiser.named_trainable(student)
    squares = optimiser.squared_norms(parameters, World())
    total = math.sqrt(sum(squares.values()))
    expected = nn.utils.get_total_norm([p.grad for p in student.parameters()])
    assert total == pytest.approx(float(expected), rel=1e-6)
    optimiser.clip(parameters.values(), total, 2 * total)  # small enough: nothing changes
    assert optimiser.squared_norms(parameters, World()) == squares
    optimiser.clip(parameters.values(), total, 0.5)
    after = optimiser.squared_norms(parameters, World())
    assert math.sqrt(sum(after.values())) == pytest.approx(0.5, rel=1e-6)


def test_squared_norms_show_what_is_not_finite():
    student = llamba()
    parameters = optimiser.named_trainable(student)
    parameters["model.norm.weight"].grad = torch.full((8,), float("nan"))
    squares = optimiser.squared_norms(parameters, World())
    assert math.isnan(squares["norm"])
    assert squares["mlp"] == 0.0
