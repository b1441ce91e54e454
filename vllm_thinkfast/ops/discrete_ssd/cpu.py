"""Discrete SSD on CPU: vLLM's kernels where the build has them, torch otherwise.

Same functions and arguments as ``reference.py``. vLLM's kernel for whole sequences goes token by
token with the state in the caches. Ours in torch is the chunked form of section 6 of the Mamba-2
paper (arXiv 2405.21060): inside a chunk the recurrence is a masked matrix product, between chunks
only the state travels. Decays enter as differences of cumulated logarithms, which are <= 0, so
nothing overflows; the cumulation itself is in float64 because logits of +-100 would otherwise cost
the small decays their digits.

Measured on 2 cores, 4096 tokens, the kernel takes this share of the time of the chunked form: 0.4
to 0.6 (H 8, P and N 64), 0.7 to 0.9 (H 24, P and N 128), and 0.2 to 0.3 with 64 sequences of 64.
"""

import torch

from vllm_thinkfast.ops import vllm_kernels
from vllm_thinkfast.ops.packing import padded_blocks, row_blocks
from vllm_thinkfast.ops.state_codec import reference as state_codec

CHUNK = 64
"""Tokens per chunk; the result does not depend on it. Measured with H 32, P 64, N 64 and 1024
tokens on 2 cores: 27 ms with 32, 32 ms with 64, 51 ms with 128, 94 ms with 256."""

_NO_STATE_LEFT = -200.0
"""Log decays are clamped from below to this: in float32 its exponential is exactly 0, and stronger
ones (up to -inf) would cost the other decays of the chunk their digits in the cumulated sum."""

_SMALLEST_STEP = 2.0**-26
"""Step sizes are clamped from below to this for the kernel: exp(-2^-26) is exactly 1 in float32, as
is that of any smaller step, and x divided by it stays far from overflow."""


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
    H = x.shape[1]
    xf, Bf, Cf = x.float(), B.float(), C.float()
    state = initial_state.float().clone(memory_format=torch.contiguous_format)
    kernel = vllm_kernels.find(vllm_kernels.SCAN)
    if kernel is None:
        y = _prefill_torch(state, xf, log_decay, Bf, Cf, cu_seqlens)
    else:
        dt = _step_sizes(log_decay)
        y = vllm_kernels.scan(kernel, state, xf / dt[..., None], dt, -1.0, Bf, Cf, cu_seqlens)
    if D is not None:
        y.addcmul_(D.float().reshape(H, -1), xf)
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
    H = x.shape[1]
    xf, Bf, Cf = x.float(), B.float(), C.float()
    kernel = vllm_kernels.find_state_update(state)
    if kernel is None:
        y = _decode_torch(state, scales, num_tokens, state_indices, xf, log_decay.float(), Bf, Cf)
    else:
        dt = _step_sizes(log_decay)
        y = vllm_kernels.update_state(
            kernel, state, state_indices, xf / dt[..., None], dt, -1.0, Bf, Cf
        )
    if D is not None:
        y.addcmul_(D.float().reshape(H, -1), xf)
    return y.to(x.dtype)


def _step_sizes(log_decay: torch.Tensor) -> torch.Tensor:
    """What vLLM's kernels want with A = -1; they multiply x by it, so that x is divided first."""
    return log_decay.float().neg().clamp_(_SMALLEST_STEP, -_NO_STATE_LEFT)


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
