"""Short causal convolution, token by token: what the fast backends are tested against.

Per channel, with taps w_0 .. w_{K-1} (w_{K-1} multiplies the current token) and raw inputs u::

    y_t = act(bias + sum_k w_k u_{t-K+1+k})

Inputs before the start of a sequence come from its cached state, the last K - 1 raw inputs, or are
zero. vLLM caches K - 1 inputs; the published Llamba code keeps K and never uses the oldest.

Shapes: T packed tokens, S sequences, C channels, K conv_kernel.
"""

from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["identity", "silu"]


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
    """Convolves whole sequences and stores each one's last K - 1 inputs.

    Args:
        u: [T, C], any float dtype.
        weight: [C, K].
        bias: [C] or None.
        activation: applied to the result.
        state: [slots, K - 1, C], the cache, updated in place; it need not be contiguous.
        state_indices: [S], slot of each sequence.
        has_initial_state: [S], bool; where false the slot's content is ignored.
        cu_seqlens: [S + 1], integer offsets of the sequences in T.

    Returns:
        y [T, C] in u's dtype.
    """
    y = torch.zeros_like(u)
    starts, slots = cu_seqlens.tolist(), state_indices.tolist()
    for s, slot in enumerate(slots):
        tail = (
            state[slot].float() if has_initial_state[s] else torch.zeros_like(state[slot]).float()
        )
        for t in range(starts[s], starts[s + 1]):
            window = torch.cat([tail, u[t : t + 1].float()])  # [K, C]
            y[t] = _window_sum(window[None], weight, bias, activation)[0].to(u.dtype)
            tail = window[1:]
        if starts[s + 1] > starts[s]:
            state[slot] = tail.to(state.dtype)
    return y


def decode(
    state: torch.Tensor,
    state_indices: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """Convolves one token per sequence; the cache is updated in place.

    Args:
        state: [slots, K - 1, C]; it need not be contiguous.
        state_indices: [S]; slot 0 is vLLM's null block (padding rows): its content and the row's
            output are undefined.
        u: [S, C].
        weight: [C, K].
        bias: [C] or None.
        activation: applied to the result.

    Returns:
        y [S, C] in u's dtype.
    """
    y = torch.zeros_like(u)
    for s, slot in enumerate(state_indices.tolist()):
        window = torch.cat([state[slot].float(), u[s : s + 1].float()])
        y[s] = _window_sum(window[None], weight, bias, activation)[0].to(u.dtype)
        state[slot] = window[1:].to(state.dtype)
    return y


def _window_sum(
    windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """windows [S, K, C] (float32) -> [S, C] (float32)."""
    y = (windows * weight.float().T).sum(1)
    if bias is not None:
        y = y + bias.float()
    return F.silu(y) if activation == "silu" else y
