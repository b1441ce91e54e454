"""Which pipeline stages a hybrid may have."""

import pytest

from vllm_thinkfast.configs import MambaInLlamaConfig
from vllm_thinkfast.models import mamba_in_llama
from vllm_thinkfast.models.mamba_in_llama import check_stages


def hybrid(num_layers: int, attention_layers: list[int]) -> MambaInLlamaConfig:
    return MambaInLlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        mamba_num_heads=4,
        mamba_n_groups=4,
        ssm_state_size=16,
        num_hidden_layers=num_layers,
        attention_layers=attention_layers,
    )


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
        mamba_in_llama, "get_pp_indices", lambda layers, stage, stages: ((0, 3), (3, 4))[stage]
    )
    with pytest.raises(ValueError, match="stage 1 would have the layers 3 to 3"):
        check_stages(hybrid(4, [0, 3]), 2)
