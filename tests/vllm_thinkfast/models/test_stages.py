"""Which pipeline stages a model may have."""

from types import SimpleNamespace

import pytest

from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig
from vllm_thinkfast.models import stages
from vllm_thinkfast.models.base import RecurrentModel
from vllm_thinkfast.models.stages import check_stages


def hybrid(num_layers: int, attention_layers: list[int]) -> list[str]:
    config = MambaInLlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        mamba_num_heads=4,
        mamba_n_groups=4,
        ssm_state_size=16,
        num_hidden_layers=num_layers,
        attention_layers=attention_layers,
    )
    return config.layers_block_type


@pytest.mark.parametrize(
    ("num_layers", "attention_layers", "num_stages"),
    [
        (4, [0, 2], 1),
        (4, [0, 2], 2),
        (5, [0, 3], 2),
        (28, [3, 8, 13, 18, 23, 27], 2),
        (4, [], 2),  # no attention at all: nothing to have in every stage
    ],
)
def test_accepted(num_layers: int, attention_layers: list[int], num_stages: int) -> None:
    check_stages(hybrid(num_layers, attention_layers), num_stages)


@pytest.mark.parametrize(
    ("num_layers", "attention_layers", "num_stages", "message"),
    [
        # vLLM gives the first stage layer 0, the second 1 and 2, or the other way round.
        (3, [0, 2], 2, "no mamba layer"),
        (4, [0, 1], 2, "stage 0 would have the layers 0 to 1 and no mamba layer"),
        (4, [3], 2, "stage 0 would have the layers 0 to 1 and no attention layer"),
        (28, [3, 8, 13, 18, 23, 27], 14, "no attention layer"),
        (3, [0, 2], 5, "would have no layer of the 3; use fewer stages"),
    ],
)
def test_refused(
    num_layers: int, attention_layers: list[int], num_stages: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_stages(hybrid(num_layers, attention_layers), num_stages)


def test_other_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    # As VLLM_PP_LAYER_PARTITION=3,1 says it, which vLLM reads once per process.
    monkeypatch.setattr(
        stages, "get_pp_indices", lambda layers, stage, stages: ((0, 3), (3, 4))[stage]
    )
    with pytest.raises(ValueError, match="stage 1 would have the layers 3 to 3"):
        check_stages(hybrid(4, [0, 3]), 2)


def test_a_llamba_is_asked_too() -> None:
    config = LlambaConfig(hidden_size=64, num_heads=4, n_groups=4, num_hidden_layers=2)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        parallel_config=SimpleNamespace(pipeline_parallel_size=3),
    )
    with pytest.raises(
        ValueError, match=r"stage \d would have no layer of the 2; use fewer stages"
    ):
        RecurrentModel(vllm_config, "model", lambda prefix: pytest.fail(prefix), 1e-5)
