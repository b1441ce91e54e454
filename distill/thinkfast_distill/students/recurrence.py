"""Recurrences of the mixers on packed rows, in float32, without a Python step per token.

``discrete_ssd`` is one scalar decay per head (Llamba, Mamba-2), in the chunked matrix form of
section 6 of the Mamba-2 paper (arXiv 2405.21060). ``selective_scan`` has a decay per channel and
state (Mamba-1), for which there is no matrix form. Documents are separated inside: a decay of zero
in front of each first token. No exponential ever has a positive argument, so nothing overflows.
Inputs in float64 are computed in float64.

The same recurrences as ``vllm_thinkfast.ops``, which serve; these ones have gradients.

Shapes: B rows, L tokens, H heads, G groups, P head_dim, N ssm_state_size, E = H P channels; inside,
K chunks of Q tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 64
"""Tokens per chunk of ``discrete_ssd``; the result does not depend on it."""

NO_STATE_LEFT = -200.0
"""Log decays are clamped from below to this: its exponential is exactly 0 in float32, and stronger
ones (up to -inf) would cost the other decays their digits in the cumulated sum."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def discrete_ssd(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    segments: torch.Tensor,
) -> torch.Tensor:
    """S_t = exp(log_decay_t) S_(t-1) + x_t (outer) B_t and y_t = S_t C_t, S = 0 at each start.

    Args:
        x: [B, L, H, P], any float dtype.
        log_decay: [B, L, H], <= 0.
        B: [B, L, H, N].
        C: [B, L, H, N].
        segments: [B, L], an integer that is the same in all tokens of a document and different in
            neighbouring documents.

    Returns:
        y [B, L, H, P], float32 (or float64).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = compute_dtype(x.dtype)
        rows, length = x.shape[:2]
        pad = -length % CHUNK
        # [B, H, K, Q, .]; padding repeats the last document and has x = 0.
        x, B, C = (_chunks(F.pad(t.to(dtype), (0, 0, 0, 0, 0, pad))) for t in (x, B, C))
        # In float64: one strong decay would otherwise cost the weak ones of its chunk their digits.
        steps = F.pad(log_decay.double().clamp_min(NO_STATE_LEFT), (0, 0, 0, pad))
        g = _chunks(steps[..., None])[..., 0].cumsum(-1)  # [B, H, K, Q]
        seg = torch.cat([segments, segments[:, -1:].expand(-1, pad)], 1).view(rows, 1, -1, CHUNK)

        # Inside a chunk: a masked matrix product.
        index = torch.arange(CHUNK, device=x.device)
        is_seen = (seg[..., :, None] == seg[..., None, :]) & (index[:, None] >= index)
        weights = _decays(g[..., :, None] - g[..., None, :], is_seen, dtype)
        y = (weights * (C @ B.transpose(-1, -2))) @ x
        num_chunks = seg.shape[2]
        if num_chunks > 1:
            # What each chunk adds to the state at its end.
            last = seg[..., -1:]  # [B, 1, K, 1]
            to_end = _decays(g[..., -1:] - g, seg == last, dtype)
            added = (x * to_end[..., None]).transpose(-1, -2) @ B  # [B, H, K, P, N]
            # The state before chunk k, from what all chunks before it added.
            total = g[..., -1].cumsum(-1)  # [B, H, K]
            order = torch.arange(num_chunks, device=x.device)
            ends = last[..., 0]
            is_kept = (ends[..., :, None] == ends[..., None, :]) & (order[:, None] >= order)
            between = _decays(total[..., :, None] - total[..., None, :], is_kept, dtype)
            after = (between @ added.flatten(3)).view_as(added)  # state after each chunk
            since_start = _decays(g[:, :, 1:], seg[:, :, 1:] == last[:, :, :-1], dtype)
            carried = C[:, :, 1:] @ after[:, :, :-1].transpose(-1, -2)
            y = y + F.pad(since_start[..., None] * carried, (0, 0, 0, 0, 1, 0))
        result: torch.Tensor = y.flatten(2, 3)[:, :, :length].transpose(1, 2)
        return result


def ssd_matrix(
    log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, segments: torch.Tensor
) -> torch.Tensor:
    """The matrix T of ``discrete_ssd``, y = T x for each head and channel.

    Args:
        log_decay: [B, L, H].
        B: [B, L, H, N].
        C: [B, L, H, N].
        segments: [B, L], see ``discrete_ssd``.

    Returns:
        T [B, H, L, L], float32 (or float64); quadratic in L.
    """
    with torch.autocast(B.device.type, enabled=False):
        dtype = compute_dtype(B.dtype)
        g = log_decay.double().clamp_min(NO_STATE_LEFT).cumsum(1).transpose(1, 2)  # [B, H, L]
        index = torch.arange(B.shape[1], device=B.device)
        is_seen = (segments[:, None, :, None] == segments[:, None, None, :]) & (
            index[:, None] >= index
        )
        decays = _decays(g[..., :, None] - g[..., None, :], is_seen, dtype)
        scores: torch.Tensor = torch.einsum("blhn,bmhn->bhlm", C.to(dtype), B.to(dtype))
        return scores * decays


def _decays(exponents: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp(exponents) where ``mask``, else 0, without the inf that masking afterwards would meet."""
    return exponents.to(dtype).masked_fill(~mask, -math.inf).exp()


