"""Parts that all students share: norms, MLP, short convolution.

Shapes: B rows, L tokens, D hidden_size, C channels, K conv_kernel.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from thinkfast_distill.students.borders import Boundaries
from thinkfast_distill.students.recurrence import compute_dtype

Activation = Literal["identity", "silu"]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        normed = F.rms_norm(x.to(compute_dtype(x.dtype)), x.shape[-1:], None, self.eps)
        return normed.to(x.dtype) * self.weight


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, has_bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=has_bias)
        self.up_proj = nn.Linear(width, inner, bias=has_bias)
        self.down_proj = nn.Linear(inner, width, bias=has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        y: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class ShortConv(nn.Module):
    """Depthwise causal convolution that does not reach over the borders of documents.

    Parameters as in the checkpoints: ``weight`` [C, 1, K], whose last tap multiplies the current
    token, and ``bias`` [C] or none.
    """

    def __init__(self, channels: int, taps: int, has_bias: bool, activation: Activation) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if has_bias else None
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default for ``Conv1d``: uniform within +-1 / sqrt(K)."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]; at least float32 inside, u's dtype out."""
        dtype = compute_dtype(u.dtype)
        wide, weight = u.to(dtype), self.weight[:, 0].to(dtype)
        taps, length = weight.shape[1], u.shape[1]
        y = wide * weight[:, -1]
        for shift in range(1, min(taps, length)):
            reaches = (boundaries.tokens_before >= shift)[..., None]
            earlier = F.pad(wide[:, :-shift], (0, 0, shift, 0)).masked_fill(~reaches, 0)
            y = torch.addcmul(y, earlier, weight[:, -1 - shift])
        if self.bias is not None:
            y = y + self.bias
        if self.activation == "silu":
            y = F.silu(y)
        return y.to(u.dtype)
