"""What the machine can do, measured, and what a decode step must do at least.

The machine: bytes per second of ``a = b + s * c`` over arrays far larger than any cache (STREAM's
triad; two arrays are read, one is written), of a plain copy, and operations per second of a matrix
product. A decode step has to read all weights once, read and write every recurrent state, and read
the keys and values of the whole context; it cannot be faster than these bytes at the higher of the
two measured bandwidths, nor than its operations at the measured rate (the roofline of Williams,
Waterman and Patterson, CACM 52(4), 2009).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

_ARRAY_BYTES = {"cpu": 2**28, "cuda": 2**29}
"""Of each of three arrays."""
_MATRIX = {"cpu": 1536, "cuda": 8192}
_SECONDS = 1.0
"""Each kernel is repeated for about this long; the fastest repetition counts."""
_OPERATIONS_PER_STATE = 6
"""Decay, outer product, sum, and the product with C: multiplications and additions."""


@dataclass(frozen=True)
class Machine:
    """Measured rates."""

    device: str
    triad_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth that steps are compared with."""
        return max(self.triad_bytes_per_s, self.copy_bytes_per_s)


@dataclass(frozen=True)
class StepCost:
    """What one decode step of a model needs, by config and cache layout."""

    weight_bytes: int
    """Read once per step: every parameter but an untied embedding, of which one row is read."""
    weight_elements: int
    state_bytes: int
    """Convolution and recurrent states of one sequence, all layers; read and written."""
    state_elements: int
    """Of the recurrent states."""
    kv_bytes_per_token: int
    """Keys and values of one token, all attention layers."""
    attention_flops_per_token: int
    """Of one query with one token of context, all attention layers."""
    window: int | None = None
    """Tokens that a query sees, itself among them; None: all."""

    def num_bytes(self, batch: int, context: float) -> float:
        """Bytes to and from memory in a step of ``batch`` sequences of ``context`` tokens."""
        # The keys and values of the context are read, those of the new token written.
        per_token = self.kv_bytes_per_token
        per_sequence = 2 * self.state_bytes + (self._seen(context) + 1) * per_token
        return self.weight_bytes + batch * per_sequence

    def num_flops(self, batch: int, context: float) -> float:
        """Floating point operations of the same step."""
        per_sequence = 2 * self.weight_elements + _OPERATIONS_PER_STATE * self.state_elements
        return batch * (per_sequence + self._seen(context) * self.attention_flops_per_token)

    def _seen(self, context: float) -> float:
        return context if self.window is None else min(context, self.window)

    def least_seconds(self, batch: int, context: float, machine: Machine) -> float:
        """The time below which the machine cannot do it."""
        memory = self.num_bytes(batch, context) / machine.bytes_per_s
        return max(memory, self.num_flops(batch, context) / machine.flops_per_s)


def measure_machine(dtype: str) -> dict[str, Any]:
    """Measures this process's device with as many threads as it has; fields of `Machine`.

    Args:
        dtype: of the matrix product, the models' dtype.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = _ARRAY_BYTES[device] // 4
    b = torch.ones(length, device=device)
    c = torch.ones(length, device=device)
    a = torch.empty_like(b)
    triad = _fastest(lambda: torch.add(b, c, alpha=2.0, out=a), device)
    copy = _fastest(lambda: a.copy_(b), device)
    size = _MATRIX[device]
    x = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    y = torch.empty_like(x)
    product = _fastest(lambda: torch.mm(x, x, out=y), device)
    return asdict(
        Machine(
            device=device,
            triad_bytes_per_s=3 * a.nbytes / triad,
            copy_bytes_per_s=2 * a.nbytes / copy,
            flops_per_s=2 * size**3 / product,
        )
    )


def _fastest(kernel: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of many calls; the first is a warm-up."""
    kernel()
    best = float("inf")
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        _wait(device)
        begin = time.perf_counter()
        kernel()
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
