import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from thinkfast_distill.architecture import student_config
from thinkfast_distill.config import (
    DataConfig,
    LossConfig,
    RunConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)
from thinkfast_distill.costs import (
    llama_shapes,
    memory_estimate,
    model_cost,
    peak_flops_per_s,
    stage_cost,
)
from thinkfast_distill.losses import cross_entropy_loss, distillation_loss
from thinkfast_distill.recipe import parse

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_3B = {
    **LLAMA_1B,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
}


def run(student, sizes, **stage_fields):
    stage = StageConfig(
        **{
            "kind": "end_to_end",
            "data": "d",
            "tokens": 8_000_000_000,
            "batch_tokens": 8192,
            "lr": 1e-5,
            **stage_fields,
        }
    )
    return RunConfig(
        name="n",
        student=parse(StudentConfig, student, "r"),
        data={"d": DataConfig(sources=[])},
        stages=[stage],
        teacher=TeacherConfig(model="m", sizes=sizes, dtype="bfloat16"),
    )


def cost_of(student, sizes):
    return model_cost(student_config(run(student, sizes), LlamaConfig(**sizes)))


# Counts published or derived for these models, in billions (tied heads counted once).
@pytest.mark.parametrize(
    ("student", "sizes", "billions"),
    [
        ({"kind": "llamba"}, LLAMA_1B, 1.405),
        ({"kind": "llamba", "layout": {"ssm_state_size": 64}}, LLAMA_3B, 3.568),
        ({"kind": "llamba", "layout": {"ssm_state_size": 64, "num_heads": 32}}, LLAMA_3B, 3.657),
        ({"kind": "llamba", "layout": {"ssm_state_size": None}}, LLAMA_3B, 3.833),
    ],
)
def test_model_cost_of_llamba(student, sizes, billions):
    assert cost_of(student, sizes).total / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(("sizes", "billions"), [(LLAMA_1B, 1.2358), (LLAMA_3B, 3.2128)])
def test_model_cost_of_the_teacher(sizes, billions):
    assert model_cost(LlamaConfig(**sizes)).total / 1e9 == pytest.approx(billions, abs=1e-4)


def test_llama_shapes_are_the_model_s():
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    llama = LlamaConfig(head_dim=6, attention_bias=True, mlp_bias=True, **sizes)
    qwen = Qwen2Config(**sizes)
    for config, model_class in ((llama, LlamaForCausalLM), (qwen, Qwen2ForCausalLM)):
        with torch.device("meta"):
            model = model_class(config)
        expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        assert llama_shapes(config) == expected


def test_stage_cost_is_the_usual_count():
    config = run({"kind": "llamba"}, LLAMA_1B)
    teacher = model_cost(LlamaConfig(**LLAMA_1B))
    student = cost_of({"kind": "llamba"}, LLAMA_1B)
    found = stage_cost(config, config.stages[0], student, teacher)
    # Tied: the embedding is looked up once and multiplied once, so N is all parameters.
    assert found.student == 6 * student.total
    assert found.teacher == 2 * teacher.total
    assert (found.student + found.teacher) / 1e9 == pytest.approx(10.9, abs=0.05)
    config.compute.activation_checkpointing = True
    more = stage_cost(config, config.stages[0], student, teacher)
    assert more.recompute == 2 * student.body
    assert more.per_token > found.per_token


def test_stage_cost_of_an_untied_model_leaves_the_table_out():
    sizes = {**LLAMA_1B, "tie_word_embeddings": False}
    student = cost_of({"kind": "llamba"}, sizes)
    assert student.active == student.total - 128256 * 2048


def test_stage_cost_by_kind():
    config = run({"kind": "llamba"}, LLAMA_1B)
    teacher = model_cost(LlamaConfig(**LLAMA_1B))
    student = cost_of({"kind": "llamba"}, LLAMA_1B)
    flops = {}
    for kind in ("matrix_mixing", "hidden_state", "end_to_end", "sft"):
        stage = run({"kind": "llamba"}, LLAMA_1B, kind=kind).stages[0]
        flops[kind] = stage_cost(config, stage, student, teacher)
    assert flops["sft"].teacher == 0
    assert flops["hidden_state"].teacher == 2 * teacher.body
    assert flops["matrix_mixing"].student == 6 * student.parameters["ssm"]
    assert flops["hidden_state"].per_token < flops["end_to_end"].per_token
    # The frozen rest of a layer passes the gradient on and has none itself.
    frozen = student.parameters["mlp"] + student.parameters["norm"]
    assert flops["hidden_state"].student == 6 * student.parameters["ssm"] + 4 * frozen
    config.compute.activation_checkpointing = True
    for kind in ("matrix_mixing", "hidden_state"):  # the loop does not recompute there
        stage = run({"kind": "llamba"}, LLAMA_1B, kind=kind).stages[0]
        assert stage_cost(config, stage, student, teacher).recompute == 0


def test_stage_cost_of_hidden_state_leaves_kept_layers_out():
    hybrid = {"kind": "mambainllama", "layout": {"attention_layers": [3, 7, 11, 15]}}
    config = run(hybrid, LLAMA_1B, kind="hidden_state")
    teacher, student = model_cost(LlamaConfig(**LLAMA_1B)), cost_of(hybrid, LLAMA_1B)
    assert student.mixer_share == 12 / 16
    stage = config.stages[0]
    frozen = 0.75 * (student.parameters["mlp"] + student.parameters["norm"])
    found = stage_cost(config, stage, student, teacher)
    assert found.student == 6 * student.parameters["ssm"] + 4 * frozen
    assert found.attention == 2 * stage.seq_len * teacher.attention_width
    stage.train = "all"
    assert stage_cost(config, stage, student, teacher).student == 6 * student.body


