"""The frozen teacher: a Hugging Face Llama, Mistral or Qwen2, run layer by layer.

transformers' own forward pass keeps every layer's states, applies the final norm to the last of
them and treats a packed row as one text. Here the decoder layers (still transformers' modules) are
called one by one, with a mask and positions that stop at the borders of documents, and hidden
states are handed out before the final norm.

Shapes: B rows, L tokens of a row, H query heads, P width of a head, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from thinkfast_distill.architecture import attention_window
from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.recipe import NEW_RUN

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Architectures whose layers are those of Llama up to attention biases and window."""


class Teacher(nn.Module):
    """A causal language model without gradients, with access to its layers.

    Sharding: pass ``blocks()`` to FSDP2; parameters of a layer are then gathered while it runs, the
    others (embedding, norm, head) from the first use on.
    """

    def __init__(self, model: Any) -> None:
        """Freezes a model.

        Args:
            model: ``LlamaForCausalLM`` or another of ``MODEL_TYPES``.

        Raises:
            ValueError: another architecture.
        """
        super().__init__()
        self.config: PretrainedConfig = model.config
        """The teacher's Hugging Face configuration."""
        _check_type(self.config, "teacher")
        self.model: Any = model
        """The Hugging Face module."""
        # With sdpa no layer builds an (H, L, L) matrix; attention_matrix makes them when asked.
        model.set_attn_implementation("sdpa")
        self._not_finite: list[str] | None = None  # None: raise
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_folder(
        cls, folder: Path | str, dtype: torch.dtype, gguf_file: str | None = None
    ) -> Teacher:
        """Reads a model folder.

        Args:
            folder: with config.json and safetensors.
            dtype: of the weights in memory.
            gguf_file: name of a GGUF file in the folder, read (dequantised) instead.

        Raises:
            ValueError: another architecture, or weights that are missing, surplus or misshapen.
        """
        extra = {} if gguf_file is None else {"gguf_file": gguf_file}
        _check_type(AutoConfig.from_pretrained(folder, **extra), str(folder))
        model, report = AutoModelForCausalLM.from_pretrained(
            # Misshapen weights are reported below instead of in transformers' several lines.
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **extra,
        )
        # transformers gives what is missing random values, with no more than a warning.
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found := sorted(map(str, report[problem])):
                raise ValueError(
                    f"teacher: {folder}: {len(found)} {problem.replace('_', ' ')}, for example "
                    f"{found[0]}; download the checkpoint again."
                )
        return cls(model)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: a teacher with dropout would be a noisy target."""
        super().train(False)
        return self

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def num_heads(self) -> int:
        """Number of query heads H."""
        return int(self.config.num_attention_heads)

    def blocks(self) -> list[nn.Module]:
        """The decoder layers, in order; the units of sharding."""
        return list(self.model.model.layers)

    def head_weight(self) -> torch.Tensor:
        """Weight (V, D) of the head."""
        self._gather_root()
        weight: torch.Tensor = self.model.lm_head.weight
        return weight

    @torch.no_grad()
    def layers(
        self, batch: PackedBatch
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Runs the layers one after the other; nothing is kept of a layer that is done.

        Args:
            batch: on the teacher's device.

        Yields:
            (i, input of layer i before its norm, output of its attention after the output
            projection, output of the layer), each (B, L, D) in the teacher's dtype; the last
            layer's output is not normalised.

        Raises:
            ValueError: the last layer's output is not finite; the samples are named. Not inside
                of ``noting_not_finite``.
        """
        self._gather_root()
        inner = self.model.model
        hidden = inner.embed_tokens(batch.input_ids)
        positions = inner.rotary_emb(hidden, position_ids=batch.position_ids)
        same_document = batch.same_document()
        masks: dict[int | None, torch.Tensor] = {}
        for i, block in enumerate(inner.layers):
            window = attention_window(self.config, i)
            if window not in masks:
                masks[window] = _within(same_document, window)[:, None]
            with _gathered(block):
                mixed, _ = block.self_attn(
                    hidden_states=block.input_layernorm(hidden),
                    position_embeddings=positions,
                    attention_mask=masks[window],
                )
                after = hidden + mixed
                after = after + block.mlp(block.post_attention_layernorm(after))
            yield i, hidden, mixed, after
            hidden = after
        self._check_finite(hidden, batch)

    @torch.no_grad()
    def attention_matrix(
        self, i: int, layer_input: torch.Tensor, batch: PackedBatch
    ) -> torch.Tensor:
        """Softmax matrices of one layer's attention.

        Args:
            i: the layer.
            layer_input: (B, L, D) as ``layers`` yields it, in any dtype.
            batch: the same batch.

        Returns:
            (B, H, L, L) float32 (float64 for a float64 teacher): weight of key s (last) for query
            t; rows and columns of padding are zero.
        """
        self._gather_root()
        block, inner = self.model.model.layers[i], self.model.model
        attention = block.self_attn
        with _gathered(block):
            layer_input = layer_input.to(block.input_layernorm.weight.dtype)
            states = block.input_layernorm(layer_input)
            split = (*states.shape[:2], -1, attention.head_dim)
            query = attention.q_proj(states).view(split).transpose(1, 2)
            key = attention.k_proj(states).view(split).transpose(1, 2)
        cos, sin = inner.rotary_emb(query, position_ids=batch.position_ids)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        with torch.autocast(query.device.type, enabled=False):
            weights: torch.Tensor = query.to(dtype) @ key.to(dtype).transpose(-1, -2)
        weights *= attention.scaling
        allowed = _within(batch.same_document(), attention_window(self.config, i))
        weights.masked_fill_(~allowed[:, None], -torch.inf)
        weights = weights.softmax(-1)
        # Padding sees itself inside the softmax, so that no row is empty; here it is dropped.
        weights.masked_fill_(~batch.is_token()[:, None, :, None], 0.0)
        return weights

    @torch.no_grad()
    def final_hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states (B, L, D) after the final norm, which the head multiplies.

        Raises:
            ValueError: they are not finite; the samples are named. Not inside of
                ``noting_not_finite``.
        """
        # A queue of one: the layers before the last are dropped as they come.
        _, _, _, last = deque(self.layers(batch), maxlen=1).pop()
        hidden: torch.Tensor = self.model.model.norm(last)
        return hidden

    @contextlib.contextmanager
    def noting_not_finite(self) -> Iterator[list[str]]:
        """Inside, samples with hidden states that are not finite are noted instead of raised.

        An exception on one rank would leave the others waiting in the next collective. So the
        values pass through, and the ranks stop together afterwards.

        Yields:
            the samples, filled while the teacher runs.
        """
        noted: list[str] = []
        self._not_finite = noted
        try:
            yield noted
        finally:
            self._not_finite = None

    def _gather_root(self) -> None:
        """Gathers embedding, final norm and head of a sharded teacher, once."""
        if isinstance(self, FSDPModule):
            self.unshard()

    def _check_finite(self, hidden: torch.Tensor, batch: PackedBatch) -> None:
        # A value that is not finite stays in the residual stream, so the last layer shows it.
        bad = ((~hidden.isfinite()).any(-1) & batch.is_token()).any(-1)
        if not bool(bad.any()):
            return
        rows = bad.nonzero().flatten().tolist()
        names = [", ".join(batch.sample_ids[r]) if batch.sample_ids else f"row {r}" for r in rows]
        if self._not_finite is None:
            raise ValueError(not_finite_message(names))
        self._not_finite.extend(names)


def not_finite_message(samples: Sequence[str]) -> str:
    """What to tell the user about samples for which the teacher is not finite."""
    more = f" and {len(samples) - 12} more" if len(samples) > 12 else ""
    return (
        f"teacher: hidden states are not finite for samples {'; '.join(samples[:12])}{more}; use "
        "teacher.dtype: float32 and the same command continues, or leave these samples out in "
        f"{NEW_RUN}."
    )


def _check_type(config: PretrainedConfig, where: str) -> None:
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{where}: model_type {config.model_type!r} cannot be a teacher; accepted: "
            f"{', '.join(MODEL_TYPES)}."
        )


def _within(allowed: torch.Tensor, window: int | None) -> torch.Tensor:
    """``allowed`` (B, L, L) without keys that lie ``window`` or more tokens back."""
    if window is None or window >= allowed.shape[-1]:
        return allowed
    return allowed.triu(1 - window)


@contextlib.contextmanager
def _gathered(block: nn.Module) -> Iterator[None]:
    """Holds all parameters of a sharded layer; for a layer that is not sharded nothing."""
    if not isinstance(block, FSDPModule):
        yield
        return
    block.unshard()
    try:
        yield
    finally:
        block.reshard()
