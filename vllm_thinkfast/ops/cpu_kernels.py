"""The operators as CPU kernels that numba compiles; ``compiled.py`` runs them.

A decode step reads and writes each state once; in a prefill, a head's state stays in the caches.
All compute in float32 whatever the dtype of the cache, and a sequence's result depends on its own
inputs alone, neither on its neighbours nor on threads. Rows of slot 0, vLLM's null block, are
skipped. Strides are those of the outermost dimension, in elements; addresses and sizes are int64.
Shapes and letters are those of the operators' ``reference.py``.

All kernels are in one file because numba's cache on disk notices only changes of the file that a
kernel is in.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_thinkfast.ops import compiled

# Numbers of their own for the same reason; here they are part of the machine code.
NUM_HEADER, FLOAT32, BFLOAT16, FLOAT16 = 3, 0, 1, 2
assert NUM_HEADER == compiled.NUM_HEADER
assert (FLOAT32, BFLOAT16, FLOAT16) == (compiled.FLOAT32, compiled.BFLOAT16, compiled.FLOAT16)

logger = logging.getLogger(__name__)

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()


def _loader(element: Any, returned: Any, widen: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic (address, index) -> the element there, widened."""

    @intrinsic
    def load(context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base = builder.inttoptr(arguments[0], element.as_pointer())
            return widen(builder, builder.load(builder.gep(base, [arguments[1]])))

        return returned(types.int64, types.int64), generate

    return load


def _storer(element: Any, narrow: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic (address, index, float32) that stores the number, rounded to nearest."""

    @intrinsic
    def store(context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base = builder.inttoptr(arguments[0], element.as_pointer())
            builder.store(narrow(builder, arguments[2]), builder.gep(base, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return store


def _widen_bfloat16(builder: Any, bits: Any) -> Any:
    shifted = builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16))
    return builder.bitcast(shifted, _FLOAT)


def _narrow_bfloat16(builder: Any, value: Any) -> Any:
    """To nearest, ties to even, as torch rounds; NaN stays NaN."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
    upper = builder.lshr(rounded, ir.Constant(_I32, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, ir.Constant(_I32, 0x7FC0), upper), _I16)


_load_int64 = _loader(_I64, types.int64, lambda builder, v: v)
_load_int32 = _loader(_I32, types.int64, lambda builder, v: builder.sext(v, _I64))
_load_float32 = _loader(_FLOAT, types.float32, lambda builder, v: v)
_load_bfloat16 = _loader(_I16, types.float32, _widen_bfloat16)
_load_float16 = _loader(_HALF, types.float32, lambda builder, v: builder.fpext(v, _FLOAT))
_store_float32 = _storer(_FLOAT, lambda builder, v: v)
_store_bfloat16 = _storer(_I16, _narrow_bfloat16)
_store_float16 = _storer(_HALF, lambda builder, v: builder.fptrunc(v, _HALF))


@intrinsic
def _take_number(context: Any, address: Any) -> Any:
    """Returns the int64 at an address and adds 1 to it, atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(_I64, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once: which product of a sum is fused is not left to the compiler."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _times_power_of_two(context: Any, value: Any, shifted: Any) -> Any:
    """value 2^n, where ``shifted`` is the float32 _SHIFTER + n, which has n in its lowest bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, exponent = (builder.bitcast(a, _I32) for a in arguments)
        exponent = builder.shl(exponent, ir.Constant(_I32, 23))
        return builder.bitcast(builder.add(bits, exponent), _FLOAT)

    return types.float32(types.float32, types.float32), generate


_f32 = np.float32
_ZERO, _ONE, _TWO, _INFINITY = _f32(0.0), _f32(1.0), _f32(2.0), _f32(np.inf)
_ATANH3, _ATANH5, _ATANH7, _ATANH9 = _f32(1 / 3), _f32(1 / 5), _f32(1 / 7), _f32(1 / 9)
_ATANH11, _ATANH13, _ATANH15 = _f32(1 / 11), _f32(1 / 13), _f32(1 / 15)
_SHIFTER = _f32(1.5 * 2**23)  # adding it rounds to an integer
_LOG2_E = _f32(1.44269504)
# ln 2 in two parts (Cody and Waite): the first has so few bits that n times it is exact.
_LN2_HIGH, _LN2_LOW = _f32(0.693359375), _f32(-2.12194440e-4)
_MIN_EXP, _MAX_EXP = _f32(-86.0), _f32(88.0)
# The polynomial of Cephes' expf (Moshier): (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2, to 2e-8.
_P0, _P1, _P2 = _f32(1.9875691500e-4), _f32(1.3981999507e-3), _f32(8.3334519073e-3)
_P3, _P4, _P5 = _f32(4.1665795894e-2), _f32(1.6666665459e-1), _f32(5.0000001201e-1)

_contracted = numba.njit(fastmath={"contract"}, error_model="numpy")
# Sums over a row in the order that suits the vectors; it is the same for every row.
_reassociated = numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")


def _kernel(function: Callable[[Any], None]) -> Any:
    """Compiles ``function`` (address of the arguments, see ``compiled.Kernel``) to a C function."""
    try:
        return numba.cfunc("void(int64)", error_model="numpy", cache=True)(function)
    # No folder to write to, a full disk, files that cannot be read: RuntimeError, OSError, EOFError
    # and others. What is wrong with the function itself comes again without the cache.
    except Exception as error:
        kernel = numba.cfunc("void(int64)", error_model="numpy")(function)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning(
            "On CPU: %s was compiled, but numba cannot keep it on disk for the next start (%s); "
            "NUMBA_CACHE_DIR names another folder.",
            function.__name__, reason,
        )  # fmt: skip
        return kernel


# Contraction only: reassociation would undo the two-part reduction.
@_contracted
def _exp(x: Any) -> Any:
    """exp of a float32 to 2 units in the last place; 0 below e^-86, inf above e^88.

    numba's own is a library call per element unless Intel's vector library is installed; LLVM
    vectorises this one for the machine at hand.
    """
    limited = _MIN_EXP if x < _MIN_EXP else x
    limited = _MAX_EXP if limited > _MAX_EXP else limited
    shifted = limited * _LOG2_E + _SHIFTER
    n = shifted - _SHIFTER
    r = (limited - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = _times_power_of_two(p * (r * r) + r + _ONE, shifted)
    power = _ZERO if x < _MIN_EXP else power
    power = _INFINITY if x > _MAX_EXP else power
    return x if x != x else power  # NaN


@_contracted
def _softplus(x: Any) -> Any:
    """log(1 + e^x) of a float32 as max(x, 0) + log(1 + t), t = e^-|x|; the latter is 2 artanh s."""
    t = _exp(-abs(x))
    s = t / (_TWO + t)  # at most 1/3: eight terms reach float32
    q = s * s
    series = (((_ATANH15 * q + _ATANH13) * q + _ATANH11) * q + _ATANH9) * q + _ATANH7
    series = ((series * q + _ATANH5) * q + _ATANH3) * q + _ONE
    return (x if x > _ZERO else _ZERO) + _TWO * s * series


@_contracted
def _take_items(arguments: Any) -> Any:
    """The range of items that the calling thread computes next; empty at the end."""
    chunk = _take_number(arguments)
    chunks, items = _load_int64(arguments, 1), _load_int64(arguments, 2)
    if chunk >= chunks:
        return 0, 0
    return chunk * items // chunks, (chunk + 1) * items // chunks


@_contracted
def _get(arguments: Any, index: Any) -> Any:
    """An argument behind the header."""
    return _load_int64(arguments, NUM_HEADER + index)


@_contracted
def _tokens(starts: Any, s: Any) -> Any:
    """The range of a sequence's tokens; without starts each has one."""
    if starts == 0:
        return s, s + 1
    return _load_int32(starts, s), _load_int32(starts, s + 1)


@_contracted
def _slot(slots: Any, stride: Any, s: Any) -> Any:
    """Where a sequence's state is; without slots at its own number, -1 where there is none."""
    if slots == 0:
        return s
    slot = _load_int32(slots, s * stride)
    return slot if slot > 0 else -1


def _by_dtype(make: Callable[[Any, Any], Any]) -> Any:
    """What ``make(load, store)`` returns, behind one more argument: the dtype of the cache."""
    float32 = make(_load_float32, _store_float32)
    bfloat16 = make(_load_bfloat16, _store_bfloat16)
    float16 = make(_load_float16, _store_float16)

    @_contracted
    def call(dtype: Any, *arguments: Any) -> None:
        if dtype == FLOAT32:
            float32(*arguments)
        elif dtype == BFLOAT16:
            bfloat16(*arguments)
        else:
            float16(*arguments)

    return call


def _ssd_head(load: Any, store: Any) -> Any:
    @_reassociated
    def update(state: Any, first: Any, P: Any, N: Any, decay: Any, x: Any, B: Any, C: Any, D: Any,
               d_stride: Any, y: Any) -> None:  # fmt: skip
        """One head: its state [P, N] begins at element ``first``; x, y [P], B, C [N]."""
        for p in range(P):
            row, value, total = first + p * N, _load_float32(x, p), _ZERO
            for n in range(N):
                h = _fma(decay, load(state, row + n), value * _load_float32(B, n))
                total += h * _load_float32(C, n)
                store(state, row + n, h)
            _store_float32(y, p, total + _load_float32(D, p * d_stride) * value)

    return update


_update_ssd_head = _by_dtype(_ssd_head)


@_kernel
def discrete_ssd(arguments: Any) -> None:
    """Items are heads of sequences, S H. Arguments: see ``discrete_ssd.cpu``.

    With ``is_logit`` the decay is sigmoid(-a) of a = ``log_decay``.
    """
    H, P, N, G = (_get(arguments, 0), _get(arguments, 1), _get(arguments, 2), _get(arguments, 3))
    state, slot_stride, dtype = _get(arguments, 4), _get(arguments, 5), _get(arguments, 6)
    slots, slots_stride, starts = _get(arguments, 7), _get(arguments, 8), _get(arguments, 9)
    x, x_stride = _get(arguments, 10), _get(arguments, 11)
    log_decay, log_decay_stride = _get(arguments, 12), _get(arguments, 13)
    B, B_stride, C, C_stride = (
        _get(arguments, 14), _get(arguments, 15), _get(arguments, 16), _get(arguments, 17)
    )  # fmt: skip
    D, D_head, D_channel, y, is_logit = (
        _get(arguments, 18), _get(arguments, 19), _get(arguments, 20), _get(arguments, 21),
        _get(arguments, 22),
    )  # fmt: skip
    while True:
        first_item, end_item = _take_items(arguments)
        if first_item == end_item:
            return
        for item in range(first_item, end_item):
            s, h = item // H, item % H
            slot = _slot(slots, slots_stride, s)
            if slot < 0:
                continue
            first, group = slot * slot_stride + h * P * N, h * G // H * N
            D_of_head = D + 4 * h * D_head
            begin, end = _tokens(starts, s)
            for t in range(begin, end):
                decay = _load_float32(log_decay, t * log_decay_stride + h)
                decay = _ONE / (_ONE + _exp(decay)) if is_logit else _exp(decay)
                x_head, y_head = x + 4 * (t * x_stride + h * P), y + 4 * (t * H + h) * P
                B_head, C_head = B + 4 * (t * B_stride + group), C + 4 * (t * C_stride + group)
                _update_ssd_head(dtype, state, first, P, N, decay, x_head, B_head, C_head,
                                 D_of_head, D_channel, y_head)  # fmt: skip


def _selective_head(load: Any, store: Any) -> Any:
    @_reassociated
    def update(state: Any, first: Any, P: Any, N: Any, dt: Any, x: Any, A: Any, B: Any, C: Any,
               D: Any, y: Any) -> None:  # fmt: skip
        """One head: its state [P, N] begins at element ``first``; A [P, N], dt, x, D, y [P]."""
        for p in range(P):
            row, total = first + p * N, _ZERO
            step, value = _load_float32(dt, p), _load_float32(x, p)
            dtx = step * value
            for n in range(N):
                decay = _exp(step * _load_float32(A, p * N + n))
                h = _fma(decay, load(state, row + n), dtx * _load_float32(B, n))
                total += h * _load_float32(C, n)
                store(state, row + n, h)
            _store_float32(y, p, total + _load_float32(D, p) * value)

    return update


_update_selective_head = _by_dtype(_selective_head)


@_kernel
def selective_scan(arguments: Any) -> None:
    """Items are heads of sequences, S H. Arguments: see ``selective_scan.cpu``.

    x has ``x_heads`` heads, each for H / x_heads of the others. With ``dt_bias`` the step sizes are
    softplus(dt + dt_bias), and ``steps`` is memory for them, [T, E].
    """
    H, P, N, G = (_get(arguments, 0), _get(arguments, 1), _get(arguments, 2), _get(arguments, 3))
    state, slot_stride, dtype = _get(arguments, 4), _get(arguments, 5), _get(arguments, 6)
    slots, slots_stride, starts = _get(arguments, 7), _get(arguments, 8), _get(arguments, 9)
    x, x_stride, dt, dt_stride = (
        _get(arguments, 10), _get(arguments, 11), _get(arguments, 12), _get(arguments, 13)
    )  # fmt: skip
    A, B, B_stride, C, C_stride = (
        _get(arguments, 14), _get(arguments, 15), _get(arguments, 16), _get(arguments, 17),
        _get(arguments, 18),
    )  # fmt: skip
    D, y = _get(arguments, 19), _get(arguments, 20)
    x_heads, dt_bias, steps = _get(arguments, 21), _get(arguments, 22), _get(arguments, 23)
    while True:
        first_item, end_item = _take_items(arguments)
        if first_item == end_item:
            return
        for item in range(first_item, end_item):
            s, h = item // H, item % H
            slot = _slot(slots, slots_stride, s)
            if slot < 0:
                continue
            first, group = slot * slot_stride + h * P * N, h * G // H * N
            A_head, D_head = A + 4 * h * P * N, D + 4 * h * P
            begin, end = _tokens(starts, s)
            for t in range(begin, end):
                x_head = x + 4 * (t * x_stride + h * x_heads // H * P)
                dt_head = dt + 4 * (t * dt_stride + h * P)
                B_head, C_head = B + 4 * (t * B_stride + group), C + 4 * (t * C_stride + h * N)
                y_head = y + 4 * (t * H + h) * P
                if dt_bias:
                    steps_head = steps + 4 * (t * H + h) * P
                    for p in range(P):
                        step = _load_float32(dt_head, p) + _load_float32(dt_bias, h * P + p)
                        _store_float32(steps_head, p, _softplus(step))
                    dt_head = steps_head
                _update_selective_head(dtype, state, first, P, N, dt_head, x_head, A_head, B_head,
                                       C_head, D_head, y_head)  # fmt: skip


def _conv_channels(fixed_taps: int, load: Any, store: Any) -> Any:
    """For this many taps and contiguous channels, which vectorises; 0: any taps and strides."""

    @_contracted
    def update(u: Any, state: Any, first: Any, k_stride: Any, any_stride: Any, weight: Any,
               bias: Any, is_silu: Any, taps: Any, y: Any, begin: Any,
               end: Any) -> None:  # fmt: skip
        """Channels of a sequence whose tail [K - 1, C] begins at element ``first``."""
        K = fixed_taps if fixed_taps else taps
        c_stride = 1 if fixed_taps else any_stride
        for c in range(begin, end):
            total = load(weight, c * K + K - 1) * load(u, c)
            for k in range(K - 1):
                total += load(weight, c * K + k) * load(state, first + k * k_stride + c * c_stride)
            if bias:
                total += load(bias, c)
            if is_silu:
                total = total / (_ONE + _exp(-total))
            store(y, c, total)
        # Loops of their own: with one store each, LLVM can tell that nothing overlaps.
        for k in range(K - 2):
            here = first + k * k_stride
            for c in range(begin, end):
                store(state, here + c * c_stride, load(state, here + k_stride + c * c_stride))
        if K > 1:
            for c in range(begin, end):
                store(state, first + (K - 2) * k_stride + c * c_stride, load(u, c))

    return update


_convolve_4 = _by_dtype(functools.partial(_conv_channels, 4))
_convolve_any = _by_dtype(functools.partial(_conv_channels, 0))


@_kernel
def causal_conv(arguments: Any) -> None:
    """Items are blocks of channels of sequences. Arguments: see ``causal_conv.cpu``."""
    C, K, blocks = _get(arguments, 0), _get(arguments, 1), _get(arguments, 2)
    state, slot_stride, k_stride, c_stride, dtype = (
        _get(arguments, 3), _get(arguments, 4), _get(arguments, 5), _get(arguments, 6),
        _get(arguments, 7),
    )  # fmt: skip
    slots, slots_stride = _get(arguments, 8), _get(arguments, 9)
    u, u_stride, weight, bias, is_silu, y = (
        _get(arguments, 10), _get(arguments, 11), _get(arguments, 12), _get(arguments, 13),
        _get(arguments, 14), _get(arguments, 15),
    )  # fmt: skip
    width = 4 if dtype == FLOAT32 else 2
    while True:
        first_item, end_item = _take_items(arguments)
        if first_item == end_item:
            return
        for item in range(first_item, end_item):
            s, block = item // blocks, item % blocks
            slot = _slot(slots, slots_stride, s)
            if slot < 0:
                continue
            begin, end = block * C // blocks, (block + 1) * C // blocks
            first = slot * slot_stride
            u_row, y_row = u + width * s * u_stride, y + width * s * C
            if K == 4 and c_stride == 1:
                _convolve_4(dtype, u_row, state, first, k_stride, c_stride, weight, bias, is_silu,
                            K, y_row, begin, end)  # fmt: skip
            else:
                _convolve_any(dtype, u_row, state, first, k_stride, c_stride, weight, bias,
                              is_silu, K, y_row, begin, end)  # fmt: skip
