"""Short causal convolution on CPU; same functions and arguments as ``reference.py``.

All sequences of a batch are laid out behind their cached tails in one buffer and convolved by one
call; results whose window crosses a border are never read. Decode steps use vLLM's kernel where the
build has it and the dtypes suit it.
"""

import torch
import torch.nn.functional as F

from vllm_thinkfast.ops import vllm_kernels
from vllm_thinkfast.ops.causal_conv.reference import Activation


def prefill(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """See ``reference.prefill``."""
    T, C = u.shape
    K = weight.shape[1]
    S = len(state_indices)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    # Sequence s begins, with its tail, at row cu_seqlens[s] + s (K - 1).
    begin = cu_seqlens[:-1].long() + torch.arange(S, device=u.device) * (K - 1)
    tail_rows = begin[:, None] + torch.arange(K - 1, device=u.device)
    sequence = torch.repeat_interleave(torch.arange(S, device=u.device), lengths)
    token_rows = torch.arange(T, device=u.device) + (sequence + 1) * (K - 1)
    buffer = torch.empty(T + S * (K - 1), C, dtype=torch.float32, device=u.device)
    # A slot without a valid state may hold anything, NaN too: mask, do not multiply.
    tails = state[state_indices].float().masked_fill(~has_initial_state[:, None, None], 0.0)
    buffer[tail_rows] = tails
    buffer[token_rows] = u.float()
    taps = weight.float()
    y = buffer[K - 1 :] * taps[:, K - 1]
    for k in range(K - 1):
        y.addcmul_(buffer[k : k + len(y)], taps[:, k])
    y = y[token_rows - (K - 1)]
    if bias is not None:
        y += bias.float()
    if activation == "silu":
        y = F.silu(y, inplace=True)
    has_tokens = lengths > 0
    last_rows = (begin + lengths)[:, None] + torch.arange(K - 1, device=u.device)
    state[state_indices[has_tokens]] = buffer[last_rows[has_tokens]].to(state.dtype)
    return y.to(u.dtype)


def decode(
    state: torch.Tensor,
    state_indices: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See ``reference.decode``."""
    if vllm_kernels.can_update_conv(state, u, weight, activation):
        kernel = vllm_kernels.find(vllm_kernels.CONV_UPDATE)
        if kernel is not None:
            return vllm_kernels.update_conv(
                kernel, state, state_indices, u, weight, bias, activation
            )
    tails = state.index_select(0, state_indices).float()
    window = torch.cat([tails, u.float()[:, None]], dim=1)  # [S, K, C]
    state[state_indices] = window[:, 1:].to(state.dtype)
    # Taps outermost, so that every product walks contiguous channels.
    y = window.mul_(weight.float().T.contiguous()).sum(1)
    if bias is not None:
        y += bias.float()
    if activation == "silu":
        y = F.silu(y, inplace=True)
    return y.to(u.dtype)
