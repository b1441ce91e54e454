"""Discrete SSD, token by token: the definition that the fast backends are tested against.

For head h in group g(h) = h // (H / G), with state S of shape [P, N]::

    S_t = exp(log_decay_t) S_{t-1} + x_t (outer) B_t
    y_t = S_t C_t + D x_t

Llamba (cartesia-ai/edge ``mixers/discrete_mamba2.py``): log_decay = -softplus(a), that is
exp(log_decay) = sigmoid(-a). The published code divides x by softplus(a) and lets a Mamba-2 kernel
multiply it back; for very negative a the division overflows, and the factor cancels anyway.
Mamba-2 (state-spaces/mamba): log_decay = dt A, and x is passed multiplied by dt, with D x added by
the caller.

Shapes: T packed tokens, S sequences, H heads, G groups, P head_dim, N ssm_state_size.
"""

import torch

from vllm_thinkfast.ops.state_codec import reference as state_codec


def prefill(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs whole sequences.

    Args:
        x: [T, H, P], any float dtype.
        log_decay: [T, H], float32, <= 0.
        B: [T, G, N].
        C: [T, G, N].
        D: [H] or [H, P], or None.
        initial_state: [S, H, P, N], float32.
        cu_seqlens: [S + 1], integer offsets of the sequences in T.

    Returns:
        y [T, H, P] in x's dtype, and the final state [S, H, P, N], float32.
    """
    y = torch.zeros_like(x, dtype=torch.float32)
    final = initial_state.float().clone()
    starts = cu_seqlens.tolist()
    for s in range(len(starts) - 1):
        for t in range(starts[s], starts[s + 1]):
            y[t] = _step(final[s : s + 1], x[t : t + 1], log_decay[t : t + 1], B[t : t + 1],
                         C[t : t + 1], D)[0]  # fmt: skip
    return y.to(x.dtype), final


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
    """Advances each sequence by one token; the cache is updated in place.

    Args:
        state: [slots, H, P, N], the cache, any float dtype, or int8 with scales; computed in
            float32, y from the state before it is rounded.
        state_indices: [S], slot of each sequence; slot 0 is vLLM's null block (padding rows): its
            content and the row's output are undefined.
        x: [S, H, P].
        log_decay: [S, H], float32, <= 0.
        B: [S, G, N].
        C: [S, G, N].
        D: [H] or [H, P], or None.
        scales: [slots, H, P], float32, for an int8 cache only; updated in place.
        num_tokens: [S], integer, tokens in each state after this one, for an int8 cache only: the
            noise of its rounding depends on it.

    Returns:
        y [S, H, P] in x's dtype.
    """
    y = torch.zeros_like(x)
    for s, slot in enumerate(state_indices.tolist()):
        row = slice(s, s + 1)
        here = torch.tensor([slot], device=state.device)
        current = state_codec.read(state, scales, here)
        y[row] = _step(current, x[row], log_decay[row], B[row], C[row], D).to(x.dtype)
        state_codec.write(
            state, scales, here, current, None if num_tokens is None else num_tokens[row]
        )
    return y


def _step(
    state: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
) -> torch.Tensor:
    """One token: changes ``state`` [1, H, P, N] (float32) in place and returns y [1, H, P]."""
    heads_per_group = x.shape[1] // B.shape[1]
    x, B, C = x.float(), B.float(), C.float()
    B = B.repeat_interleave(heads_per_group, dim=1)
    C = C.repeat_interleave(heads_per_group, dim=1)
    state.mul_(log_decay.float().exp()[..., None, None])
    state.add_(x[..., :, None] * B[..., None, :])
    y = (state * C[..., None, :]).sum(-1)
    if D is not None:
        y = y + D.float().reshape(D.shape[0], -1) * x
    return y