def _chunks(t: torch.Tensor) -> torch.Tensor:
    """[B, L, H, .] -> [B, H, K, Q, .], contiguous."""
    cut: torch.Tensor = t.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)
    return cut.contiguous()


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """S_t[e] = exp(dt_t[e] A[e]) S_(t-1)[e] + dt_t[e] x_t[e] B_t and y_t[e] = <S_t[e], C_t>.

    Channel e is of head e // P with its own C and of group e // (E / G) with its own B.

    Args:
        x: [B, L, E], any float dtype.
        dt: [B, L, E], step sizes, >= 0.
        A: [E, N], < 0.
        B: [B, L, G, N].
        C: [B, L, H, N].
        starts: [B, L] bool, first tokens of documents; the state before them is zero.

    Returns:
        y [B, L, E], float32 (or float64).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = compute_dtype(x.dtype)
        x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        y: torch.Tensor = _SelectiveScan.apply(dt * x, dt, A, B, C, starts)  # type: ignore[no-untyped-call]
        return y


class _SelectiveScan(torch.autograd.Function):
    """Keeps only its inputs for the backward pass; states [B, L, E, N] are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        dtx: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        starts: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(dtx, dt, A, B, C, starts)
        scan = _Blocks(dtx, dt, A, B, C, starts)
        h, _ = scan.states()
        y = (scan.per_head(h) @ scan.C[..., None])[..., 0].flatten(-2)
        return scan.tokens(y)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        dtx, dt, A, B, C, starts = ctx.saved_tensors
        scan = _Blocks(dtx, dt, A, B, C, starts)
        h, before = scan.states()
        dy = scan.blocks(grad_y.contiguous())
        dy_per_head = dy.unflatten(-1, (C.shape[2], -1))
        grad_C = (dy_per_head[..., None, :] @ scan.per_head(h))[..., 0, :]
        # The gradient of the state, walking back.
        g = (dy_per_head[..., None] * scan.C[..., None, :]).flatten(-3, -2)
        scan.walk_back_(g)
        per_group = scan.per_group(g)
        grad_dtx = (per_group @ scan.B[..., None])[..., 0].flatten(-2)
        grad_B = (scan.dtx_per_group[..., None, :] @ per_group)[..., 0, :]
        # Of the exponent dt A: g_t exp(dt_t A) S_(t-1), written over the decays.
        w = scan.decay
        w[1:].mul_(h[:-1])
        w[0].mul_(before)
        w.mul_(g)
        grad_A = torch.mul(w, scan.dt[..., None], out=g).sum((0, 1, 2))
        grad_dt = w.mul_(A).sum(-1)
        return (
            scan.tokens(grad_dtx),
            scan.tokens(grad_dt),
            grad_A,
            scan.tokens(grad_B),
            scan.tokens(grad_C),
            None,
        )


