"""Discrete SSD as Triton kernels; same functions and arguments as ``reference.py``.

Prefill: one program per sequence, head and block of P walks the chunks of its sequence in order and
keeps the state in registers. Inside a chunk the recurrence is the masked matrix product of section
6 of the Mamba-2 paper (arXiv 2405.21060). No launch parameter depends on the contents of a tensor,
so nothing waits for the device.

Everything is computed in float32 with ``input_precision="ieee"``; the cumulated log decays are
float64, because logits of +-100 beside small ones would cost the small ones their digits.
"""

import torch
import triton
import triton.language as tl

from vllm_thinkfast.ops.state_codec.triton import quantise, scale_strides

CHUNK = 32
"""Tokens per chunk up to N = 64; the result does not depend on it. Products in full float32 do not
run on matrix units, so that short chunks, which waste less on the triangle, are cheaper; with these
sizes the compiler keeps everything in registers (sm_80, sm_90)."""
_WIDE_CHUNK = 16
"""Tokens per chunk for wider states; N = 128 still spills 200 to 300 bytes per thread."""
_PREFILL_BLOCK_P = 16
"""Rows of the state per prefill program: few, so that one long sequence fills many processors."""
_DECODE_BLOCK_P = 32
"""Rows of the state per decode program. It divides the published head_dims 64, 96 and 128."""
_MIN_DOT = 16
"""``tl.dot`` accepts no smaller side."""
_NO_STATE_LEFT = -200.0
"""Log decays are clamped from below to this: in float32 its exponential is exactly 0, and stronger
ones (up to -inf) would cost the other decays of the chunk their digits in the cumulated sum."""


@triton.jit
def _prefill_kernel(
    x_ptr, log_decay_ptr, B_ptr, C_ptr, D_ptr, initial_ptr, cu_seqlens_ptr, y_ptr, final_ptr,
    P, N, heads_per_group, lowest_log_decay,
    x_stride_t, x_stride_h, x_stride_p,
    log_decay_stride_t, log_decay_stride_h,
    B_stride_t, B_stride_g, B_stride_n,
    C_stride_t, C_stride_g, C_stride_n,
    D_stride_h, D_stride_p,
    initial_stride_s, initial_stride_h, initial_stride_p, initial_stride_n,
    y_stride_t, y_stride_h, y_stride_p,
    final_stride_s, final_stride_h, final_stride_p, final_stride_n,
    HAS_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, CHUNK)
    in_p = p < P
    in_n = n < N
    in_state = in_p[:, None] & in_n[None, :]
    g = h // heads_per_group
    start = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)

    x_ptr += h * x_stride_h
    log_decay_ptr += h * log_decay_stride_h
    B_ptr += g * B_stride_g
    C_ptr += g * C_stride_g
    y_ptr += h * y_stride_h
    initial_ptr += s * initial_stride_s + h * initial_stride_h
    final_ptr += s * final_stride_s + h * final_stride_h

    state = tl.load(
        initial_ptr + p[:, None] * initial_stride_p + n[None, :] * initial_stride_n,
        mask=in_state, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if HAS_D:
        D = tl.load(D_ptr + h * D_stride_h + p * D_stride_p, mask=in_p, other=0.0).to(tl.float32)
    is_past = q[:, None] >= q[None, :]
    # Scalar bases are 64 bits wide, offsets inside a tile 32: those stay in registers.
    x_ptr += start * x_stride_t
    log_decay_ptr += start * log_decay_stride_t
    B_ptr += start * B_stride_t
    C_ptr += start * C_stride_t
    y_ptr += start * y_stride_t
    x_offsets = q[:, None] * x_stride_t + p[None, :] * x_stride_p
    B_offsets = q[:, None] * B_stride_t + n[None, :] * B_stride_n
    C_offsets = q[:, None] * C_stride_t + n[None, :] * C_stride_n
    y_offsets = q[:, None] * y_stride_t + p[None, :] * y_stride_p

    for begin in range(start, end, CHUNK):
        is_real = q < end - begin
        in_x = is_real[:, None] & in_p[None, :]
        in_bc = is_real[:, None] & in_n[None, :]
        # Padding tokens decay nothing and add nothing: log_decay = 0, x = 0.
        log_decay = tl.load(log_decay_ptr + q * log_decay_stride_t, mask=is_real, other=0.0)
        log_decay = tl.maximum(log_decay, lowest_log_decay).to(tl.float64)
        since_start = tl.cumsum(log_decay, axis=0)
        whole = tl.sum(log_decay, axis=0)
        x = tl.load(x_ptr + x_offsets, mask=in_x, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + B_offsets, mask=in_bc, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + C_offsets, mask=in_bc, other=0.0).to(tl.float32)

        between = (since_start[:, None] - since_start[None, :]).to(tl.float32)
        weights = tl.dot(C, tl.trans(B), input_precision="ieee")
        weights *= tl.exp(tl.where(is_past, between, float("-inf")))
        y = tl.dot(C, tl.trans(state), input_precision="ieee")
        y *= tl.exp(since_start.to(tl.float32))[:, None]
        y += tl.dot(weights, x, input_precision="ieee")
        if HAS_D:
            y += D[None, :] * x
        tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=in_x)

        to_end = tl.exp((whole - since_start).to(tl.float32))
        state *= tl.exp(whole.to(tl.float32))
        state += tl.dot(tl.trans(x * to_end[:, None]), B, input_precision="ieee")

        x_ptr += CHUNK * x_stride_t
        log_decay_ptr += CHUNK * log_decay_stride_t
        B_ptr += CHUNK * B_stride_t
        C_ptr += CHUNK * C_stride_t
        y_ptr += CHUNK * y_stride_t

    tl.store(
        final_ptr + p[:, None] * final_stride_p + n[None, :] * final_stride_n, state, mask=in_state
    )


