"""MambaInLlama for vLLM: Llama layers, most of them with a Mamba-1 or Mamba-2 mixer.

Source: jxiw/MambaInLlama ``mamba/hybrid_wrapper.py``, ``mamba2/hybrid_wrapper.py`` and jxiw/M1
``mamba/hybrid_wrapper.py`` (papers: arXiv 2408.15237, 2504.10449). Attention layers are vLLM's own
Llama layers; whether RoPE is scaled was decided when the configuration was read.
"""

from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsPP,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

from vllm_thinkfast.configs import MambaInLlamaConfig
from vllm_thinkfast.layers.mamba_in_llama import Mamba1Mixer, Mamba2Mixer
from vllm_thinkfast.layers.norm import rms_norm
from vllm_thinkfast.models.base import RecurrentForCausalLM, RecurrentModel

_MIXERS = {"mamba1": Mamba1Mixer, "mamba2": Mamba2Mixer}


class MambaInLlamaBlock(nn.Module):
    """A Llama layer with a mixer in the place of attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Allocates the weights of one block."""
        super().__init__()
        config: MambaInLlamaConfig = vllm_config.model_config.hf_config
        # Mamba blocks take their eps from mamba_config.json, attention blocks from config.json.
        eps = config.mamba_rms_norm_eps
        self.input_layernorm = rms_norm(config.hidden_size, eps=eps)
        self.mamba = _MIXERS[config.mamba_version](config, vllm_config, prefix=f"{prefix}.mamba")
        self.post_attention_layernorm = rms_norm(config.hidden_size, eps=eps)
        self.mlp = LlamaMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=config.mamba_mlp_bias,
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
        hidden_states = self.mamba(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class MambaInLlamaModel(RecurrentModel):
    """Embedding, mamba and attention blocks, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """vLLM's constructor signature; the compile decorator wants it on this class."""
        config: MambaInLlamaConfig = vllm_config.model_config.hf_config
        kept = set(config.attention_layers)

        def make_block(prefix: str) -> nn.Module:
            if extract_layer_index(prefix) in kept:
                layer: nn.Module = LlamaDecoderLayer(vllm_config, prefix)
                for name in ("input_layernorm", "post_attention_layernorm"):
                    setattr(layer, name, rms_norm(config.hidden_size, eps=config.rms_norm_eps))
                return layer
            return MambaInLlamaBlock(vllm_config, prefix)

        super().__init__(vllm_config, prefix, make_block, config.rms_norm_eps)


class MambaInLlamaForCausalLM(RecurrentForCausalLM, HasInnerState, IsHybrid, SupportsPP):
    """MambaInLlama with its language model head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """vLLM's constructor signature."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.config.mamba_version == "mamba1":
            # An adapter of the fused in_proj cannot be used: its step size rows are a layer of
            # their own here. The published separate projections can.
            in_proj = ["in_proj_z", "in_proj_x", "B_proj", "C_proj"]
            self.packed_modules_mapping = {**self.packed_modules_mapping, "in_proj": in_proj}

    def make_model(self, vllm_config: VllmConfig, prefix: str) -> Any:
        """The stack of blocks."""
        return MambaInLlamaModel(vllm_config=vllm_config, prefix=prefix)
