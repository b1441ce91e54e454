"""Llamba's mixer: discrete Mamba-2 (cartesia-ai/edge ``mixers/discrete_mamba2.py``).

The decay is a sigmoid of a projection and the input is not scaled; the published code divides x by
softplus(a) and lets a Mamba-2 kernel multiply it back, here the factor is cancelled.

Shapes: B rows, L tokens, D hidden_size, H heads, G groups, P head_dim, N ssm_state_size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from thinkfast_distill.students.backends import Backend, ssd_backend
from thinkfast_distill.students.borders import Boundaries
from thinkfast_distill.students.common import Activation, ShortConv
from thinkfast_distill.students.recurrence import compute_dtype, ssd_matrix
from vllm_thinkfast.configs import LlambaConfig


class DiscreteMamba2(nn.Module):
    """[B, L, D] -> [B, L, D]; parameters named as in ``checkpoints.llamba``."""

    def __init__(self, config: LlambaConfig, backend: Backend) -> None:
        super().__init__()
        self.num_heads, self.n_groups = config.num_heads, config.n_groups
        self.head_dim, self.ssm_state_size = config.head_dim, config.ssm_state_size
        self.mixer_size, self.bc_size = config.mixer_size, config.bc_size
        width, conv = config.hidden_size, config.conv_dim
        rows = conv + self.mixer_size + self.num_heads
        self.in_proj = nn.Linear(width, rows, bias=config.use_bias)
        activation: Activation = "silu" if config.mixer_activation == "silu" else "identity"
        self.conv1d = ShortConv(conv, config.conv_kernel, config.use_conv_bias, activation)
        self.z_bias = None if config.use_bias else nn.Parameter(torch.empty(self.mixer_size))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.out_proj = nn.Linear(self.mixer_size, width, bias=config.use_bias)
        self._ssd = ssd_backend(backend)
        self.reset_recurrence()

    def reset_recurrence(self) -> None:
        """D one, gate bias zero; the decay is a projection and has nothing of its own."""
        with torch.no_grad():
            self.D.fill_(1.0)
            if self.z_bias is not None:
                self.z_bias.zero_()

    def rows(self) -> dict[str, slice]:
        """Rows of in_proj that belong to each part: [x B C (convolved) | z | dt_logits]."""
        sizes = {
            "x": self.mixer_size,
            "B": self.bc_size,
            "C": self.bc_size,
            "z": self.mixer_size,
            "dt": self.num_heads,
        }
        return slices(sizes)

    def forward(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """Output of the mixer for its normed input."""
        x, B, C, z, log_decay = self._project(u, boundaries)
        y = self._ssd(x, log_decay, B, C, boundaries)
        y = y + self.D[:, None] * x
        if self.z_bias is not None:
            z = z + self.z_bias
        out: torch.Tensor = self.out_proj(y.flatten(2).to(u.dtype) * F.silu(z))
        return out

    def matrix(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """T [B, H, L, L] with y = T x for each head, the skip D on the diagonal."""
        _, B, C, _, log_decay = self._project(u, boundaries)
        matrix = ssd_matrix(log_decay, B, C, boundaries.segments)
        skip = torch.eye(u.shape[1], device=u.device, dtype=matrix.dtype)
        return matrix + self.D[:, None, None] * skip

    def _project(self, u: torch.Tensor, boundaries: Boundaries) -> tuple[torch.Tensor, ...]:
        conv_dim = self.mixer_size + 2 * self.bc_size
        xbc, z, dt_logits = self.in_proj(u).split(
            [conv_dim, self.mixer_size, self.num_heads], dim=-1
        )
        x, B, C = self.conv1d(xbc, boundaries).split(
            [self.mixer_size, self.bc_size, self.bc_size], dim=-1
        )
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        times = self.num_heads // self.n_groups
        B, C = (
            t.unflatten(-1, (self.n_groups, -1)).repeat_interleave(times, dim=-2) for t in (B, C)
        )
        # log sigmoid(-a) = -softplus(a), in float32: decays close to 1 have no digits in bfloat16.
        log_decay = F.logsigmoid(-dt_logits.to(compute_dtype(dt_logits.dtype)))
        return x, B, C, z, log_decay


def slices(sizes: dict[str, int]) -> dict[str, slice]:
    """Consecutive slices of the given sizes."""
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = slice(start, start + size)
        start += size
    return found