@triton.jit
def _decode_kernel(
    state_ptr, scales_ptr, num_tokens_ptr, state_indices_ptr,
    x_ptr, log_decay_ptr, B_ptr, C_ptr, D_ptr, y_ptr,
    P, N, heads_per_group,
    state_stride_slot, state_stride_h, state_stride_p, state_stride_n,
    scales_stride_slot, scales_stride_h, scales_stride_p, num_tokens_stride,
    state_indices_stride,
    x_stride_s, x_stride_h, x_stride_p,
    log_decay_stride_s, log_decay_stride_h,
    B_stride_s, B_stride_g, B_stride_n,
    C_stride_s, C_stride_g, C_stride_n,
    D_stride_h, D_stride_p,
    y_stride_s, y_stride_h, y_stride_p,
    HAS_D: tl.constexpr, HAS_SCALES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    g = h // heads_per_group
    slot = tl.load(state_indices_ptr + s * state_indices_stride).to(tl.int64)
    # Padding rows (null block) are masked out altogether: they cost no traffic and yield zeros.
    in_p = p < tl.where(slot > 0, P, 0)
    in_n = n < tl.where(slot > 0, N, 0)
    in_state = in_p[:, None] & in_n[None, :]

    log_decay = tl.load(
        log_decay_ptr + s * log_decay_stride_s + h * log_decay_stride_h, mask=slot > 0, other=0.0
    )
    x = tl.load(
        x_ptr + s * x_stride_s + h * x_stride_h + p * x_stride_p, mask=in_p, other=0.0
    ).to(tl.float32)  # fmt: skip
    B = tl.load(
        B_ptr + s * B_stride_s + g * B_stride_g + n * B_stride_n, mask=in_n, other=0.0
    ).to(tl.float32)  # fmt: skip
    C = tl.load(
        C_ptr + s * C_stride_s + g * C_stride_g + n * C_stride_n, mask=in_n, other=0.0
    ).to(tl.float32)  # fmt: skip
    state_ptrs = (
        state_ptr + slot * state_stride_slot + h * state_stride_h
        + p[:, None] * state_stride_p + n[None, :] * state_stride_n
    )  # fmt: skip
    if HAS_SCALES:
        scales_ptrs = (
            scales_ptr + slot * scales_stride_slot + h * scales_stride_h + p * scales_stride_p
        )
        scales = tl.load(scales_ptrs, mask=in_p, other=0.0)
        state = tl.load(state_ptrs, mask=in_state, other=0).to(tl.float32) * scales[:, None]
    else:
        state = tl.load(state_ptrs, mask=in_state, other=0.0).to(tl.float32)
    state = state * tl.exp(log_decay.to(tl.float32)) + x[:, None] * B[None, :]
    if HAS_SCALES:
        num_tokens = tl.load(num_tokens_ptr + s * num_tokens_stride)
        codes, scales = quantise(state, num_tokens, (h * P + p[:, None]) * N + n[None, :])
        tl.store(state_ptrs, codes, mask=in_state)
        tl.store(scales_ptrs, scales, mask=in_p)
    else:
        tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=in_state)
    y = tl.sum(state * C[None, :], axis=1)
    if HAS_D:
        D = tl.load(D_ptr + h * D_stride_h + p * D_stride_p, mask=in_p, other=0.0).to(tl.float32)
        y += D * x
    tl.store(
        y_ptr + s * y_stride_s + h * y_stride_h + p * y_stride_p,
        y.to(y_ptr.dtype.element_ty), mask=p < P,
    )  # fmt: skip


