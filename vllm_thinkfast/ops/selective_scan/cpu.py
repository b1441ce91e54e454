"""Mamba-1 selective scan on CPU; same functions and arguments as ``reference.py``.

vLLM's CPU build has no Mamba-1 prefill scan. Decays differ per channel and state, so there is no
matrix form; but exponentials and products of a whole block of tokens can be computed at once, and
what remains sequential is one fused multiply-add per token over all sequences and channels. Decode
steps use vLLM's kernel for the update behind the decay, where the build has it.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_thinkfast.ops import vllm_kernels
from vllm_thinkfast.ops.packing import padded_blocks, row_blocks
from vllm_thinkfast.ops.state_codec import reference as state_codec

_BLOCK_BYTES = 2 * 2**20
"""Size of one block's [Q, A, E, N] float32 tensors: large enough to amortise calls, small enough
for the caches. Measured with E 512, N 16, 4096 tokens in 1 to 16 sequences: 2 MiB is the fastest of
0.5 to 16 MiB."""
_MAX_BLOCK = 128
_GATHER_FROM = 24
"""Sequences from which a decode step gathers the states for their decay. Measured on 2 cores with
N 16 and E 384 and 576, against decays in place, row by row: 0.7 to 0.8 times as fast with one
sequence, 0.9 to 1.1 with 16, 1.1 to 1.3 with 64."""
_DECODE_BLOCK_BYTES = 8 * 2**20
"""Size of the states that are gathered at once."""


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
        # Time first, so that the sequential loop walks contiguous memory; what is gathered takes
        # over the memory order of its indices.
        tokens_t, is_real_t = tokens.T.contiguous(), is_real.T  # [Q, A]
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
    scales: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.decode``."""
    xf, dtf, Bf, Cf = x.float(), dt.float(), B.float(), C.float()
    kernel = vllm_kernels.find_state_update(state)
    if kernel is None:
        y = _decode_torch(state, scales, num_tokens, state_indices, dtf * xf, dtf, A, Bf, Cf)
    else:
        y = _decode_kernel(kernel, state, state_indices, dtf * xf, dtf, A, Bf, Cf)
    return y.addcmul_(D.float(), xf).to(x.dtype)


def _decode_kernel(
    kernel: Callable[..., Any],
    state: torch.Tensor,
    state_indices: torch.Tensor,
    dtx: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> torch.Tensor:
    """One token per sequence without D, all inputs float32, dtx = dt x; y [S, E].

    The kernel knows one decay per head, so torch applies Mamba-1's beforehand: to views of the
    cache's rows where they are few, which one thread does, else to gathered ones, which all do.
    Both give the same bits, so that a token does not depend on the other sequences.
    """
    S, E = dtx.shape
    H, G, N = C.shape[1], B.shape[1], A.shape[1]
    assert H % G == 0, (H, G)
    inputs = dtx.view(S, H, E // H)
    Bh = B[:, :, None].expand(S, G, H // G, N).reshape(S, H, N)
    if S < _GATHER_FROM:
        decay = torch.mul(dt[:, :, None], A).exp_()
        torch._foreach_mul_([state[slot] for slot in state_indices.tolist()], decay.unbind(0))
        return _add_inputs(kernel, state, state_indices, inputs, Bh, C)
    y = torch.empty(S, E, dtype=torch.float32)
    for rows in row_blocks(S, 4 * E * N, _DECODE_BLOCK_BYTES):
        slots = state_indices[rows].long()
        num = len(slots)
        gathered = torch.empty(1 + num, E, N, dtype=torch.float32)  # the kernel skips row 0
        h = gathered[1:]
        torch.mul(dt[rows, :, None], A, out=h).exp_().mul_(state.index_select(0, slots))
        numbers = torch.arange(1, 1 + num, dtype=torch.int32)
        y[rows] = _add_inputs(kernel, gathered, numbers, inputs[rows], Bh[rows], C[rows])
        state.index_copy_(0, slots, h)
    return y


def _add_inputs(
    kernel: Callable[..., Any],
    state: torch.Tensor,
    slots: torch.Tensor,
    inputs: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> torch.Tensor:
    """h += inputs (outer) B in place, y = h C; inputs [S, H, P], B and C [S, H, N], y [S, E]."""
    S, H, P = inputs.shape
    heads = state.unflatten(1, (H, P))
    steps = inputs.new_ones(S, H)
    return vllm_kernels.update_state(kernel, heads, slots, inputs, steps, 0.0, B, C).view(S, H * P)


def _decode_torch(
    state: torch.Tensor,
    scales: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    state_indices: torch.Tensor,
    dtx: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> torch.Tensor:
    """One token per sequence without D, all inputs float32, dtx = dt x; y [S, E]."""
    S, E = dtx.shape
    H, G, N = C.shape[1], B.shape[1], A.shape[1]
    y = torch.empty(S, H, E // H, dtype=torch.float32, device=dtx.device)
    for rows in row_blocks(S, 4 * E * N):
        slots = state_indices[rows]
        h = state_codec.read(state, scales, slots)  # [A, E, N]
        h *= torch.mul(dt[rows, :, None], A).exp_()
        inputs = dtx[rows].view(-1, G, E // G, 1)
        h.view(-1, G, E // G, N).addcmul_(inputs, B[rows, :, None])
        state_codec.write(state, scales, slots, h, None if num_tokens is None else num_tokens[rows])
        torch.sum(h.view(-1, H, E // H, N).mul_(C[rows, :, None]), -1, out=y[rows])
    return y.view(S, E)
