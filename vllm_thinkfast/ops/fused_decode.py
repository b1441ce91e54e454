"""Decode steps of whole mixers on CPU, from the convolution to the gate: two kernels.

Convolution, step sizes or decays, state update and output, for the mixers whose parts in between
are few. The kernels are those of the operators (``cpu_kernels.py``). With few sequences most of a
layer's time would otherwise go into small tensors and calls of torch.

All tensors are float32; ``can_run`` says it of states and weights, assertions of the rest. Shapes:
S sequences, H heads, G groups, P channels per head, N ssm_state_size, C convolved channels, K
conv_kernel.
"""

import torch

from vllm_thinkfast.ops import compiled
from vllm_thinkfast.ops.backend import OPERATORS
from vllm_thinkfast.ops.causal_conv.cpu import decode_compiled as convolve
from vllm_thinkfast.ops.causal_conv.reference import Activation


def can_run(
    conv_state: torch.Tensor, ssm_state: torch.Tensor, *weights: torch.Tensor | None
) -> bool:
    """Whether these states and weights suit the functions here, and there are kernels."""
    if any(compiled.find_for(operator, ssm_state) is None for operator in OPERATORS):
        return False
    return (
        conv_state.dtype == ssm_state.dtype == torch.float32
        and compiled.has_packed_rows(ssm_state)
        and all(w is None or (w.dtype == torch.float32 and w.is_contiguous()) for w in weights)
    )


def conv_ssd(
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    slots: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    logits: torch.Tensor,
    D: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """One token per sequence: x, B and C are the convolution of u, the decay is sigmoid(-logits).

    Args:
        conv_state: [slots, K - 1, C], updated in place.
        ssm_state: [slots, H, P, N], updated in place.
        slots: [S], integer; rows of slot 0 are skipped.
        u: [S, C], C = H P + 2 G N, contiguous rows.
        weight: [C, K].
        bias: [C] or None.
        activation: "identity" or "silu".
        logits: [S, H], contiguous rows.
        D: [H].
        output: [S, H P], contiguous; written.
    """
    S, C = u.shape
    H, P, N = ssm_state.shape[1:]
    assert logits.shape == (S, H), logits.shape
    assert D.shape == (H,), D.shape
    _check_rows(u, logits)
    assert output.shape == (S, H * P), output.shape
    assert output.is_contiguous()
    slots = slots.to(torch.int32)
    xBC = convolve(_kernel("causal_conv"), conv_state, slots, u, weight, bias, activation)
    bc = (C - H * P) // 2
    assert H % (bc // N) == 0, (H, bc, N)
    x = xBC.data_ptr()
    x_end, B_end = x + 4 * H * P, x + 4 * (H * P + bc)
    _kernel("discrete_ssd")(
        S * H, S * H * P * N, H, P, N, bc // N,
        ssm_state.data_ptr(), ssm_state.stride(0), compiled.FLOAT32,
        slots.data_ptr(), slots.stride(0), 0,
        x, C, logits.data_ptr(), logits.stride(0), x_end, C, B_end, C,
        D.data_ptr(), 1, 0, output.data_ptr(), True,
    )  # fmt: skip


def conv_scan(
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """One token per sequence: x is convolved, the step sizes are softplus(dt + dt_bias).

    Args:
        conv_state: [slots, K - 1, X P], updated in place; X heads of x, each for H / X heads.
        ssm_state: [slots, H P, N], updated in place.
        slots: [S], integer; rows of slot 0 are skipped.
        x: [S, X P], contiguous rows.
        weight: [X P, K].
        bias: [X P] or None.
        activation: "identity" or "silu".
        dt: [S, H P], contiguous rows.
        dt_bias: [H P].
        A: [H P, N].
        B: [S, G N], contiguous rows.
        C: [S, H N], contiguous rows.
        D: [H P].
        output: [S, H P], contiguous; written.
    """
    S, E = dt.shape
    N = A.shape[1]
    H, G = C.shape[1] // N, B.shape[1] // N
    P = E // H
    assert ssm_state.shape[1:] == A.shape == (H * P, N), (ssm_state.shape, A.shape, dt.shape)
    assert len(x) == len(B) == len(C) == S, (x.shape, B.shape, C.shape, dt.shape)
    assert H % G == 0, (H, G)
    assert D.shape == dt_bias.shape == (E,), (D.shape, dt_bias.shape)
    _check_rows(x, dt, B, C)
    assert output.shape == (S, E), output.shape
    assert output.is_contiguous()
    slots = slots.to(torch.int32)
    x = convolve(_kernel("causal_conv"), conv_state, slots, x, weight, bias, activation)
    steps = torch.empty(S, E, dtype=torch.float32, device=dt.device)
    _kernel("selective_scan")(
        S * H, S * E * N, H, P, N, G,
        ssm_state.data_ptr(), ssm_state.stride(0), compiled.FLOAT32,
        slots.data_ptr(), slots.stride(0), 0,
        x.data_ptr(), x.stride(0), dt.data_ptr(), dt.stride(0), A.data_ptr(),
        B.data_ptr(), B.stride(0), C.data_ptr(), C.stride(0),
        D.data_ptr(), output.data_ptr(), x.shape[1] // P, dt_bias.data_ptr(), steps.data_ptr(),
    )  # fmt: skip


def _check_rows(*tensors: torch.Tensor) -> None:
    for t in tensors:
        assert t.dtype == torch.float32, t.dtype
        assert compiled.has_packed_rows(t), (t.shape, t.stride())


def _kernel(operator: str) -> compiled.Kernel:
    kernel = compiled.find(operator)
    assert kernel is not None, operator
    return kernel
