"""Llamba's mixer: Mamba-2 without step size, the decay is a sigmoid of a projection.

Source: cartesia-ai/edge ``mixers/discrete_mamba2.py``. What differs from Mamba-2: the convolution
has no activation by default, the input is not scaled by dt, D is applied outside the recurrence,
there is no norm before out_proj, and the gate has a bias.
"""

from typing import cast

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from vllm_thinkfast.configs import LlambaConfig
from vllm_thinkfast.layers.recurrent_mixer import Conv, RecurrentMixer, Scan
from vllm_thinkfast.layers.sharded import ShortConv, sharded_parameter
from vllm_thinkfast.ops import fused_decode
from vllm_thinkfast.ops.causal_conv.reference import Activation


class DiscreteMamba2Mixer(RecurrentMixer):
    """[T, D] -> [T, D]. H heads of width P, G groups of B and C of width N."""

    scan_operator = "discrete_ssd"

    def __init__(self, config: LlambaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        """Allocates the weights; names are those of ``checkpoints.llamba``."""
        super().__init__(vllm_config, prefix)
        quant_config = vllm_config.quant_config
        width, bc = config.mixer_size, config.bc_size
        # The configuration has checked the value.
        self.mixer_activation = cast("Activation", config.mixer_activation)
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [width, bc, bc, width, config.num_heads],  # [x B C (conv), z, dt_logits]
            bias=config.use_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj",
        )
        self.conv1d = ShortConv((width, bc, bc), config.conv_kernel, has_bias=config.use_conv_bias)
        self.z_bias = None if config.use_bias else sharded_parameter((width,))
        self.D = sharded_parameter((config.num_heads,), dtype=torch.float32)
        self.out_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=config.use_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self.head_dim, self.ssm_state_size = config.head_dim, config.ssm_state_size
        # Sizes on this rank.
        self.width, self.bc = width // self.tp_size, bc // self.tp_size
        self.num_heads = config.num_heads // self.tp_size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the mixer to [T, D]."""
        projected, _ = self.in_proj(hidden_states)
        xBC, z, dt_logits = projected.split(
            [self.width + 2 * self.bc, self.width, self.num_heads], dim=-1
        )
        y = self.mixer_op(xBC, dt_logits, self.width)
        if self.z_bias is not None:
            z = z + self.z_bias
        output, _ = self.out_proj(y * F.silu(z))
        out: torch.Tensor = output
        return out

    def mix(
        self, projected: torch.Tensor, dt: torch.Tensor, conv: Conv, scan: Scan
    ) -> torch.Tensor:
        """See the base class. ``dt`` holds the logits that the published code calls A_log."""
        x, B, C = conv(projected).split([self.width, self.bc, self.bc], dim=-1)
        # log sigmoid(-a); the published form divides x by softplus(a), which overflows.
        log_decay = -F.softplus(dt.float())
        num_tokens = len(x)
        y = scan(
            x.view(num_tokens, self.num_heads, self.head_dim),
            log_decay,
            B.view(num_tokens, -1, self.ssm_state_size),
            C.view(num_tokens, -1, self.ssm_state_size),
            self.D,
        )
        return y.flatten(-2)

    def fusable(self) -> tuple[torch.Tensor | None, ...]:
        """See the base class."""
        return self.conv1d.taps, self.conv1d.bias, self.D

    def fused_decode(
        self,
        projected: torch.Tensor,
        dt: torch.Tensor,
        slots: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See the base class."""
        conv_state, ssm_state, _ = self._states()
        fused_decode.conv_ssd(
            conv_state, ssm_state, slots, projected, self.conv1d.taps, self.conv1d.bias,
            self.mixer_activation, dt, self.D, output,
        )  # fmt: skip
