"""8-bit states inside Triton kernels; ``reference.py`` says what is computed, bit by bit."""

import torch
import triton
import triton.language as tl

from vllm_thinkfast.ops.state_codec import reference

_LARGEST_CODE = tl.constexpr(float(reference.LARGEST_CODE))
_LIMIT = tl.constexpr(reference.LARGEST_CODE << reference.FRACTION_BITS)
_LIMIT_FLOAT = tl.constexpr(float(reference.LARGEST_CODE << reference.FRACTION_BITS))
_FRACTION_BITS = tl.constexpr(reference.FRACTION_BITS)
_SMALLEST_PEAK = tl.constexpr(reference.SMALLEST_PEAK)
_INDEX_FACTOR = tl.constexpr(reference.INDEX_FACTOR)
_FIRST_FACTOR = tl.constexpr(reference.FIRST_FACTOR)
_SECOND_FACTOR = tl.constexpr(reference.SECOND_FACTOR)


@triton.jit
def noise(num_tokens, index):
    """``reference.noise``: uint32 to int32 in [0, 2^16)."""
    h = (num_tokens ^ (index * _INDEX_FACTOR)) * _FIRST_FACTOR
    h = h ^ (h >> 16)
    h = h * _SECOND_FACTOR
    return (h >> 16).to(tl.int32)


@triton.jit
def quantise(state, num_tokens, index):
    """``reference.quantise`` of a tile of whole rows.

    Args:
        state: [rows, N], float32; zero where the tile reaches beyond a row.
        num_tokens: integer, tokens in the state.
        index: [rows, N], integer, of the elements in their sequence's state.

    Returns:
        codes [rows, N], int8, and scales [rows], float32.
    """
    # As integers, magnitudes compare like floats, and NaN is the largest: tl.max would drop it.
    magnitudes = state.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    # Divisions rounded as IEEE says: Triton's own / is an approximation.
    scales = tl.where(peak < _SMALLEST_PEAK, 0.0, tl.div_rn(peak, _LARGEST_CODE))
    is_usable = (peak >= _SMALLEST_PEAK) & (peak < float("inf"))
    inverse = tl.div_rn(_LIMIT_FLOAT, tl.maximum(peak, _SMALLEST_PEAK))
    fixed = tl.where(is_usable[:, None], state * inverse[:, None], 0.0).to(tl.int32)
    fixed = tl.minimum(tl.maximum(fixed, -_LIMIT), _LIMIT)
    fixed += noise(num_tokens.to(tl.uint32), index.to(tl.uint32))
    return (fixed >> _FRACTION_BITS).to(tl.int8), scales


def scale_strides(
    state: torch.Tensor, scales: torch.Tensor | None, num_tokens: torch.Tensor | None
) -> tuple[int | None, ...]:
    """Strides of scales [slots, ...] and num_tokens [S] beside a state [slots, ..., N].

    With None for each of them, a kernel is compiled without 8-bit states.
    """
    if scales is None:
        return (None,) * state.dim()
    assert num_tokens is not None
    return *scales.stride(), num_tokens.stride(0)