def prefill(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.prefill``."""
    _, H, P = x.shape
    G, N = B.shape[1:]
    assert H % G == 0, (H, G)
    S = len(cu_seqlens) - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(initial_state.shape, dtype=torch.float32, device=x.device)
    block_n = max(_MIN_DOT, triton.next_power_of_2(N))
    _prefill_kernel[(S, H, triton.cdiv(P, _PREFILL_BLOCK_P))](
        x, log_decay, B, C, D, initial_state, cu_seqlens, y, final,
        P, N, H // G, _NO_STATE_LEFT,
        *x.stride(), *log_decay.stride(), *B.stride(), *C.stride(), *_skip_strides(D),
        *initial_state.stride(), *y.stride(), *final.stride(),
        HAS_D=D is not None, CHUNK=CHUNK if block_n <= 64 else _WIDE_CHUNK,
        BLOCK_P=_PREFILL_BLOCK_P, BLOCK_N=block_n, num_warps=4, num_stages=1,
    )  # fmt: skip
    return y, final


def decode(
    state: torch.Tensor,
    state_indices: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    scales: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.decode``; slot 0 is neither read nor written, its rows of y are zero."""
    S, H, P = x.shape
    G, N = B.shape[1:]
    assert H % G == 0, (H, G)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(N)
    block_p = min(_DECODE_BLOCK_P, triton.next_power_of_2(P))
    _decode_kernel[(S, H, triton.cdiv(P, block_p))](
        state, scales, num_tokens, state_indices, x, log_decay, B, C, D, y,
        P, N, H // G,
        *state.stride(), *scale_strides(state, scales, num_tokens),
        state_indices.stride(0), *x.stride(), *log_decay.stride(),
        *B.stride(), *C.stride(), *_skip_strides(D), *y.stride(),
        HAS_D=D is not None, HAS_SCALES=scales is not None, BLOCK_P=block_p, BLOCK_N=block_n,
        num_warps=4 if block_p * block_n >= 2048 else 1,
    )  # fmt: skip
    return y


def _skip_strides(D: torch.Tensor | None) -> tuple[int, int]:
    """Strides over heads and over P of D [H] or [H, P]."""
    if D is None:
        return 0, 0
    return D.stride(0), D.stride(1) if D.dim() == 2 else 0
