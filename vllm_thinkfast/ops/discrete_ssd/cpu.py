"""Discrete SSD on CPU: a compiled kernel (``cpu_kernels.py``), or torch where there is none.

Same functions and arguments as ``reference.py``. The kernel goes token by token with a head's state
in the caches. In torch, prefill is the chunked form of section 6 of the Mamba-2 paper (arXiv
2405.21060): inside a chunk the recurrence is a masked matrix product, between chunks only the state
travels. Decays enter as differences of cumulated logarithms, which are <= 0, so nothing overflows;
the cumulation itself is in float64 because logits of +-100 would otherwise cost the small decays
their digits.
"""

import functools

import torch

from vllm_thinkfast.ops import compiled
from vllm_thinkfast.ops.packing import padded_blocks, row_blocks
from vllm_thinkfast.ops.state_codec import reference as state_codec

CHUNK = 64
"""Tokens per chunk; the result does not depend on it. Measured with H 32, P 64, N 64 and 1024
tokens on 2 cores: 27 ms with 32, 32 ms with 64, 51 ms with 128, 94 ms with 256."""

_NO_STATE_LEFT = -200.0
"""Log decays are clamped from below to this: in float32 its exponential is exactly 0, and stronger
ones (up to -inf) would cost the other decays of the chunk their digits in the cumulated sum."""


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
    state = initial_state.float().clone(memory_format=torch.contiguous_format)
    kernel = compiled.find_for("discrete_ssd", state)
    if kernel is not None:
        return _run_compiled(kernel, state, None, cu_seqlens, x, log_decay, B, C, D), state
    xf = x.float()
    y = _prefill_torch(state, xf, log_decay, B.float(), C.float(), cu_seqlens)
    if D is not None:
        y.addcmul_(D.float().reshape(len(D), -1), xf)
    return y.to(x.dtype), state


def _prefill_torch(
    state: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Whole sequences without D, all inputs float32; y [T, H, P], and ``state`` at their ends."""
    H = x.shape[1]
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for rows, tokens, is_real in padded_blocks(cu_seqlens, CHUNK):
        # Padding tokens add nothing and decay nothing: x = 0, log_decay = 0.
        xb = (x[tokens] * is_real[..., None, None]).transpose(1, 2)  # [A, H, Q, P]
        steps = log_decay[tokens].double().clamp_min(_NO_STATE_LEFT)
        g = (steps * is_real[..., None]).cumsum(1).transpose(1, 2)  # [A, H, Q]
        Bb = B[tokens].transpose(1, 2)  # [A, G, Q, N]
        Cb = C[tokens].transpose(1, 2)
        since_start = g.float().exp()[..., None]  # [A, H, Q, 1]
        to_end = (g[..., -1:] - g).float().exp()[..., None]
        pair = (g[..., :, None] - g[..., None, :]).float()  # [A, H, Q, Q]
        Q = pair.shape[-1]
        later = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
        weights = pair.masked_fill_(later, float("-inf")).exp_()
        weights *= _per_head(Cb @ Bb.transpose(-1, -2), H)
        h = state[rows]  # [A, H, P, N]
        Bh, Ch = _per_head(Bb, H), _per_head(Cb, H)
        yb = weights @ xb + since_start * (Ch @ h.transpose(-1, -2))
        state[rows] = since_start[..., -1:, :] * h + (xb * to_end).transpose(-1, -2) @ Bh
        y[tokens[is_real]] = yb.transpose(1, 2)[is_real]
    return y


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
    """See ``reference.decode``."""
    kernel = compiled.find_for("discrete_ssd", state)
    if kernel is not None and compiled.has_packed_rows(state):
        return _run_compiled(kernel, state, state_indices, None, x, log_decay, B, C, D)
    xf, Bf, Cf = x.float(), B.float(), C.float()
    y = _decode_torch(state, scales, num_tokens, state_indices, xf, log_decay.float(), Bf, Cf)
    if D is not None:
        y.addcmul_(D.float().reshape(len(D), -1), xf)
    return y.to(x.dtype)


def _run_compiled(
    kernel: compiled.Kernel,
    state: torch.Tensor,
    state_indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
) -> torch.Tensor:
    """Sequences in these slots, or one in each, with the tokens between offsets, or one each.

    Updates ``state`` [slots, H, P, N], of any float dtype, in place; returns y [T, H, P].
    """
    T, H, P = x.shape
    S, slots, starts = compiled.sequence_indices(state, state_indices, cu_seqlens, T)
    G, N = B.shape[1:]
    assert state.shape[1:] == (H, P, N), (state.shape, x.shape, B.shape)
    assert log_decay.shape == (T, H), log_decay.shape
    assert C.shape == B.shape, (B.shape, C.shape)
    assert H % G == 0, (H, G)
    xf, steps = compiled.float_rows(x), compiled.float_rows(log_decay)
    Bf, Cf = compiled.float_rows(B), compiled.float_rows(C)
    if D is None:
        Df, d_head, d_channel = _no_d(), 0, 0
    else:
        assert D.shape in ((H,), (H, P)), D.shape
        Df = D.float()
        d_head, d_channel = Df.stride(0), Df.stride(1) if Df.dim() == 2 else 0
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    kernel(
        S * H, T * H * P * N, H, P, N, G,
        state.data_ptr(), state.stride(0), compiled.DTYPES[state.dtype],
        *compiled.address_and_stride(slots), compiled.address(starts),
        xf.data_ptr(), xf.stride(0), steps.data_ptr(), steps.stride(0),
        Bf.data_ptr(), Bf.stride(0), Cf.data_ptr(), Cf.stride(0),
        Df.data_ptr(), d_head, d_channel, y.data_ptr(), False,
        is_even=starts is None,
    )  # fmt: skip
    return y.to(x.dtype)


@functools.cache
def _no_d() -> torch.Tensor:
    return torch.zeros(1, device="cpu")


def _decode_torch(
    state: torch.Tensor,
    scales: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    state_indices: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> torch.Tensor:
    """One token per sequence without D, all inputs float32; y [S, H, P]."""
    S, H, P = x.shape
    decay = log_decay.exp()[..., None, None]
    Bh, Ch = _per_head(B, H)[..., None, :], _per_head(C, H)[..., None, :]
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for rows in row_blocks(S, 4 * H * P * B.shape[-1]):
        slots = state_indices[rows]
        h = state_codec.read(state, scales, slots)
        h.mul_(decay[rows]).addcmul_(x[rows, ..., None], Bh[rows])
        state_codec.write(state, scales, slots, h, None if num_tokens is None else num_tokens[rows])
        torch.sum(h.mul_(Ch[rows]), -1, out=y[rows])
    return y


def _per_head(t: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeats dimension 1 from groups to heads, consecutive heads sharing a group."""
    return t if t.shape[1] == num_heads else t.repeat_interleave(num_heads // t.shape[1], dim=1)