class _Blocks:
    """Rows cut into K blocks of Q tokens that are scanned side by side, then joined.

    The sequential part is Q + K steps of tensors instead of L: first every block from a zero state
    to its end, then the ends are joined, then every block again from the state it really starts
    with. Layout [Q, B, K, ...], so that a step reads and writes contiguous memory.
    """

    def __init__(
        self,
        dtx: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        self.length = dt.shape[1]
        self.block = max(8, 2 ** round(math.log2(max(self.length, 1)) / 2))
        # Padding: dt = 0 decays nothing and adds nothing.
        self.dt, self.B, self.C = (self.blocks(t) for t in (dt, B, C))
        self.dtx_per_group = self.blocks(dtx).unflatten(-1, (B.shape[2], -1))
        is_start = self.blocks(starts)[..., None, None]
        self.decay = (self.dt[..., None] * A).exp_().masked_fill_(is_start, 0)  # [Q, B, K, E, N]
        self.total = (self.dt.sum(0)[..., None] * A).exp_().masked_fill_(is_start.any(0), 0)

    def blocks(self, t: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [Q, B, K, ...], contiguous, padded with zeros."""
        pad = [0, 0] * (t.dim() - 2) + [0, -self.length % self.block]
        t = F.pad(t, pad).unflatten(1, (-1, self.block))
        cut: torch.Tensor = t.permute(2, 0, 1, *range(3, t.dim())).contiguous()
        return cut

    def tokens(self, t: torch.Tensor) -> torch.Tensor:
        """The inverse of ``blocks``."""
        joined: torch.Tensor = t.permute(1, 2, 0, *range(3, t.dim())).flatten(1, 2)
        return joined[:, : self.length]

    def per_head(self, t: torch.Tensor) -> torch.Tensor:
        """[..., E, N] -> [..., H, P, N]."""
        split: torch.Tensor = t.unflatten(-2, (self.C.shape[-2], -1))
        return split

    def per_group(self, t: torch.Tensor) -> torch.Tensor:
        """[..., E, N] -> [..., G, E / G, N]."""
        split: torch.Tensor = t.unflatten(-2, (self.B.shape[-2], -1))
        return split

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States after each token [Q, B, K, E, N], and before each block [B, K, E, N]."""
        h = (self.dtx_per_group[..., None] * self.B[..., None, :]).flatten(-3, -2)
        run = h[0]
        for q in range(1, self.block):
            run = torch.addcmul(h[q], self.decay[q], run)
        before = torch.zeros_like(run)
        for k in range(1, run.shape[1]):
            torch.addcmul(run[:, k - 1], self.total[:, k - 1], before[:, k - 1], out=before[:, k])
        run = before
        for q in range(self.block):
            run = h[q].addcmul_(self.decay[q], run)
        return h, before

    def walk_back_(self, g: torch.Tensor) -> None:
        """g_t += decay_(t+1) g_(t+1), from the last token to the first, in place."""
        run = self.decay[-1] * g[-1]
        for q in range(self.block - 2, -1, -1):
            run = run.add_(g[q]).mul_(self.decay[q])
        after = torch.zeros_like(run)
        for k in range(run.shape[1] - 2, -1, -1):
            torch.addcmul(run[:, k + 1], self.total[:, k + 1], after[:, k + 1], out=after[:, k])
        run = after
        for q in range(self.block - 1, -1, -1):
            g[q].add_(run)
            torch.mul(self.decay[q], g[q], out=run)
