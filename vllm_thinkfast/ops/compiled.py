"""Kernels for CPUs, compiled by numba on the user's machine.

numba, a dependency of vLLM, brings its own compiler, so that nothing else has to be installed. A
kernel is a C function of one argument, an array of int64 with pointers and sizes. It runs on the
threads that torch uses, by the entry point ``GOMP_parallel`` of torch's OpenMP library (libgomp's
ABI, which libomp and libiomp5 export too): threads of our own would compete with torch's, which
spin between their tasks, and vLLM binds only those to cores.

Work is cut into chunks that the threads take from a counter, so that the results do not depend on
how many threads come.
"""

import ctypes
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal

import torch

logger = logging.getLogger(__name__)

_CHUNKS_PER_THREAD = 4
"""Of items of equal work. More than one, because other processes slow threads down."""
_MIN_PARALLEL_WORK = 2**15
"""Below this many elements one thread alone is faster: waking the others costs about 5 us."""

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
"""How kernels are told the dtype of a cache."""

_PARALLEL = "GOMP_parallel"

NUM_HEADER = 3
"""Leading elements of a kernel's arguments, set by ``Kernel``: next chunk, chunks, items."""


class Kernel:
    """A compiled function and the threads that run it."""

    def __init__(self, address: int, parallel: Callable[..., None]) -> None:
        """Wraps the C function ``void f(int64_t *arguments)`` at ``address``."""
        self._address = ctypes.c_void_p(address)
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        self._parallel = parallel

    def __call__(self, items: int, work: int, *arguments: int, is_even: bool = True) -> None:
        """Runs the kernel for all items and waits for it.

        Args:
            items: independent pieces of work, at least as many as threads are useful.
            work: elements that are touched by all of them together.
            arguments: pointers and sizes; what they point to must be kept alive by the caller.
            is_even: whether all items are of the same work; otherwise threads take single ones.
        """
        threads = torch.get_num_threads() if work >= _MIN_PARALLEL_WORK else 1
        chunks = min(items, threads * _CHUNKS_PER_THREAD) if is_even else items
        packed = (ctypes.c_int64 * (NUM_HEADER + len(arguments)))(0, chunks, items, *arguments)
        if threads == 1:
            self._serial(packed)
        else:
            self._parallel(self._address, packed, threads, 0)


@functools.cache
def find(operator: str) -> Kernel | None:
    """The kernel of an operator, or None, which a line in the log explains.

    Compiling takes some seconds the first time on a machine; numba keeps the result on disk.

    Args:
        operator: a name of ``backend.OPERATORS``.
    """
    parallel = _find_parallel()
    if parallel is None:
        logger.warning("On CPU: %s uses torch, for want of %s.", operator, _PARALLEL)
        return None
    try:
        cpu_kernels = importlib.import_module("vllm_thinkfast.ops.cpu_kernels")
    # Missing, switched off by NUMBA_DISABLE_JIT, without its compiler: torch serves all the same.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("On CPU: %s uses torch, numba does not compile (%s).", operator, reason)
        return None
    logger.info("On CPU: using the compiled kernel of %s.", operator)
    return Kernel(getattr(cpu_kernels, operator).address, parallel)


def find_for(operator: str, state: torch.Tensor) -> Kernel | None:
    """The kernel if it takes these states [slots, ...]: on CPU, of a float dtype.

    Their strides are the caller's affair.
    """
    return find(operator) if state.device.type == "cpu" and state.dtype in DTYPES else None


def implementation(operator: str) -> Literal["compiled", "torch"]:
    """Which implementation ``ops.<operator>.cpu.decode`` uses for caches of a float dtype."""
    return "torch" if find(operator) is None else "compiled"


def _find_parallel() -> Callable[..., None] | None:
    """The entry point of the OpenMP library that torch uses.

    What the process as a whole exports comes first, as it does for torch's own calls: a library
    that was preloaded (vLLM advises libiomp5) takes them over.
    """
    for library in (None, f"{torch.__path__[0]}/lib/libtorch_cpu.so"):
        try:
            parallel = getattr(ctypes.CDLL(library), _PARALLEL)
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        found: Callable[..., None] = parallel
        return found
    return None


def address(t: torch.Tensor | None) -> int:
    """Where a tensor begins; 0 tells a kernel that there is none."""
    return 0 if t is None else t.data_ptr()


def address_and_stride(t: torch.Tensor | None) -> tuple[int, int]:
    """The same with the stride of the first dimension."""
    return (0, 0) if t is None else (t.data_ptr(), t.stride(0))


def sequence_indices(
    state: torch.Tensor,
    state_indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_tokens: int,
) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
    """Number of sequences, and their slots and offsets as a kernel reads them: int32.

    Args:
        state: [slots, ...].
        state_indices: slot of each sequence; None: there is one for each slot, in order.
        cu_seqlens: offsets of the sequences in the tokens; None: each has one token.
        num_tokens: of all sequences together.
    """
    S = num_tokens if cu_seqlens is None else len(cu_seqlens) - 1
    slots = None if state_indices is None else state_indices.to(torch.int32)
    starts = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    assert (len(state) if slots is None else len(slots)) == S, (S, state.shape, state_indices)
    assert starts is None or starts[-1] <= num_tokens, (starts, num_tokens)
    return S, slots, starts


def has_packed_rows(t: torch.Tensor) -> bool:
    """Whether each row of ``t`` [S, ...] is contiguous; the rows may lie apart."""
    size = 1
    for length, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if stride != size and length != 1:
            return False
        size *= length
    return True


def float_rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` [S, ...] in float32 with contiguous rows; itself where it is so already."""
    return t if t.dtype == torch.float32 and has_packed_rows(t) else t.float().contiguous()
