"""Mamba-1 selective scan with shared B, token by token: what the fast backends are tested against.

For channel c of head h = c // N_head, in group g(h) = h // (H / G), with state S of shape [N]::

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t
    y_t = <S_t, C_t> + D x_t

Source: state-spaces/mamba ``selective_scan_ref`` with jxiw/MambaInLlama's heads: a head is a slice
of P consecutive channels (P = N in that code) with its own C; B is shared by the H / G heads of a
group.

Shapes: T packed tokens, S sequences, H heads, G groups, P channels per head, E = H P channels,
N ssm_state_size.
"""

import torch

from vllm_thinkfast.ops.state_codec import reference as state_codec


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
    """Runs whole sequences.

    Args:
        x: [T, E], any float dtype.
        dt: [T, E], float32, step sizes after softplus, >= 0.
        A: [E, N], float32, < 0.
        B: [T, G, N].
        C: [T, H, N].
        D: [E].
        initial_state: [S, E, N], float32.
        cu_seqlens: [S + 1], integer offsets of the sequences in T.

    Returns:
        y [T, E] in x's dtype, and the final state [S, E, N], float32.
    """
    y = torch.zeros_like(x, dtype=torch.float32)
    final = initial_state.float().clone()
    starts = cu_seqlens.tolist()
    for s in range(len(starts) - 1):
        for t in range(starts[s], starts[s + 1]):
            row = slice(t, t + 1)
            y[t] = _step(final[s : s + 1], x[row], dt[row], A, B[row], C[row], D)[0]
    return y.to(x.dtype), final


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
    """Advances each sequence by one token; the cache is updated in place.

    Args:
        state: [slots, E, N], the cache, any float dtype, or int8 with scales; computed in float32,
            y from the state before it is rounded.
        state_indices: [S], slot of each sequence; slot 0 is vLLM's null block (padding rows): its
            content and the row's output are undefined.
        x: [S, E].
        dt: [S, E], float32, after softplus.
        A: [E, N], float32, < 0.
        B: [S, G, N].
        C: [S, H, N].
        D: [E].
        scales: [slots, E], float32, for an int8 cache only; updated in place.
        num_tokens: [S], integer, tokens in each state after this one, for an int8 cache only: the
            noise of its rounding depends on it.

    Returns:
        y [S, E] in x's dtype.
    """
    y = torch.zeros_like(x)
    for s, slot in enumerate(state_indices.tolist()):
        row = slice(s, s + 1)
        here = torch.tensor([slot], device=state.device)
        current = state_codec.read(state, scales, here)
        y[row] = _step(current, x[row], dt[row], A, B[row], C[row], D).to(x.dtype)
        state_codec.write(
            state, scales, here, current, None if num_tokens is None else num_tokens[row]
        )
    return y


def _step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """One token: changes ``state`` [1, E, N] (float32) in place and returns y [1, E]."""
    E = x.shape[1]
    x, dt = x.float(), dt.float()
    B = B.float().repeat_interleave(E // B.shape[1], dim=1)
    C = C.float().repeat_interleave(E // C.shape[1], dim=1)
    state.mul_(torch.exp(dt[..., None] * A))
    state.add_((dt * x)[..., None] * B)
    return (state * C).sum(-1) + D.float() * x
