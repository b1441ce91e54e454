"""Mamba-1 selective scan on CPU: a compiled kernel (``cpu_kernels.py``), or torch without one.

Same functions and arguments as ``reference.py``. The kernel goes token by token with a head's state
in the caches. Decays differ per channel and state, so there is no matrix form; but torch computes
exponentials and products of a whole block of tokens at once, and what remains sequential is one
fused multiply-add per token over all sequences and channels.
"""

import torch

from vllm_thinkfast.ops import compiled
from vllm_thinkfast.ops.packing import padded_blocks, row_blocks
from vllm_thinkfast.ops.state_codec import reference as state_codec

_BLOCK_BYTES = 2 * 2**20
"""Size of one block's [Q, A, E, N] float32 tensors: large enough to amortise calls, small enough
for the caches. Measured with E 512, N 16, 4096 tokens in 1 to 16 sequences: 2 MiB is the fastest of
0.5 to 16 MiB."""
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
    state = initial_state.float().clone(memory_format=torch.contiguous_format)
    kernel = compiled.find_for("selective_scan", state)
    if kernel is not None:
        return _run_compiled(kernel, state, None, cu_seqlens, x, dt, A, B, C, D), state
    y = _prefill_torch(state, x, dt, A, B, C, cu_seqlens)
    y += D.float() * x.float()
    return y.to(x.dtype), state


def _prefill_torch(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Whole sequences without D; y [T, E], float32, and ``state`` at their ends."""
    T, E = x.shape
    N = A.shape[1]
    H, G = C.shape[1], B.shape[1]
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
    return y


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
    kernel = compiled.find_for("selective_scan", state)
    if kernel is not None and compiled.has_packed_rows(state):
        return _run_compiled(kernel, state, state_indices, None, x, dt, A, B, C, D)
    xf, dtf, Bf, Cf = x.float(), dt.float(), B.float(), C.float()
    y = _decode_torch(state, scales, num_tokens, state_indices, dtf * xf, dtf, A, Bf, Cf)
    return y.addcmul_(D.float(), xf).to(x.dtype)


def _run_compiled(
    kernel: compiled.Kernel,
    state: torch.Tensor,
    state_indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """Sequences in these slots, or one in each, with the tokens between offsets, or one each.

    Updates ``state`` [slots, E, N], of any float dtype, in place; returns y [T, E].
    """
    T, E = x.shape
    S, slots, starts = compiled.sequence_indices(state, state_indices, cu_seqlens, T)
    H, N = C.shape[1:]
    G = B.shape[1]
    assert state.shape[1:] == A.shape == (E, N), (state.shape, A.shape, x.shape, C.shape)
    assert dt.shape == x.shape, (dt.shape, x.shape)
    assert B.shape == (T, G, N), (B.shape, C.shape)
    assert D.shape == (E,), D.shape
    assert E % H == 0, (E, H)
    assert H % G == 0, (H, G)
    xf, dtf = compiled.float_rows(x), compiled.float_rows(dt)
    Bf, Cf = compiled.float_rows(B), compiled.float_rows(C)
    Af, Df = A.float().contiguous(), D.float().contiguous()
    y = torch.empty(T, E, dtype=torch.float32, device=x.device)
    kernel(
        S * H, T * E * N, H, E // H, N, G,
        state.data_ptr(), state.stride(0), compiled.DTYPES[state.dtype],
        *compiled.address_and_stride(slots), compiled.address(starts),
        xf.data_ptr(), xf.stride(0), dtf.data_ptr(), dtf.stride(0), Af.data_ptr(),
        Bf.data_ptr(), Bf.stride(0), Cf.data_ptr(), Cf.stride(0),
        Df.data_ptr(), y.data_ptr(), H, 0, 0,
        is_even=starts is None,
    )  # fmt: skip
    return y.to(x.dtype)


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
