"""A student: Llama's blocks with other mixers, and methods for whoever trains it.

Every method takes the packed batch, because attention, convolution and state all stop at the
borders of documents. Blocks are only ever entered through their ``forward``, also for the mixer
alone, so that FSDP2 and activation checkpointing can wrap them.

Shapes: B rows, L tokens, D hidden_size, H heads, V vocabulary.
"""

from typing import Literal

import torch
from torch import nn

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.students.attention import Attention
from thinkfast_distill.students.backends import Backend
from thinkfast_distill.students.borders import Boundaries
from thinkfast_distill.students.common import GatedMLP, RMSNorm
from thinkfast_distill.students.llamba import DiscreteMamba2
from thinkfast_distill.students.mamba_in_llama import Mamba1, Mamba2
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

Config = LlambaConfig | MambaInLlamaConfig
Part = Literal["block", "mixer", "matrix", "both"]
Mixer = DiscreteMamba2 | Mamba1 | Mamba2


class Block(nn.Module):
    """h += mixer(norm(h)); h += mlp(norm(h)).

    The mixer is called ``mixer`` (Llamba), ``mamba`` or ``self_attn`` (hybrids), as in the
    checkpoints.
    """

    def __init__(self, config: Config, index: int, backend: Backend) -> None:
        super().__init__()
        mixer: Mixer | Attention
        if isinstance(config, LlambaConfig):
            self.mixer_name, mixer = "mixer", DiscreteMamba2(config, backend)
            eps, has_bias = config.rms_norm_eps, config.mlp_bias
        elif index in config.attention_layers:
            self.mixer_name, mixer = "self_attn", Attention(config)
            eps, has_bias = config.rms_norm_eps, config.mlp_bias
        else:
            kind = Mamba1 if config.mamba_version == "mamba1" else Mamba2
            self.mixer_name, mixer = "mamba", kind(config, backend)
            eps, has_bias = config.mamba_rms_norm_eps, config.mamba_mlp_bias
        self.input_layernorm = RMSNorm(config.hidden_size, eps)
        self.add_module(self.mixer_name, mixer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, has_bias)

    @property
    def token_mixer(self) -> Mixer | Attention:
        """What mixes tokens in this block."""
        mixer = self.get_submodule(self.mixer_name)
        assert isinstance(mixer, Mixer | Attention)
        return mixer

    def forward(
        self, hidden: torch.Tensor, boundaries: Boundaries, part: Part = "block"
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """One part of the block, for its input.

        Args:
            hidden: [B, L, D], what enters the block.
            boundaries: of the batch.
            part: "block": the block's output [B, L, D]; "mixer": the mixer's output [B, L, D],
                before the residual; "both": the mixer's output and the block's, with the mixer run
                once; "matrix": the mixer's mixing matrix [B, H, L, L].
        """
        mixer = self.token_mixer
        normed = self.input_layernorm(hidden)
        if part == "matrix":
            if isinstance(mixer, Attention):
                raise ValueError("matrix_mixing: this layer keeps attention; leave it out.")
            return mixer.matrix(normed, boundaries)
        mixed: torch.Tensor = mixer(normed, boundaries)
        if part == "mixer":
            return mixed
        hidden = hidden + mixed
        after: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return (mixed, after) if part == "both" else after


class Backbone(nn.Module):
    """Holds what the checkpoints call ``model``."""

    def __init__(self, config: Config, backend: Backend) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, i, backend) for i in range(config.num_hidden_layers)
        )
        eps = config.final_norm_eps if isinstance(config, LlambaConfig) else config.rms_norm_eps
        self.norm = RMSNorm(config.hidden_size, eps)


class Student(nn.Module):
    """Llamba or MambaInLlama; names and shapes of its tensors are ``reader.house_shapes``.

    A tied head is the embedding's parameter; ``state_dict`` lists it under both names,
    ``named_parameters`` once.
    """

    def __init__(self, config: Config, backend: Backend = "reference") -> None:
        """Builds the model with fresh weights; see ``build``."""
        super().__init__()
        self.config = config
        self.num_layers: int = config.num_hidden_layers
        self.model = Backbone(config, backend)
        has_bias = isinstance(config, LlambaConfig) and config.lm_head_bias
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=has_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._last: tuple[PackedBatch, Boundaries] | None = None

    def blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    def is_attention(self, i: int) -> bool:
        """Whether layer i keeps attention."""
        return bool(self.config.layers_block_type[i] == "attention")

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] -> embeddings [B, L, D]."""
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def layer(self, i: int, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Output [B, L, D] of the whole block i for its input [B, L, D]."""
        return self._run(i, hidden, batch, "block")

    def mixer_and_layer(
        self, i: int, hidden: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``mixer`` and ``layer`` return, for the price of ``layer``."""
        found: tuple[torch.Tensor, torch.Tensor] = self.model.layers[i](
            hidden, self._boundaries(batch), "both"
        )
        return found

    def mixer(self, i: int, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Output [B, L, D] of the mixer of block i, given the block's input; no residual."""
        return self._run(i, hidden, batch, "mixer")

    def mixer_matrix(self, i: int, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Mixing matrix [B, H, L, L] of block i, given the block's input.

        Raises:
            ValueError: an attention layer, or a mixer without one matrix per head (Mamba-1).
        """
        return self._run(i, hidden, batch, "matrix")

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states [B, L, D] after the final norm."""
        hidden: torch.Tensor = self.model.embed_tokens(batch.input_ids)
        for i in range(self.num_layers):
            hidden = self._run(i, hidden, batch, "block")
        normed: torch.Tensor = self.model.norm(hidden)
        return normed

    def head_weight(self) -> torch.Tensor:
        """Weight [V, D] of the head."""
        return self.lm_head.weight

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits [B, L, V], for tests; losses use ``hidden`` and ``head_weight``."""
        logits: torch.Tensor = self.lm_head(self.hidden(batch))
        return logits

    def _run(self, i: int, hidden: torch.Tensor, batch: PackedBatch, part: Part) -> torch.Tensor:
        output: torch.Tensor = self.model.layers[i](hidden, self._boundaries(batch), part)
        return output

    def _boundaries(self, batch: PackedBatch) -> Boundaries:
        """Derived once per batch: stages call layer after layer with the same one."""
        if self._last is None or self._last[0] is not batch:
            window = getattr(self.config, "sliding_window", None)
            self._last = (batch, Boundaries(batch, window))
        return self._last[1]


def build(config: Config, backend: Backend = "reference") -> Student:
    """A student with fresh weights on the current default device, in float32.

    Args:
        config: its sizes.
        backend: who computes the recurrences; see ``students.backends``.

    Raises:
        ValueError: the backend does not have this model's recurrence.
        ImportError: the backend's package is not installed.
    """
    return Student(config, backend)
