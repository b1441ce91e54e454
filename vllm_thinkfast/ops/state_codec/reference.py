"""8-bit states in torch, on any device; ``triton.py`` has the same functions for kernels.

A row of N elements is one block: value = code * scale, scale = max |row| / 127. A value between two
codes goes to the upper one with the probability of its distance from the lower one, so that the
mean of many roundings is the value itself; rounding to nearest would lose every change of less than
half a step, and a state is rounded once per token (stochastic rounding: Gupta et al.,
arXiv 1502.02551).

The random numbers are a hash of the number of tokens in the state and of the element's index in it.
So they depend neither on the slot nor on the batch nor on the device, and nothing has to be seeded
or kept. The value itself does not take part: a matrix product of another batch size may differ in
its last bit, and with a hash of the values' bits every element was then rounded anew, which changed
greedy tokens of a sequence with its neighbours (docs/numerics.md).

All arithmetic behind the scale is in integers: a GPU's fused multiply-add could otherwise round
differently from a CPU's two operations. The fraction has 16 bits, which is the precision that
float32 itself has at the largest value of a row; what is below is cut towards zero.
"""

import torch

from vllm_thinkfast.ops.packing import row_blocks

_BLOCK_BYTES = 2**26
"""States that ``write`` rounds at a time: the hash's integers take several times their memory."""

LARGEST_CODE = 127
FRACTION_BITS = 16
SMALLEST_PEAK = 2.0**-100
"""Rows below this become zero: 1 / scale would overflow, and GPUs flush such small scales."""

INDEX_FACTOR = 0x9E3779B1
FIRST_FACTOR = 0x85EBCA6B
SECOND_FACTOR = 0xC2B2AE35
"""Odd numbers that spread an index and the bits of a hash over 32 bits: 2^32 over the golden ratio,
and the two of MurmurHash3's finaliser (public domain, github.com/aappleby/smhasher)."""


def noise(num_tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A random number for each element, the same wherever and whenever it is asked for.

    Args:
        num_tokens: int32, tokens in the state that is rounded.
        index: int32, of the element in its sequence's state; broadcast against ``num_tokens``.

    Returns:
        int32, in [0, 2^16).
    """
    h = (num_tokens ^ (index * _signed(INDEX_FACTOR))) * _signed(FIRST_FACTOR)
    h ^= (h >> 16) & 0xFFFF  # >> of a signed integer would repeat its sign
    h *= _signed(SECOND_FACTOR)
    return (h >> 16) & 0xFFFF


def quantise(state: torch.Tensor, num_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds the states of sequences to 8 bits.

    Args:
        state: [S, ..., N], float32. A row with an infinity or NaN stays not finite.
        num_tokens: [S], integer, tokens in each state.

    Returns:
        codes [S, ..., N], int8, in [-127, 127], and scales [S, ...], float32; a row of zeros, or
        of values below 2^-100, has scale 0.
    """
    peak = state.abs().amax(-1)
    limit = LARGEST_CODE << FRACTION_BITS
    is_usable = (peak >= SMALLEST_PEAK) & (peak < torch.inf)
    # With a number on one side torch multiplies by a rounded reciprocal, on CUDA on either side.
    scales = torch.where(peak < SMALLEST_PEAK, 0.0, peak / torch.full_like(peak, LARGEST_CODE))
    inverse = torch.full_like(peak, limit) / peak.clamp_min(SMALLEST_PEAK)
    index = torch.arange(state[0].numel(), dtype=torch.int32, device=state.device)
    fixed = torch.where(is_usable[..., None], state * inverse[..., None], 0.0).to(torch.int32)
    fixed.clamp_(-limit, limit)
    since = num_tokens.to(torch.int32).view(-1, *[1] * (state.dim() - 1))
    fixed += noise(since, index.view(state.shape[1:]))
    return (fixed >> FRACTION_BITS).to(torch.int8), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What codes stand for.

    Args:
        codes: [..., N], int8.
        scales: [...], float32.

    Returns:
        [..., N], float32.
    """
    return codes * scales[..., None]


def read(state: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
    """States of some slots of a cache.

    Args:
        state: [slots, ..., N], float, or int8 with scales.
        scales: [slots, ...], float32, for int8 only.
        slots: [S], integer.

    Returns:
        [S, ..., N], float32, a copy.
    """
    gathered = state.index_select(0, slots)
    if scales is None:
        return gathered.float()
    return dequantise(gathered, scales.index_select(0, slots))


def write(
    state: torch.Tensor,
    scales: torch.Tensor | None,
    slots: torch.Tensor,
    values: torch.Tensor,
    num_tokens: torch.Tensor | None,
) -> None:
    """Puts states into slots of a cache, rounded to what it holds.

    Args:
        state: [slots, ..., N], float, or int8 with scales.
        scales: [slots, ...], float32, for int8 only.
        slots: [S], integer.
        values: [S, ..., N], float32.
        num_tokens: [S], integer, tokens in each state, for int8 only.
    """
    if scales is None:
        state[slots] = values.to(state.dtype)
        return
    assert num_tokens is not None
    for rows in row_blocks(len(values), values[:1].nbytes, _BLOCK_BYTES):
        state[slots[rows]], scales[slots[rows]] = quantise(values[rows], num_tokens[rows])


def _signed(factor: int) -> int:
    """The int32 with the bits of an unsigned number; products wrap around in both."""
    return factor - (1 << 32)