def test_memory_estimate_shards_what_is_sharded():
    config = run({"kind": "llamba"}, LLAMA_1B, batch_tokens=8 * 8192, micro_batch_rows=1)
    student_sizes = student_config(config, LlamaConfig(**LLAMA_1B))
    student, teacher = model_cost(student_sizes), model_cost(LlamaConfig(**LLAMA_1B))

    def estimate(ranks):
        return memory_estimate(
            config, config.stages[0], student_sizes, student, teacher, student.total, ranks
        )

    one, eight = estimate(1), estimate(8)
    assert one.student == 16 * student.total
    assert eight.student == one.student / 8
    assert eight.teacher == one.teacher == 2 * teacher.total
    assert eight.activations == one.activations  # one row each
    config.teacher.placement = "shard"
    assert estimate(8).teacher == one.teacher / 8


def test_memory_estimate_counts_the_evaluation():
    """Stage 1's matrices of a held-out batch: 6 of 32 heads x 8192 x 8192 float32 for each row."""
    config = run(
        {"kind": "llamba"},
        LLAMA_1B,
        kind="matrix_mixing",
        seq_len=2048,
        batch_tokens=8 * 2048,
        micro_batch_rows=1,
    )
    sizes = student_config(config, LlamaConfig(**LLAMA_1B))
    student, teacher = model_cost(sizes), model_cost(LlamaConfig(**LLAMA_1B))

    def estimate():
        stage = config.stages[0]
        return memory_estimate(config, stage, sizes, student, teacher, student.total, 8)

    without = estimate()
    assert without.evaluation == 0
    config.data["held-out"] = config.data["d"]
    config.evaluation.data, config.evaluation.seq_len = "held-out", 8192
    config.evaluation.batch_rows = 16
    one_row = estimate()
    matrices = 6 * 32 * 8192**2 * 4
    assert matrices < one_row.evaluation < 1.1 * matrices
    assert one_row.total - without.total == one_row.evaluation - without.activations
    config.stages[0].micro_batch_rows = None
    assert estimate().evaluation == 2 * one_row.evaluation  # both rows of a rank at once


class PeakBytes(TorchDispatchMode):
    """The most bytes at once of tensors made inside."""

    def __init__(self):
        super().__init__()
        self.peak, self._made = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if _is(t)}
        out = func(*args, **(kwargs or {}))
        self._made = {key: kept for key, kept in self._made.items() if not kept[0].expired()}
        for tensor in filter(_is, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._made:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return out


def _is(value):
    return isinstance(value, torch.Tensor)


SMALL = {**LLAMA_1B, "vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 1,
         "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "loss", "tensors"),
    [
        ("end_to_end", {"kind": "reverse_kl"}, 8),
        ("end_to_end", {"kind": "forward_kl", "ce_weight": 0.5}, 8),
        ("end_to_end", {"kind": "jsd"}, 10),
        ("end_to_end", {"kind": "jsd", "ce_weight": 0.5, "temperature": 2.0}, 11),
        ("end_to_end", {"kind": "reverse_kl", "temperature": 2.0}, 10),
        ("sft", {}, 2),
    ],
)
def test_memory_estimate_of_the_loss_is_what_it_takes(kind, loss, tensors):
    """Four chunks of 64 tokens with a bfloat16 teacher: (chunk, V) tensors and heads alike."""
    config = run({"kind": "llamba"}, SMALL, kind=kind, seq_len=256, batch_tokens=256)
    stage = config.stages[0]
    stage.loss = LossConfig(chunk_tokens=64, **loss)
    sizes = student_config(config, LlamaConfig(**SMALL))
    cost = model_cost(LlamaConfig(**SMALL))
    estimate = memory_estimate(config, stage, sizes, cost, cost, cost.total, 1).logits
    one = 4 * 4096 * 64  # a chunk's logits, and a head
    assert estimate == one * (tensors + (1 if kind == "sft" else 2))

    hidden, head = torch.randn(1, 257, 64, requires_grad=True), torch.randn(4096, 64)
    head.requires_grad_()
    ids, mask = torch.randint(4096, (1, 257)), torch.ones(1, 256, dtype=torch.bool)
    options = {"num_targets": 256, "chunk_tokens": 64}
    taught = (torch.randn(1, 257, 64).bfloat16(), torch.randn(4096, 64).bfloat16())
    with PeakBytes() as found:
        if kind == "sft":
            made = cross_entropy_loss(hidden, head, ids, mask, **options)
        else:
            made = distillation_loss(hidden, head, *taught, ids, mask, **options, **loss)
        made.loss.backward()
    assert found.peak == pytest.approx(estimate, rel=0.1)  # hidden states are not counted


def test_peak_flops_of_a_gpu_goes_by_the_whole_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40")
    assert peak_flops_per_s(torch.device("cuda"), "bfloat16") == (181e12, "data sheet of L40")


def test_peak_flops_is_measured_on_a_cpu():
    peak, source = peak_flops_per_s(torch.device("cpu"), "float32")
    assert source == "measured"
    assert 1e9 < peak < 1e14
