"""A Llama trained from scratch with the same loop, to be a teacher where none is at hand.

The model is transformers' own ``LlamaForCausalLM``; this class only gives it the root methods that
stages call. Packed rows are separated by a block-causal mask and positions that restart with each
document. Parameter names are those of the Hugging Face checkpoint.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from thinkfast_distill.batch import PackedBatch


class LlamaStudent(nn.Module):
    """Llama with the root methods of a student.

    Shapes: B rows, L tokens, D width, V vocabulary.
    """

    def __init__(self, config: LlamaConfig) -> None:
        """Args: config: sizes; weights are drawn from transformers' initialisation."""
        super().__init__()
        whole = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        self.config = config
        self.model = whole.model
        self.lm_head = whole.lm_head

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, L, D) of token ids (B, L)."""
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states (B, L, D) after the final norm."""
        allowed = batch.same_document()[:, None]
        # The smallest number instead of -inf: a row of padding attends to nothing and must stay
        # finite.
        mask = torch.zeros(allowed.shape, dtype=self.lm_head.weight.dtype, device=allowed.device)
        mask.masked_fill_(~allowed, torch.finfo(mask.dtype).min)
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def head_weight(self) -> torch.Tensor:
        """Weight (V, D) of the head."""
        weight: torch.Tensor = self.lm_head.weight
        return weight
