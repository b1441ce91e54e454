"""Mamba-1 selective scan on CPU; same functions and arguments as ``reference.py``.

vLLM's CPU build has no Mamba-1 prefill scan. Decays differ per channel and state, so there is no
matrix form; but exponentials and products of a whole block of tokens can be computed at once, and
what remains sequential is one fused multiply-add per token over all sequences and channels.
"""

import torch

from vllm_thinkfast.ops.packing import padded_blocks

_BLOCK_BYTES = 8 * 2**20
"""Size of one block's [Q, A, E, N] float32 tensors: large enough to amortise calls, small enough
for the caches."""
_MAX_BLOCK = 128


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
    T, E = x.shape
    N = A.shape[1]
    H, G = C.shape[1], B.shape[1]
    state = initial_state.float().clone()
    y = torch.empty(T, E, dtype=torch.float32, device=x.device)
    num_sequences = max(1, len(cu_seqlens) - 1)
    block = _BLOCK_BYTES // (4 * E * N * num_sequences)
    for rows, tokens, is_real in padded_blocks(cu_seqlens, max(1, min(_MAX_BLOCK, block))):
        # Time first, so that the sequential loop walks contiguous memory.
        tokens_t, is_real_t = tokens.T, is_real.T  # [Q, A]
        Q, S = tokens_t.shape
        # Padding tokens have dt = 0: they decay nothing and add nothing.
        dtb = dt[tokens_t].float() * is_real_t[..., None]  # [Q, A, E]
        decay = torch.exp_(dtb[..., None] * A)  # [Q, A, E, N]
        dtx = (dtb * x[tokens_t].float()).view(Q, S, G, E // G, 1)
        states = (dtx * B[tokens_t].float()[..., None, :]).view(Q, S, E, N)
        h = state[rows]
        for q in range(Q):
            h = states[q].addcmul_(decay[q], h)
        state[rows] = h
        per_head = states.view(Q, S, H, E // H, N)
        yb = (per_head @ C[tokens_t].float()[..., None]).view(Q, S, E)
        y[tokens_t[is_real_t]] = yb[is_real_t]
    y += D.float() * x.float()
    return y.to(x.dtype), state


def decode(
    state: torch.Tensor,
    state_indices: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """See ``reference.decode``."""
    S, E = x.shape
    H, G, N = C.shape[1], B.shape[1], A.shape[1]
    xf, dtf = x.float(), dt.float()
    h = state[state_indices].float()  # [S, E, N]
    h *= torch.exp_(dtf[..., None] * A)
    h += ((dtf * xf).view(S, G, E // G, 1) * B.float()[..., None, :]).view(S, E, N)
    y = (h.view(S, H, E // H, N) @ C.float()[..., None]).view(S, E)
    state[state_indices] = h.to(state.dtype)
    return (y + D.float() * xf).to(x.dtype)
