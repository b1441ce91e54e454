"""Sequential oracles of the operators, written from the mathematics; torch only.

They serve as the definition for serving and for training alike: they compute in the dtype of their
arguments (use float64 to be an oracle), loop over tokens, change nothing in place and so have
gradients. Every function accepts any leading batch dimensions and returns its final state, which
continues a sequence when passed back in.

Sources: cartesia-ai/edge ``mixers/discrete_mamba2.py`` (Llamba), jxiw/MambaInLlama ``mamba/`` and
``mamba2/``, state-spaces/mamba ``selective_scan_ref``; each restated, none copied.

Shapes: L tokens, H heads, G groups, P head_dim, N ssm_state_size, E = H P channels, C channels,
K conv_kernel.
"""

import torch


def discrete_ssd(
    x: torch.Tensor,
    decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = decay_t S_{t-1} + x_t (outer) B_t;  y_t = S_t C_t + D x_t.

    Llamba: decay = sigmoid(-a). Mamba-2: decay = exp(dt A), with x already multiplied by dt.

    Args:
        x: [..., L, H, P].
        decay: [..., L, H], 0 to 1.
        B: [..., L, G, N]; head h uses group h // (H / G).
        C: [..., L, G, N].
        D: [H] or [H, P].
        initial_state: [..., H, P, N], zero if None.

    Returns:
        y [..., L, H, P] and the final state [..., H, P, N].
    """
    *batch, L, H, P = x.shape
    G, N = B.shape[-2:]
    group = torch.arange(H, device=x.device) // (H // G)
    B, C = B[..., group, :], C[..., group, :]
    state = x.new_zeros(*batch, H, P, N) if initial_state is None else initial_state
    outputs = [x.new_zeros(*batch, 0, H, P)]
    for t in range(L):
        state = decay[..., t, :, None, None] * state + x[..., t, :, :, None] * B[..., t, :, None, :]
        y = (state * C[..., t, :, None, :]).sum(-1)
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]) * x[..., t, :, :]
        outputs.append(y[..., None, :, :])
    return torch.cat(outputs, dim=-3), state


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per channel: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t;  y_t = <S_t, C_t> + D x_t.

    Args:
        x: [..., L, E].
        dt: [..., L, E], after softplus.
        A: [E, N], negative.
        B: [..., L, G, N]; channel e uses row e // (E / G).
        C: [..., L, H, N]; channel e uses row e // (E / H).
        D: [E].
        initial_state: [..., E, N], zero if None.

    Returns:
        y [..., L, E] and the final state [..., E, N].
    """
    *batch, L, E = x.shape
    channel = torch.arange(E, device=x.device)
    B = B[..., channel // (E // B.shape[-2]), :]
    C = C[..., channel // (E // C.shape[-2]), :]
    state = x.new_zeros(*batch, E, A.shape[1]) if initial_state is None else initial_state
    outputs = [x.new_zeros(*batch, 0, E)]
    for t in range(L):
        decay = torch.exp(dt[..., t, :, None] * A)
        state = decay * state + (dt[..., t, :] * x[..., t, :])[..., None] * B[..., t, :, :]
        y = (state * C[..., t, :, :]).sum(-1) + D * x[..., t, :]
        outputs.append(y[..., None, :])
    return torch.cat(outputs, dim=-2), state


def causal_conv(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    tail: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = act(bias + sum over k of weight[:, k] u_{t - (K - 1) + k}), channel by channel.

    Args:
        u: [..., L, C].
        weight: [C, K]; the last tap multiplies the current input.
        bias: [C].
        activation: "identity" or "silu".
        tail: [..., K - 1, C], the raw inputs before u, zero if None.

    Returns:
        y [..., L, C] and the last K - 1 raw inputs [..., K - 1, C].
    """
    *batch, L, C = u.shape
    K = weight.shape[1]
    inputs = torch.cat([u.new_zeros(*batch, K - 1, C) if tail is None else tail, u], dim=-2)
    outputs = [u.new_zeros(*batch, 0, C)]
    for t in range(L):
        y = sum(weight[:, k] * inputs[..., t + k, :] for k in range(K))
        if bias is not None:
            y = y + bias
        if activation == "silu":
            y = y * torch.sigmoid(y)
        outputs.append(y[..., None, :])
    return torch.cat(outputs, dim=-2), inputs[..., L:, :]


def gated_rms_norm(
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    num_groups: int,
    eps: float,
) -> torch.Tensor:
    """v = y silu(gate), then weight v / sqrt(mean of v^2 over each group + eps).

    Args:
        y: [..., E].
        gate: [..., E].
        weight: [E].
        num_groups: groups of consecutive channels, each with its own mean; MambaInLlama's Mamba-2
            has one per head.
        eps: 1e-5 in every published MambaInLlama checkpoint.

    Returns:
        [..., E].
    """
    v = (y * gate * torch.sigmoid(gate)).unflatten(-1, (num_groups, -1))
    v = v / torch.sqrt((v * v).mean(-1, keepdim=True) + eps)
    return weight * v.flatten(-2)
