"""Calls of every Triton entry point that record the launches instead of making them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from vllm_thinkfast.ops.backend import OPERATORS, load_operator

SIZES = {  # what is published: Llamba-1B, Llamba-3B, MambaInLlama Mamba-2; MambaInLlama Mamba-1
    "discrete_ssd": [(32, 64, 32, 64), (32, 96, 32, 64), (32, 128, 32, 128)],  # H, P, G, N
    "selective_scan": [(256, 16, 64, 16)],
    "causal_conv": [(6144,)],  # channels
}

CALLS = [
    (operator, entry, size)
    for operator in OPERATORS
    for entry in ("prefill", "decode", "decode_int8")
    for size in SIZES[operator]
    if (operator, entry) != ("causal_conv", "decode_int8")
]
"""``decode_int8`` is ``decode`` with a cache of 8-bit states."""


class Launches(list):
    """Stands in for a kernel; collects (kernel, grid, arguments, options)."""

    def stub(self, kernel: Any) -> Any:
        launches = self

        class Stub:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **options: launches.append((kernel, grid, args, options))

        return Stub()


@contextmanager
def recorded(module: ModuleType) -> Iterator[Launches]:
    """Replaces the kernels of a backend module."""
    launches = Launches()
    kernels = {name: k for name, k in vars(module).items() if name.endswith("_kernel")}
    assert kernels
    for name, kernel in kernels.items():
        setattr(module, name, launches.stub(kernel))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def arguments(operator: str, entry: str, size: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Arguments of an entry point: 3 sequences, 100 tokens or one each, a cache of 5 slots."""
    S, T = 3, 100 if entry == "prefill" else 3
    cu_seqlens = torch.tensor([0, 40, 60, 100], dtype=torch.int32)
    slots = torch.tensor([1, 2, 4], dtype=torch.int32)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    if operator == "causal_conv":
        (C,) = size
        taps = [zeros(T, C), zeros(C, 4), zeros(C), "silu"]
        if entry == "decode":
            return [zeros(5, 3, C), slots, *taps]
        return [*taps, zeros(5, 3, C), slots, torch.ones(S, dtype=torch.bool), cu_seqlens]
    H, P, G, N = size
    f32 = torch.float32
    if operator == "discrete_ssd":
        state = (H, P, N)
        inputs = [zeros(T, H, P), zeros(T, H, dtype=f32), zeros(T, G, N), zeros(T, G, N), zeros(H)]
    else:
        E = H * P
        state = (E, N)
        inputs = [zeros(T, E), zeros(T, E, dtype=f32), zeros(E, N, dtype=f32), zeros(T, G, N),
                  zeros(T, H, N), zeros(E)]  # fmt: skip
    if entry == "decode":
        return [zeros(5, *state, dtype=f32), slots, *inputs]
    if entry == "decode_int8":
        scales = zeros(5, *state[:-1], dtype=f32)
        return [zeros(5, *state, dtype=torch.int8), slots, *inputs, scales, slots.clone()]
    return [*inputs, zeros(S, *state, dtype=f32), cu_seqlens]


def entry_point(module: ModuleType, entry: str) -> Callable[..., Any]:
    """The host function that an entry of CALLS calls."""
    function: Callable[..., Any] = getattr(module, entry.removesuffix("_int8"))
    return function


def record(
    operator: str, entry: str, size: tuple[int, ...], dtype: torch.dtype
) -> tuple[Any, Launches]:
    """Result of the host function, and the launches it would have made."""
    module = load_operator(operator, "triton")
    args = arguments(operator, entry, size, dtype)
    with recorded(module) as launches:
        return entry_point(module, entry)(*args), launches
