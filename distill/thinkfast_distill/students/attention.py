"""Llama's attention on packed rows, for the layers of a hybrid that keep it.

RoPE is transformers' own, with the scaling that the configuration states (a model in the M1 layout
states none). Documents are separated by the mask, positions restart with each.

Shapes: B rows, L tokens, D hidden_size, H query heads.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from thinkfast_distill.students.borders import Boundaries
from vllm_thinkfast.configs import MambaInLlamaConfig


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE; parameters named as Llama's."""

    def __init__(self, config: MambaInLlamaConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        has_bias = config.attention_bias
        self.q_proj = nn.Linear(width, q_size, bias=has_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=has_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=has_bias)
        self.o_proj = nn.Linear(q_size, width, bias=has_bias)
        # No parameters and no persistent buffers, so it does not appear in a state dict.
        self.rotary = LlamaRotaryEmbedding(_rope_config(config))

    def forward(self, u: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        q, k, v = (
            projection(u).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.rotary(q, boundaries.position_ids)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        y = masked_attention(q, k, v, boundaries.visible, repeat_heads=q.is_cuda)
        out: torch.Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    *,
    repeat_heads: bool,
) -> torch.Tensor:
    """Attention of grouped queries under a mask.

    Args:
        q: [B, H, L, P].
        k: [B, G, L, P], a head for each H / G query heads.
        v: [B, G, L, P].
        visible: [B, 1, L, L] bool.
        repeat_heads: copy k and v for every query head. Needed on CUDA, where with both a mask and
            groups only the kernel that builds [B, H, L, L] is left (transformers does the same,
            ``integrations.sdpa_attention.use_gqa_in_sdpa``); elsewhere it costs memory.

    Returns:
        [B, H, L, P].
    """
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and repeat_heads:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        is_grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=is_grouped)


def _rope_config(config: MambaInLlamaConfig) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
