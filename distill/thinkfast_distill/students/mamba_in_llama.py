"""Mixers of MambaInLlama (jxiw/MambaInLlama ``mamba/`` and ``mamba2/hybrid_mamba_layer.py``).

Easy to miss: ``dt_proj.bias`` of Mamba-1 acts twice; x and B are repeated in consecutive blocks of
``ssm_state_size`` channels; the gated norm of Mamba-2 works per head with eps 1e-5 whatever the
configuration says.

Shapes: B rows, L tokens, D hidden_size, H heads, G groups of x and B, N ssm_state_size, which is
also the width of a head, E = H N.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from thinkfast_distill.students.backends import Backend, selective_scan_backend, ssd_backend
from thinkfast_distill.students.borders import Boundaries
from thinkfast_distill.students.common import ShortConv
from thinkfast_distill.students.llamba import slices
from thinkfast_distill.students.recurrence import compute_dtype, ssd_matrix
from vllm_thinkfast.configs import MambaInLlamaConfig

GATED_NORM_EPS = 1e-5
TIME_STEP_RANGE = (1e-3, 1e-1)
"""Step sizes of a fresh mixer, drawn log-uniformly."""
TIME_STEP_FLOOR = 1e-4


class Mamba1(nn.Module):
    """[B, L, D] -> [B, L, D]; parameters named as in ``checkpoints.mamba_in_llama``."""

    def __init__(self, config: MambaInLlamaConfig, backend: Backend) -> None:
        super().__init__()
        self.num_heads, self.n_groups = config.mamba_num_heads, config.mamba_n_groups
        self.ssm_state_size = config.ssm_state_size
        self.mixer_size, self.xb_size = config.mixer_size, config.xb_size
        self.rank = config.time_step_rank
        self.repeat_kv_before_conv = config.repeat_kv_before_conv
        width = config.hidden_size
        rows = 2 * self.mixer_size + 2 * self.xb_size + self.rank
        self.in_proj = nn.Linear(width, rows, bias=False)
        self.x_bias = nn.Parameter(torch.zeros(self.xb_size)) if config.proj_x_bias else None
        self.z_bias = nn.Parameter(torch.zeros(self.mixer_size)) if config.proj_z_bias else None
        self.conv1d = ShortConv(config.conv_dim, config.conv_kernel, config.use_conv_bias, "silu")
        self.dt_proj = nn.Linear(self.rank, self.mixer_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.mixer_size, self.ssm_state_size))
        self.D = nn.Parameter(torch.ones(self.mixer_size))
        self.out_proj = nn.Linear(self.mixer_size, width, bias=config.out_proj_bias)
        self._scan = selective_scan_backend(backend)
        self.reset_recurrence()

    def reset_recurrence(self) -> None:
        """Fresh A, D and step sizes, as the published conversion.

        A is S4D-real, ``A_log[e, n] = log(n + 1)``; D is one; ``dt_proj.weight`` is uniform within
        ``rank ** -0.5``; ``dt_proj.bias`` is softplus^-1 of a log-uniform step size. Because the
        bias acts twice, the step sizes of a published conversion are about the square of that:
        softplus(2 b) with b = log(expm1(dt)). That is kept: the model trains from it.
        """
        with torch.no_grad():
            steps = torch.arange(1, self.ssm_state_size + 1, dtype=torch.float32)
            self.A_log.copy_(steps.log().expand_as(self.A_log))
            self.D.fill_(1.0)
            nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
            self.dt_proj.bias.copy_(fresh_time_step_bias(self.mixer_size))

    def rows(self) -> dict[str, slice]:
        """Rows of in_proj that belong to each part: [z | x | B | C | dt]."""
        sizes = {
            "z": self.mixer_size,
            "x": self.xb_size,
            "B": self.xb_size,
            "C": self.mixer_size,
            "dt": self.rank,
        }
        return slices(sizes)

    def forward(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """Output of the mixer for its normed input."""
        z, x, B, C, dt = self.in_proj(u).split(
            [self.mixer_size, self.xb_size, self.xb_size, self.mixer_size, self.rank], dim=-1
        )
        if self.x_bias is not None:
            x = x + self.x_bias
        if self.z_bias is not None:
            z = z + self.z_bias
        times, state = self.num_heads // self.n_groups, self.ssm_state_size
        if self.repeat_kv_before_conv:
            x = self.conv1d(repeat_blocks(x, state, times), boundaries)
        else:
            x = repeat_blocks(self.conv1d(x, boundaries), state, times)
        dtype = compute_dtype(u.dtype)
        # The bias is in the projection and is added again, in float32.
        dt = F.softplus(self.dt_proj(dt).to(dtype) + self.dt_proj.bias)
        y = self._scan(
            x,
            dt,
            -self.A_log.to(dtype).exp(),
            B.unflatten(-1, (self.n_groups, state)),
            C.unflatten(-1, (self.num_heads, state)),
            boundaries,
        )
        y = (y + self.D * x) * F.silu(z.to(dtype))
        out: torch.Tensor = self.out_proj(y.to(u.dtype))
        return out

    def matrix(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """Always raises ValueError."""
        raise ValueError(
            "matrix_mixing: Mamba-1 decays every channel and state at its own rate, so a head has "
            "no single mixing matrix to compare with attention; use mamba_version: mamba2, or "
            "begin with hidden_state."
        )


class Mamba2(nn.Module):
    """[B, L, D] -> [B, L, D]; parameters named as in ``checkpoints.mamba_in_llama``."""

    def __init__(self, config: MambaInLlamaConfig, backend: Backend) -> None:
        super().__init__()
        self.num_heads, self.n_groups = config.mamba_num_heads, config.mamba_n_groups
        self.ssm_state_size = config.ssm_state_size
        self.mixer_size, self.xb_size = config.mixer_size, config.xb_size
        self.repeat_kv_before_conv = config.repeat_kv_before_conv
        self.norm_before_gate = config.norm_before_gate
        self.time_step_limit = config.time_step_limit
        width = config.hidden_size
        rows = 2 * self.mixer_size + 2 * self.xb_size + self.num_heads
        self.in_proj = nn.Linear(width, rows, bias=config.use_bias)
        self.conv1d = ShortConv(config.conv_dim, config.conv_kernel, config.use_conv_bias, "silu")
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        skips = self.mixer_size if config.d_has_head_dim else self.num_heads
        self.D = nn.Parameter(torch.ones(skips))
        self.norm = HeadNorm(self.mixer_size) if config.use_gated_norm else None
        self.out_proj = nn.Linear(self.mixer_size, width, bias=config.use_bias)
        self._ssd = ssd_backend(backend)
        self.reset_recurrence()

    def reset_recurrence(self) -> None:
        """Fresh A, D, step sizes and norm, as the published conversion.

        A is uniform within [1, 16] per head (``A_log`` its logarithm), D and the norm are one,
        ``dt_bias`` is softplus^-1 of a log-uniform step size.
        """
        with torch.no_grad():
            self.A_log.uniform_(1.0, 16.0).log_()
            self.D.fill_(1.0)
            self.dt_bias.copy_(fresh_time_step_bias(self.num_heads))
            if self.norm is not None:
                self.norm.weight.fill_(1.0)

    def rows(self) -> dict[str, slice]:
        """Rows of in_proj that belong to each part: [z | x | B | C | dt]."""
        sizes = {
            "z": self.mixer_size,
            "x": self.xb_size,
            "B": self.xb_size,
            "C": self.mixer_size,
            "dt": self.num_heads,
        }
        return slices(sizes)

    def forward(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """Output of the mixer for its normed input."""
        z, x, B, C, dt, log_decay = self._project(u, boundaries)
        y = self._ssd(x * dt[..., None], log_decay, B, C, boundaries)
        y = y + self.D.reshape(self.num_heads, -1) * x
        gate = F.silu(z.to(y.dtype)).unflatten(-1, (self.num_heads, -1))
        if self.norm is None:
            y = y * gate
        elif self.norm_before_gate:
            y = self.norm(y) * gate
        else:
            y = self.norm(y * gate)
        out: torch.Tensor = self.out_proj(y.flatten(2).to(u.dtype))
        return out

    def matrix(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """T [B, H, L, L] with y = T x for each head: step sizes inside, D on the diagonal.

        Raises:
            ValueError: D differs inside a head, which no single matrix per head can express.
        """
        if self.D.shape[0] != self.num_heads:
            raise ValueError(
                "matrix_mixing: d_has_head_dim=True gives each channel its own skip D, so a head "
                "has no single mixing matrix; use d_has_head_dim=False."
            )
        _, _, B, C, dt, log_decay = self._project(u, boundaries)
        matrix = ssd_matrix(log_decay, B * dt[..., None], C, boundaries.segments)
        skip = torch.eye(u.shape[1], device=u.device, dtype=matrix.dtype)
        return matrix + self.D[:, None, None] * skip

    def _project(self, u: torch.Tensor, boundaries: Boundaries) -> tuple[torch.Tensor, ...]:
        z, x, B, C, dt = self.in_proj(u).split(
            [self.mixer_size, self.xb_size, self.xb_size, self.mixer_size, self.num_heads], dim=-1
        )
        times, state = self.num_heads // self.n_groups, self.ssm_state_size
        if self.repeat_kv_before_conv:
            x, B = repeat_blocks(x, state, times), repeat_blocks(B, state, times)
        sizes = [x.shape[-1], B.shape[-1], self.mixer_size]
        x, B, C = self.conv1d(torch.cat([x, B, C], -1), boundaries).split(sizes, dim=-1)
        if not self.repeat_kv_before_conv:
            x, B = repeat_blocks(x, state, times), repeat_blocks(B, state, times)
        x, B, C = (t.unflatten(-1, (self.num_heads, state)) for t in (x, B, C))
        dtype = compute_dtype(dt.dtype)
        dt = F.softplus(dt.to(dtype) + self.dt_bias)
        if self.time_step_limit is not None:
            dt = dt.clamp(*self.time_step_limit)
        return z, x, B, C, dt, -dt * self.A_log.to(dtype).exp()


class HeadNorm(nn.Module):
    """RMS norm over each head by itself, [..., H, N]; one weight per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """[..., H, N] -> [..., H, N]."""
        normed = F.rms_norm(y, y.shape[-1:], None, GATED_NORM_EPS)
        return normed * self.weight.view(y.shape[-2:])


def repeat_blocks(t: torch.Tensor, width: int, times: int) -> torch.Tensor:
    """Repeats each consecutive block of ``width`` channels ``times`` times in a row."""
    if times == 1:
        return t
    repeated: torch.Tensor = t.unflatten(-1, (-1, width)).repeat_interleave(times, dim=-2)
    return repeated.flatten(-2)


def fresh_time_step_bias(size: int) -> torch.Tensor:
    """softplus^-1 of step sizes, log-uniform in ``TIME_STEP_RANGE``, [size]."""
    low, high = (math.log(limit) for limit in TIME_STEP_RANGE)
    steps = (torch.rand(size) * (high - low) + low).exp().clamp_min(TIME_STEP_FLOOR)
    # x + log(-expm1(-x)) = log(expm1(x)), without the loss of digits at small x.
    return steps + torch.log(-torch.expm1(-steps))
