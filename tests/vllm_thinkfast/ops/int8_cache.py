"""What decoding with an 8-bit cache must do, for each operator that has one."""

from types import ModuleType

import torch

from tests.tolerances import assert_close
from tests.vllm_thinkfast.ops.data import paged_cache
from vllm_thinkfast.ops.state_codec import reference as state_codec

NUM_TOKENS = torch.tensor([9, 1, 2**20, 70], dtype=torch.int32)
"""In the states of four sequences."""


def check_decode_int8(
    op: ModuleType, states: torch.Tensor, arguments: tuple[torch.Tensor | None, ...]
) -> None:
    """As with a float32 cache of the same states; what is written is off by less than a step.

    Args:
        op: a backend of the operator.
        states: [6, ..., N], of six slots.
        arguments: of ``op.decode`` for four sequences.
    """
    codes, factors = state_codec.quantise(states, torch.arange(6))
    cache, scales = paged_cache(codes), paged_cache(factors)
    slots = torch.tensor([[5, 9], [2, 9], [0, 9], [3, 9]])[:, 0]  # a column of a block table
    wide = state_codec.dequantise(codes, factors)
    y = op.decode(cache, slots, *arguments, scales=scales, num_tokens=NUM_TOKENS)
    wanted_y = op.decode(wide, slots, *arguments)
    real = [0, 1, 3]
    assert_close(y[real], wanted_y[real], "operator")
    for slot in slots[real].tolist():
        found = state_codec.dequantise(cache[slot], scales[slot])
        step = wide[slot].abs().amax(-1) / 127
        assert_close(scales[slot], step, "operator")
        assert ((found - wide[slot]).abs() < 1.001 * step[..., None]).all()
    assert torch.equal(cache[[1, 4]], codes[[1, 4]]), "other slots must not change"
    assert torch.equal(scales[[1, 4]], factors[[1, 4]])
