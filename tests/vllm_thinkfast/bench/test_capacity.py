"""Arithmetic of blocks; that vLLM hands them out so is in test_engine.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_thinkfast.bench.capacity import (
    BlocksPerSequence,
    blocks_per_sequence,
    largest_batch,
    max_decoding,
)

LLAMBA = BlocksPerSequence(held=1, moving=1, crosses=False)
LLAMA = BlocksPerSequence(held=2, moving=0, crosses=False)
HYBRID = BlocksPerSequence(held=19, moving=3, crosses=False)
CROSSING = BlocksPerSequence(held=19, moving=3, crosses=True)


@pytest.mark.parametrize(
    ("sequence", "num_blocks", "expected"),
    [(LLAMBA, 66, 64), (LLAMA, 66, 32), (HYBRID, 4300, 226), (LLAMBA, 1, 0), (LLAMBA, 2, 0)],
)
def test_max_decoding(sequence: BlocksPerSequence, num_blocks: int, expected: int) -> None:
    assert max_decoding(sequence, num_blocks) == expected


@pytest.mark.parametrize(
    ("sequence", "num_blocks", "num_prompt_tokens", "budget", "expected"),
    [
        # Short prompts end together, and each needs a second state in that step.
        (LLAMBA, 66, 12, 2048, 32),
        (HYBRID, 4300, 12, 8192, 195),
        # Of long ones few do.
        (LLAMBA, 1885, 1984, 4096, 1883),
        (HYBRID, 4300, 1984, 4096, 225),
        (CROSSING, 4300, 1984, 4096, 225),
        # No states, no second ones.
        (LLAMA, 66, 12, 2048, 32),
        (LLAMBA, 66, 1, 2048, 32),
        (LLAMBA, 1, 12, 2048, 0),
    ],
)
def test_largest_batch(
    sequence: BlocksPerSequence,
    num_blocks: int,
    num_prompt_tokens: int,
    budget: int,
    expected: int,
) -> None:
    assert largest_batch(sequence, num_blocks, num_prompt_tokens, budget) == expected


def _cache(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


@pytest.fixture
def state() -> Callable[[str], Any]:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    def make(mode: str) -> Any:
        return MambaSpec(
            block_size=16, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode=mode
        )

    return make


@pytest.mark.parametrize(
    ("mode", "lengths", "expected"),
    [
        ("align", (8, 8), BlocksPerSequence(1, 1, False)),
        ("align", (8, 9), BlocksPerSequence(1, 1, False)),  # the 17th is not put in again
        ("align", (8, 10), BlocksPerSequence(1, 1, True)),
        ("none", (8, 10), BlocksPerSequence(1, 0, False)),
    ],
)
def test_blocks_of_states(
    state: Callable[[str], Any],
    mode: str,
    lengths: tuple[int, int],
    expected: BlocksPerSequence,
) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=64),
        cache_config=SimpleNamespace(mamba_cache_mode=mode),
    )
    assert blocks_per_sequence(config, _cache(state(mode)), *lengths) == expected
    assert config.model_config.max_model_len == 64
