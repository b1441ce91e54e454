"""Mamba-1 selective scan as Triton kernels; same functions and arguments as ``reference.py``.

Decays differ per channel and state, so there is no matrix form. Prefill runs one program per
sequence and block of channels, which walks the tokens in order with its states in registers: each
input is read once and no intermediate state is written. No launch parameter depends on the contents
of a tensor, so nothing waits for the device.
"""

import torch
import triton
import triton.language as tl

from vllm_thinkfast.ops.state_codec.triton import quantise, scale_strides

_PREFILL_CHANNELS = 16
"""Channels per prefill program: few, so that one long sequence still occupies the whole device."""
_DECODE_CHANNELS = 64
"""Channels per decode program: memory-bound, so fewer and larger programs."""


@triton.jit
def _prefill_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, initial_ptr, cu_seqlens_ptr, y_ptr, final_ptr,
    E, N, channels_per_group, channels_per_head,
    x_stride_t, x_stride_e,
    dt_stride_t, dt_stride_e,
    A_stride_e, A_stride_n,
    B_stride_t, B_stride_g, B_stride_n,
    C_stride_t, C_stride_h, C_stride_n,
    D_stride_e,
    initial_stride_s, initial_stride_e, initial_stride_n,
    y_stride_t, y_stride_e,
    final_stride_s, final_stride_e, final_stride_n,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e = e < E
    in_state = in_e[:, None] & (n < N)[None, :]
    start = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)

    A = tl.load(
        A_ptr + e[:, None] * A_stride_e + n[None, :] * A_stride_n, mask=in_state, other=0.0
    ).to(tl.float32)
    D = tl.load(D_ptr + e * D_stride_e, mask=in_e, other=0.0).to(tl.float32)
    state = tl.load(
        initial_ptr + s * initial_stride_s
        + e[:, None] * initial_stride_e + n[None, :] * initial_stride_n,
        mask=in_state, other=0.0,
    ).to(tl.float32)  # fmt: skip
    # A block of channels may span several heads and groups.
    B_offsets = (e // channels_per_group)[:, None] * B_stride_g + n[None, :] * B_stride_n
    C_offsets = (e // channels_per_head)[:, None] * C_stride_h + n[None, :] * C_stride_n

    for t in range(start, end):
        x = tl.load(x_ptr + t * x_stride_t + e * x_stride_e, mask=in_e, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + t * dt_stride_t + e * dt_stride_e, mask=in_e, other=0.0)
        dt = dt.to(tl.float32)
        B = tl.load(B_ptr + t * B_stride_t + B_offsets, mask=in_state, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + t * C_stride_t + C_offsets, mask=in_state, other=0.0).to(tl.float32)
        state = tl.exp(dt[:, None] * A) * state + (dt * x)[:, None] * B
        y = tl.sum(state * C, axis=1) + D * x
        tl.store(y_ptr + t * y_stride_t + e * y_stride_e, y.to(y_ptr.dtype.element_ty), mask=in_e)

    tl.store(
        final_ptr + s * final_stride_s
        + e[:, None] * final_stride_e + n[None, :] * final_stride_n,
        state, mask=in_state,
    )  # fmt: skip


@triton.jit
def _decode_kernel(
    state_ptr, scales_ptr, num_tokens_ptr, state_indices_ptr,
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr,
    E, N, channels_per_group, channels_per_head,
    state_stride_slot, state_stride_e, state_stride_n,
    scales_stride_slot, scales_stride_e, num_tokens_stride,
    state_indices_stride,
    x_stride_s, x_stride_e,
    dt_stride_s, dt_stride_e,
    A_stride_e, A_stride_n,
    B_stride_s, B_stride_g, B_stride_n,
    C_stride_s, C_stride_h, C_stride_n,
    D_stride_e,
    y_stride_s, y_stride_e,
    HAS_SCALES: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    slot = tl.load(state_indices_ptr + s * state_indices_stride).to(tl.int64)
    # Padding rows (null block) are masked out altogether: they cost no traffic and yield zeros.
    in_e = e < tl.where(slot > 0, E, 0)
    in_state = in_e[:, None] & (n < N)[None, :]

    A = tl.load(
        A_ptr + e[:, None] * A_stride_e + n[None, :] * A_stride_n, mask=in_state, other=0.0
    ).to(tl.float32)
    D = tl.load(D_ptr + e * D_stride_e, mask=in_e, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + s * x_stride_s + e * x_stride_e, mask=in_e, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + s * dt_stride_s + e * dt_stride_e, mask=in_e, other=0.0).to(tl.float32)
    B = tl.load(
        B_ptr + s * B_stride_s
        + (e // channels_per_group)[:, None] * B_stride_g + n[None, :] * B_stride_n,
        mask=in_state, other=0.0,
    ).to(tl.float32)  # fmt: skip
    C = tl.load(
        C_ptr + s * C_stride_s
        + (e // channels_per_head)[:, None] * C_stride_h + n[None, :] * C_stride_n,
        mask=in_state, other=0.0,
    ).to(tl.float32)  # fmt: skip
    state_ptrs = (
        state_ptr + slot * state_stride_slot
        + e[:, None] * state_stride_e + n[None, :] * state_stride_n
    )  # fmt: skip
    if HAS_SCALES:
        scales_ptrs = scales_ptr + slot * scales_stride_slot + e * scales_stride_e
        scales = tl.load(scales_ptrs, mask=in_e, other=0.0)
        state = tl.load(state_ptrs, mask=in_state, other=0).to(tl.float32) * scales[:, None]
    else:
        state = tl.load(state_ptrs, mask=in_state, other=0.0).to(tl.float32)
    state = tl.exp(dt[:, None] * A) * state + (dt * x)[:, None] * B
    if HAS_SCALES:
        num_tokens = tl.load(num_tokens_ptr + s * num_tokens_stride)
        codes, scales = quantise(state, num_tokens, e[:, None] * N + n[None, :])
        tl.store(state_ptrs, codes, mask=in_state)
        tl.store(scales_ptrs, scales, mask=in_e)
    else:
        tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=in_state)
    y = tl.sum(state * C, axis=1) + D * x
    tl.store(y_ptr + s * y_stride_s + e * y_stride_e, y.to(y_ptr.dtype.element_ty), mask=e < E)


def prefill(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.prefill``."""
    E, N = A.shape
    per_group, per_head = _channels_per(E, B, C)
    S = len(cu_seqlens) - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(initial_state.shape, dtype=torch.float32, device=x.device)
    block_n = triton.next_power_of_2(N)
    _prefill_kernel[(S, triton.cdiv(E, _PREFILL_CHANNELS))](
        x, dt, A, B, C, D, initial_state, cu_seqlens, y, final,
        E, N, per_group, per_head,
        *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), D.stride(0),
        *initial_state.stride(), *y.stride(), *final.stride(),
        BLOCK_E=_PREFILL_CHANNELS, BLOCK_N=block_n,
        num_warps=_num_warps(_PREFILL_CHANNELS * block_n),
    )  # fmt: skip
    return y, final


def decode(
    state: torch.Tensor,
    state_indices: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scales: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.decode``; slot 0 is neither read nor written, its rows of y are zero."""
    E, N = A.shape
    per_group, per_head = _channels_per(E, B, C)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(N)
    _decode_kernel[(len(x), triton.cdiv(E, _DECODE_CHANNELS))](
        state, scales, num_tokens, state_indices, x, dt, A, B, C, D, y,
        E, N, per_group, per_head,
        *state.stride(), *scale_strides(state, scales, num_tokens),
        state_indices.stride(0),
        *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), D.stride(0), *y.stride(),
        HAS_SCALES=scales is not None, BLOCK_E=_DECODE_CHANNELS, BLOCK_N=block_n,
        num_warps=_num_warps(_DECODE_CHANNELS * block_n),
    )  # fmt: skip
    return y


def _channels_per(E: int, B: torch.Tensor, C: torch.Tensor) -> tuple[int, int]:
    """Consecutive channels that share a row of B (a group) and of C (a head)."""
    G, H = B.shape[1], C.shape[1]
    assert E % H == 0, (E, H)
    assert H % G == 0, (H, G)
    return E // G, E // H


def _num_warps(tile: int) -> int:
    """Warps for a tile of states: 8 to 16 elements per thread, at most 8 warps."""
    return max(1, min(8, tile // 256))
