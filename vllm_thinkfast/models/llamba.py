"""Llamba for vLLM: discrete Mamba-2 mixers and Llama MLPs, no attention.

Source: cartesia-ai/edge ``cartesia_pytorch/Llamba/llamba.py`` (paper: arXiv 2502.14458).
"""

from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsPP,
)
from vllm.model_executor.models.llama import LlamaMLP

from vllm_thinkfast.configs import LlambaConfig
from vllm_thinkfast.layers.discrete_mamba2 import DiscreteMamba2Mixer
from vllm_thinkfast.layers.norm import rms_norm
from vllm_thinkfast.models.base import RecurrentForCausalLM, RecurrentModel


class LlambaBlock(nn.Module):
    """h += mixer(norm(h)); h += mlp(norm(h)); the norms have eps 1e-5 in every checkpoint."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Allocates the weights of one block."""
        super().__init__()
        config: LlambaConfig = vllm_config.model_config.hf_config
        self.input_layernorm = rms_norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = DiscreteMamba2Mixer(config, vllm_config, prefix=f"{prefix}.mixer")
        self.post_attention_layernorm = rms_norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mlp",
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [T, D], residual [T, D] or None) -> the same after the block."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.mixer(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class LlambaModel(RecurrentModel):
    """Embedding, Llamba blocks, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """vLLM's constructor signature; the compile decorator wants it on this class."""
        config: LlambaConfig = vllm_config.model_config.hf_config
        super().__init__(
            vllm_config,
            prefix,
            lambda prefix: LlambaBlock(vllm_config, prefix),
            config.final_norm_eps,
        )


class LlambaForCausalLM(RecurrentForCausalLM, HasInnerState, IsAttentionFree, SupportsPP):
    """Llamba with its language model head."""

    def make_model(self, vllm_config: VllmConfig, prefix: str) -> Any:
        """The stack of blocks."""
        return LlambaModel(vllm_config=vllm_config, prefix=prefix)
