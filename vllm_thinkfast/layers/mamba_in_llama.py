"""MambaInLlama's mixers: Mamba-1 and Mamba-2 with the teacher's grouped heads.

Source: jxiw/MambaInLlama ``mamba/hybrid_mamba_layer.py`` (Mamba-1, also M1's) and
``mamba2/hybrid_mamba_layer.py``. A head is a slice of N = ssm_state_size channels. x and B have G
groups (the teacher's value and key heads), z, C and y have H heads (its query heads); each group
serves H / G consecutive heads.
"""

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from vllm_thinkfast.configs import MambaInLlamaConfig
from vllm_thinkfast.configs.mamba_in_llama import GATED_NORM_EPS
from vllm_thinkfast.layers.recurrent_mixer import Conv, RecurrentMixer, Scan
from vllm_thinkfast.layers.sharded import ShortConv, negative_exp_parameter, sharded_parameter
from vllm_thinkfast.ops import fused_decode


class _MambaInLlamaMixer(RecurrentMixer):
    """Sizes and the repetition that both versions share."""

    mixer_activation = "silu"

    def __init__(self, config: MambaInLlamaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        self.ssm_state_size = config.ssm_state_size
        self.repeats = config.mamba_num_heads // config.mamba_n_groups
        self.repeat_kv_before_conv = config.repeat_kv_before_conv
        # Sizes on this rank.
        self.width = config.mixer_size // self.tp_size
        self.xb = config.xb_size // self.tp_size
        self.num_heads = config.mamba_num_heads // self.tp_size

    def _repeat(self, t: torch.Tensor) -> torch.Tensor:
        """[T, G N] -> [T, H N]: each group of N channels H / G times in a row."""
        if self.repeats == 1:
            return t
        return self._heads(t).repeat_interleave(self.repeats, dim=-2).flatten(-2)

    def _heads(self, t: torch.Tensor) -> torch.Tensor:
        """[T, ? N] -> [T, ?, N]."""
        heads: torch.Tensor = t.unflatten(-1, (-1, self.ssm_state_size))
        return heads


class Mamba1Mixer(_MambaInLlamaMixer):
    """[T, D] -> [T, D]. Only x is convolved; the bias of dt_proj acts twice."""

    scan_operator = "selective_scan"

    def __init__(self, config: MambaInLlamaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        """Allocates the weights; names are those of ``checkpoints.mamba_in_llama``."""
        super().__init__(config, vllm_config, prefix)
        quant_config = vllm_config.quant_config
        width, xb = config.mixer_size, config.xb_size
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [width, xb, xb, width],  # [z, x, B, C]; the dt rows of the file are dt_in_proj
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj",
        )
        # Every rank needs the whole low-rank input of its step sizes.
        self.dt_in_proj = ReplicatedLinear(
            config.hidden_size,
            config.time_step_rank,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.dt_in_proj",
        )
        self.dt_proj = ColumnParallelLinear(
            config.time_step_rank,
            width,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.dt_proj",
        )
        self.conv1d = ShortConv(
            (config.conv_dim,), config.conv_kernel, has_bias=config.use_conv_bias
        )
        self.x_bias = sharded_parameter((xb,)) if config.proj_x_bias else None
        self.z_bias = sharded_parameter((width,)) if config.proj_z_bias else None
        self.A = negative_exp_parameter((width, config.ssm_state_size))
        self.D = sharded_parameter((width,), dtype=torch.float32)
        self.out_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=config.out_proj_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the mixer to [T, D]."""
        projected, _ = self.in_proj(hidden_states)
        z, xBC = projected.split([self.width, 2 * self.xb + self.width], dim=-1)
        dt_low, _ = self.dt_in_proj(hidden_states)
        dt, _ = self.dt_proj(dt_low)
        y = self.mixer_op(xBC, dt, self.width)
        if self.z_bias is not None:
            z = z + self.z_bias
        # The published scan gates in float32 and rounds once.
        gated = (y.float() * F.silu(z.float())).to(y.dtype)
        output, _ = self.out_proj(gated)
        out: torch.Tensor = output
        return out

    def mix(
        self, projected: torch.Tensor, dt: torch.Tensor, conv: Conv, scan: Scan
    ) -> torch.Tensor:
        """See the base class. ``dt`` already holds the bias once."""
        x, B, C = projected.split([self.xb, self.xb, self.width], dim=-1)
        x = conv(self._conv_input(x))
        x = x if self.repeat_kv_before_conv else self._repeat(x)
        # The published code passes dt_proj.bias to the scan as well, after the linear layer added
        # it; the trained weights expect both.
        dt = F.softplus(dt.float() + self.dt_proj.bias.float())
        return scan(x, dt, self.A, self._heads(B), self._heads(C), self.D)

    def _conv_input(self, x: torch.Tensor) -> torch.Tensor:
        if self.x_bias is not None:
            x = x + self.x_bias
        return self._repeat(x) if self.repeat_kv_before_conv else x

    def fusable(self) -> tuple[torch.Tensor | None, ...]:
        """See the base class."""
        return self.conv1d.taps, self.conv1d.bias, self.dt_proj.bias, self.A, self.D

    def fused_decode(
        self,
        projected: torch.Tensor,
        dt: torch.Tensor,
        slots: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See the base class."""
        x, B, C = projected.split([self.xb, self.xb, self.width], dim=-1)
        conv_state, ssm_state, _ = self._states()
        fused_decode.conv_scan(
            conv_state, ssm_state, slots, self._conv_input(x), self.conv1d.taps, self.conv1d.bias,
            self.mixer_activation, dt, self.dt_proj.bias, self.A, B, C, self.D, output,
        )  # fmt: skip


class Mamba2Mixer(_MambaInLlamaMixer):
    """[T, D] -> [T, D]. x, B and C are convolved; gated RMS norm per head."""

    scan_operator = "discrete_ssd"

    def __init__(self, config: MambaInLlamaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        """Allocates the weights; names are those of ``checkpoints.mamba_in_llama``."""
        super().__init__(config, vllm_config, prefix)
        quant_config = vllm_config.quant_config
        width, xb, num_heads = config.mixer_size, config.xb_size, config.mamba_num_heads
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [width, xb, xb, width, num_heads],  # [z, x, B, C, dt]
            bias=config.use_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj",
        )
        conv_xb = width if config.repeat_kv_before_conv else xb
        self.conv1d = ShortConv(
            (conv_xb, conv_xb, width), config.conv_kernel, has_bias=config.use_conv_bias
        )
        self.conv_xb = conv_xb // self.tp_size
        self.dt_bias = sharded_parameter((num_heads,), dtype=torch.float32)
        self.A = negative_exp_parameter((num_heads,))
        self.has_d_per_channel = config.d_has_head_dim
        self.D = sharded_parameter(
            (width if config.d_has_head_dim else num_heads,), dtype=torch.float32
        )
        self.norm_before_gate = config.norm_before_gate
        self.norm = _NormWeight(width) if config.use_gated_norm else None
        self.time_step_limit = config.time_step_limit
        self.out_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=config.use_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the mixer to [T, D]."""
        projected, _ = self.in_proj(hidden_states)
        z, xBC, dt = projected.split([self.width, 2 * self.xb + self.width, self.num_heads], dim=-1)
        y = self.mixer_op(xBC, dt, self.width)
        output, _ = self.out_proj(self._gated_norm(y, z))
        out: torch.Tensor = output
        return out

    def mix(
        self, projected: torch.Tensor, dt: torch.Tensor, conv: Conv, scan: Scan
    ) -> torch.Tensor:
        """See the base class."""
        if self.repeat_kv_before_conv:
            x, B, C = projected.split([self.xb, self.xb, self.width], dim=-1)
            projected = torch.cat([self._repeat(x), self._repeat(B), C], dim=-1)
        xBC = conv(projected)
        x, B, C = xBC.split([self.conv_xb, self.conv_xb, self.width], dim=-1)
        if not self.repeat_kv_before_conv:
            x, B = self._repeat(x), self._repeat(B)
        dt = F.softplus(dt.float() + self.dt_bias)
        if self.time_step_limit is not None:
            dt = dt.clamp(*self.time_step_limit)
        heads = self._heads(x)
        # The scan in its discrete form: the input carries dt, D sees x itself.
        y = scan(heads.float() * dt[..., None], dt * self.A, self._heads(B), self._heads(C), None)
        D = self.D.view(self.num_heads, -1)
        y = y + D * heads.float()
        return y.flatten(-2).to(projected.dtype)

    def _gated_norm(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Gate, then RMS norm over each head's N channels, in float32."""
        y_heads, gate = self._heads(y.float()), F.silu(self._heads(z.float()))
        if self.norm is None:
            return (y_heads * gate).flatten(-2).to(y.dtype)
        if not self.norm_before_gate:
            y_heads = y_heads * gate
        y_heads = y_heads * torch.rsqrt(y_heads.square().mean(-1, keepdim=True) + GATED_NORM_EPS)
        y_heads = y_heads * self._heads(self.norm.weight.float())
        if self.norm_before_gate:
            y_heads = y_heads * gate
        return y_heads.flatten(-2).to(y.dtype)


class _NormWeight(torch.nn.Module):
    """Weight of the gated norm, under its published name ``norm.weight``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = sharded_parameter((width,))
