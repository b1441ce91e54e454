"""Short causal convolution as Triton kernels; same functions and arguments as ``reference.py``.

Prefill is parallel over packed tokens; each token finds its sequence by binary search in the
offsets, so that no launch parameter depends on the contents of a tensor and nothing waits for the
device. The new tails are stored by a second launch: programs of the first may still read the old.
"""

import torch
import triton
import triton.language as tl

from vllm_thinkfast.ops.causal_conv.reference import Activation

_BLOCK_T = 16
_BLOCK_C = 128
_TAIL_CHANNELS = 256
"""Channels per program where one program handles a whole tail of K - 1 inputs."""

_VARIES = ("T", "S", "search_steps")
"""Arguments of a prefill that are others in every step, as is where ``state_indices`` begins in
vLLM's table: Triton would compile variants of the kernel for special values while serving. Where
``u`` begins is left to it, for wide loads: rows of a width that is no multiple of 16 bytes cost one
more variant."""


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=("state_indices_ptr",))
def _prefill_kernel(
    u_ptr, weight_ptr, bias_ptr, state_ptr, state_indices_ptr, has_initial_ptr, cu_seqlens_ptr,
    y_ptr,
    T, C, S, search_steps,
    u_stride_t, u_stride_c,
    weight_stride_c, weight_stride_k,
    bias_stride_c,
    state_stride_slot, state_stride_k, state_stride_c,
    state_indices_stride,
    y_stride_t, y_stride_c,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    i = tl.arange(0, BLOCK_T)
    t = first + i
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_t = t < T
    in_c = c < C
    # The last sequence that begins at or before the token; empty ones before it begin there too.
    low = tl.zeros([BLOCK_T], dtype=tl.int32)
    high = low + (S - 1)
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        begins_before = tl.load(cu_seqlens_ptr + middle) <= t
        low = tl.where(begins_before, middle, low)
        high = tl.where(begins_before, high, middle - 1)
    position = t - tl.load(cu_seqlens_ptr + low)
    slot = tl.load(state_indices_ptr + low.to(tl.int64) * state_indices_stride).to(tl.int64)
    has_initial = tl.load(has_initial_ptr + low) != 0

    # Scalar bases are 64 bits wide, offsets inside a tile 32.
    u_ptr += first * u_stride_t
    y_ptr += first * y_stride_t
    y = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c * bias_stride_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        back = K - 1 - k
        in_sequence = in_t & (position >= back)
        u = tl.load(
            u_ptr + (i - back)[:, None] * u_stride_t + c[None, :] * u_stride_c,
            mask=in_sequence[:, None] & in_c[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if back > 0:
            in_tail = in_t & (position < back) & has_initial
            # Row K - 1 + (position - back) of the tail: at least 0, as back <= K - 1.
            u += tl.load(
                state_ptr + slot[:, None] * state_stride_slot
                + (k + position)[:, None] * state_stride_k + c[None, :] * state_stride_c,
                mask=in_tail[:, None] & in_c[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
        w = tl.load(weight_ptr + c * weight_stride_c + k * weight_stride_k, mask=in_c, other=0.0)
        y += u * w.to(tl.float32)[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(
        y_ptr + i[:, None] * y_stride_t + c[None, :] * y_stride_c,
        y.to(y_ptr.dtype.element_ty), mask=in_t[:, None] & in_c[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=("state_indices_ptr",))
def _store_tail_kernel(
    u_ptr, state_ptr, state_indices_ptr, has_initial_ptr, cu_seqlens_ptr,
    C,
    u_stride_t, u_stride_c,
    state_stride_slot, state_stride_k, state_stride_c,
    state_indices_stride,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_K)
    start = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    length = end - start
    slot = tl.load(state_indices_ptr + s * state_indices_stride).to(tl.int64)
    # New row r is the input at position length - (K - 1) + r, or what is left of the old tail.
    # An empty sequence keeps its tail.
    in_tile = (row < tl.where(length > 0, K - 1, 0))[:, None] & (c < C)[None, :]
    position = length - (K - 1) + row
    first_known = tl.where(tl.load(has_initial_ptr + s) != 0, 1 - K, 0)
    u = tl.load(
        u_ptr + (end - (K - 1)) * u_stride_t
        + row[:, None] * u_stride_t + c[None, :] * u_stride_c,
        mask=in_tile & (position >= 0)[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    state_ptr += slot * state_stride_slot
    old = tl.load(
        state_ptr + (row + length)[:, None] * state_stride_k + c[None, :] * state_stride_c,
        mask=in_tile & ((position >= first_known) & (position < 0))[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    # Rows move inside the slot: all threads must have read before any writes.
    tl.debug_barrier()
    tl.store(
        state_ptr + row[:, None] * state_stride_k + c[None, :] * state_stride_c,
        (u + old).to(state_ptr.dtype.element_ty), mask=in_tile,
    )  # fmt: skip


@triton.jit
def _decode_kernel(
    state_ptr, state_indices_ptr, u_ptr, weight_ptr, bias_ptr, y_ptr,
    C,
    state_stride_slot, state_stride_k, state_stride_c,
    state_indices_stride,
    u_stride_s, u_stride_c,
    weight_stride_c, weight_stride_k,
    bias_stride_c,
    y_stride_s, y_stride_c,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    slot = tl.load(state_indices_ptr + s * state_indices_stride).to(tl.int64)
    # Padding rows (null block) are masked out altogether: they cost no traffic.
    in_c = c < tl.where(slot > 0, C, 0)
    u = tl.load(u_ptr + s * u_stride_s + c * u_stride_c, mask=in_c, other=0.0).to(tl.float32)
    state_ptr += slot * state_stride_slot
    window = tl.load(
        state_ptr + k[:, None] * state_stride_k + c[None, :] * state_stride_c,
        mask=(k < K - 1)[:, None] & in_c[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    window += tl.where((k == K - 1)[:, None], u[None, :], 0.0)
    weight = tl.load(
        weight_ptr + k[:, None] * weight_stride_k + c[None, :] * weight_stride_c,
        mask=(k < K)[:, None] & in_c[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    y = tl.sum(window * weight, axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c * bias_stride_c, mask=in_c, other=0.0).to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + s * y_stride_s + c * y_stride_c, y.to(y_ptr.dtype.element_ty), mask=c < C)
    # Rows move down by one inside the slot: all threads must have read before any writes.
    tl.debug_barrier()
    tl.store(
        state_ptr + (k - 1)[:, None] * state_stride_k + c[None, :] * state_stride_c,
        window.to(state_ptr.dtype.element_ty),
        mask=((k >= 1) & (k < K))[:, None] & in_c[None, :],
    )  # fmt: skip


def prefill(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """See ``reference.prefill``."""
    T, C = u.shape
    K = weight.shape[1]
    S = len(state_indices)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    _prefill_kernel[(triton.cdiv(T, _BLOCK_T), triton.cdiv(C, _BLOCK_C))](
        u, weight, bias, state, state_indices, has_initial_state, cu_seqlens, y,
        T, C, S, S.bit_length(),
        *u.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
        *state.stride(), state_indices.stride(0), *y.stride(),
        K=K, HAS_BIAS=bias is not None, SILU=activation == "silu",
        BLOCK_T=_BLOCK_T, BLOCK_C=_BLOCK_C, num_warps=4,
    )  # fmt: skip
    _store_tail_kernel[(S, triton.cdiv(C, _TAIL_CHANNELS))](
        u, state, state_indices, has_initial_state, cu_seqlens,
        C,
        *u.stride(), *state.stride(), state_indices.stride(0),
        K=K, BLOCK_K=triton.next_power_of_2(K), BLOCK_C=_TAIL_CHANNELS, num_warps=4,
    )  # fmt: skip
    return y


def decode(
    state: torch.Tensor,
    state_indices: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See ``reference.decode``; slot 0 is neither read nor written."""
    S, C = u.shape
    K = weight.shape[1]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    _decode_kernel[(S, triton.cdiv(C, _TAIL_CHANNELS))](
        state, state_indices, u, weight, bias, y,
        C,
        *state.stride(), state_indices.stride(0), *u.stride(), *weight.stride(),
        0 if bias is None else bias.stride(0), *y.stride(),
        K=K, HAS_BIAS=bias is not None, SILU=activation == "silu",
        BLOCK_K=triton.next_power_of_2(K), BLOCK_C=_TAIL_CHANNELS, num_warps=4,
    )  # fmt: skip
    return y
