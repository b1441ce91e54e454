"""Inputs of the operator tests: packed offsets, and caches laid out as vLLM lays them out."""

import mmap
from itertools import accumulate, pairwise

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LENGTHS = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257]
"""Around every chunk size in use (16, 32, 64, 128) and beyond."""


def offsets(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens of packed sequences."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def split_points(length: int) -> list[int]:
    """Where to cut a sequence: every border if it is short, else those around chunk sizes."""
    if length <= 24:
        return list(range(length + 1))
    return [k for near in (16, 32, 64, 128) for k in (near - 1, near, near + 1) if k < length]


def slices(packed: torch.Tensor, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """The sequences of a packed tensor."""
    return [packed[a:b] for a, b in pairwise(cu_seqlens)]


def non_contiguous(t: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of a wider tensor, as projections hand them over; NaN around."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan"), dtype=t.dtype)
    wide[..., 3:-2] = t
    return wide[..., 3:-2]


def huge_cache(slots: int, slot_stride: int, inner: torch.Size) -> torch.Tensor:
    """A float16 cache whose slots lie so far apart that offsets leave the range of int32."""
    numel = (slots - 1) * slot_stride + inner.numel()
    if torch.empty(0).device.type == "cpu":
        # Address space without memory: only the pages that are used come into being.
        no_reserve = 0x4000  # Linux; mmap.MAP_NORESERVE exists from Python 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        memory = torch.frombuffer(mmap.mmap(-1, 2 * numel, flags), dtype=torch.float16)
    else:
        memory = torch.zeros(numel, dtype=torch.float16)
    return memory.as_strided((slots, *inner), (slot_stride, *torch.empty(inner).stride()))


def paged_cache(values: torch.Tensor) -> torch.Tensor:
    """A cache [slots, ...] whose slots lie apart, as views into vLLM's byte pages; NaN between.

    Between integers there is 99.
    """
    per_slot = values[0].numel()
    page = per_slot + 24
    filling = float("nan") if values.is_floating_point() else 99
    memory = torch.full((len(values) * page + 8,), filling, dtype=values.dtype)
    inner = torch.empty(values.shape[1:]).stride()
    view = memory.as_strided(values.shape, (page, *inner), storage_offset=8)
    view.copy_(values)
    return view
