"""A Llamba as the draft model of speculative decoding, for any target that vLLM serves.

vLLM's own way to draft with a model takes rejected tokens back by overwriting their keys and
values; a recurrent state has no positions to overwrite. This proposer comes in through vLLM's hook
for proposers of one's own (``custom_class``, vLLM 0.32)::

    --speculative-config '{"model": "vllm_thinkfast.drafter.RecurrentDrafter",
                           "num_speculative_tokens": 3}'
    --additional-config '{"draft_model": "thinkfast/llamba-1b"}'

A sequence has two states: one after the tokens that the target accepted, and a copy of it that
runs ahead with the draft and is dropped. So nothing is ever taken back, and the memory does not
grow with the length of drafts or sequences. Drafts are greedy, whatever the request's temperature.

The hook passes rows of a batch, not requests, and requests change rows. A state depends on nothing
but the tokens it has seen, so it is recognised by them.
"""

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import CompilationConfig, CompilationMode, ModelConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model

from vllm_thinkfast.layers.recurrent_mixer import RecurrentMixer
from vllm_thinkfast.plugin import ATTENTION_FREE

logger = logging.getLogger(__name__)

OPTION = "draft_model"
"""Key of ``--additional-config`` that names the draft model's folder or repository."""

_NUM_PROMPTS = 8
"""States at the end of a prompt that are kept for further samples of it."""

Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass
class _Batch:
    """What mixers read of vLLM's batch metadata: either all sequences decode, or all prefill."""

    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    num_prefill_tokens: int
    seq_lens: torch.Tensor
    state_indices_tensor_d: torch.Tensor
    state_indices_tensor_p: torch.Tensor
    has_initial_states_p: torch.Tensor
    query_start_loc_p: torch.Tensor


class RecurrentDrafter:
    """vLLM's interface of a proposer: ``load_model`` and ``propose``."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Keeps the settings; ``load_model`` checks them, whose errors vLLM passes on unchanged."""
        assert vllm_config.speculative_config is not None
        self._target = vllm_config
        self._num_drafted: int = vllm_config.speculative_config.num_speculative_tokens
        self._max_model_len: int = vllm_config.model_config.max_model_len
        self._max_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._max_rows: int = vllm_config.scheduler_config.max_num_seqs
        # Slot 0 stays empty, as in vLLM's cache. Row i has slot 1 + i, then come the states that
        # run ahead, then those of prompts.
        self._first_ahead = 1 + self._max_rows
        self._first_prompt = self._first_ahead + self._max_rows
        self._num_slots = self._first_prompt + _NUM_PROMPTS
        self._next_prompt = 0
        self._seen: list[Tokens] = [np.empty(0, np.int32)] * self._num_slots
        self.num_computed_tokens = 0
        """Tokens that the draft model computed, those of drafts too."""

    def load_model(self, target_model: Any = None) -> None:
        """Loads the draft model and makes room for its states, in the memory of the weights.

        Args:
            target_model: unused.

        Raises:
            ValueError: no draft model is named, or it does not suit the target.
        """
        self._draft = _draft_config(self._target)
        self._model = get_model(vllm_config=self._draft)
        self._device = self._draft.device_config.device
        layers = self._draft.compilation_config.static_forward_context
        self._mixers: list[RecurrentMixer] = list(layers.values())
        states = [
            list(zip(mixer.get_state_shape(), mixer.get_state_dtype(), strict=True))
            for mixer in self._mixers
        ]
        size = sum(math.prod(shape) * dtype.itemsize for layer in states for shape, dtype in layer)
        # Before the memory is taken, which may fail.
        logger.info(
            "Draft model %s: %.2f GiB of states beside vLLM's cache, for --max-num-seqs %d.",
            self._draft.model_config.model, self._num_slots * size / 2**30, self._max_rows,
        )  # fmt: skip
        for mixer, layer in zip(self._mixers, states, strict=True):
            mixer.kv_cache = tuple(
                torch.zeros(self._num_slots, *shape, dtype=dtype, device=self._device)
                for shape, dtype in layer
            )

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the batch.

        Args:
            sampled_token_ids: the tokens that each row got in this step; rows without any, whose
                prompts are not complete, get no draft.
            num_tokens_no_spec: [rows], integer: length of each row's text.
            token_ids_cpu: [rows, max_model_len], integer: the texts.
            slot_mappings: unused.

        Returns:
            up to ``num_speculative_tokens`` token ids for each row.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [
            row
            for row, sampled in enumerate(sampled_token_ids)
            if sampled and num_tokens_no_spec[row] < self._max_model_len
        ]
        if not rows:
            return drafts
        texts = [np.array(token_ids_cpu[row, : num_tokens_no_spec[row]], np.int32) for row in rows]
        slots = [1 + row for row in rows]
        self._find_states(slots, texts)
        tokens = self._run(slots, texts)
        ahead = [self._first_ahead + row for row in rows]
        self._copy(slots, ahead)
        columns = [tokens]
        for _ in range(self._num_drafted - 1):
            lengths = [len(text) + len(columns) for text in texts]
            columns.append(self._decode(ahead, columns[-1], lengths))
        for row, text, draft in zip(rows, texts, torch.stack(columns, 1).tolist(), strict=True):
            drafts[row] = draft[: self._max_model_len - len(text)]
        return drafts

    def _find_states(self, slots: Sequence[int], texts: Sequence[Tokens]) -> None:
        """Puts into each slot a state that has seen a part of the text, all but the last token."""
        sources = [self._match(slot, text) for slot, text in zip(slots, texts, strict=True)]
        # New texts, each once: all but the last token is the prompt, which samples have in common.
        leaders: dict[bytes, int] = {}
        for i, (source, text) in enumerate(zip(sources, texts, strict=True)):
            if not source:
                leaders.setdefault(text[:-1].tobytes(), i)
        # First the old ones: a slot that a new text gets may hold the state of a row that moved.
        old = [i for i, source in enumerate(sources) if source]
        self._copy([sources[i] for i in old], [slots[i] for i in old])
        new = list(leaders.values())
        for i in new:
            self._seen[slots[i]] = texts[i][:0]
        if not new:
            return
        self._run([slots[i] for i in new], [texts[i][:-1] for i in new])
        for i in new[-_NUM_PROMPTS:]:
            self._copy([slots[i]], [self._first_prompt + self._next_prompt])
            self._next_prompt = (self._next_prompt + 1) % _NUM_PROMPTS
        others = [i for i, source in enumerate(sources) if not source and i not in new]
        leader_slots = [slots[leaders[texts[i][:-1].tobytes()]] for i in others]
        self._copy(leader_slots, [slots[i] for i in others])

    def _match(self, own: int, text: Tokens) -> int:
        """The slot whose state has seen most of a text's beginning, 0 if there is none."""
        if self._has_begun(own, text):
            return own
        kept = [*range(1, self._first_ahead), *range(self._first_prompt, self._num_slots)]
        found = [slot for slot in kept if self._has_begun(slot, text)]
        return max(found, key=lambda slot: len(self._seen[slot]), default=0)

    def _has_begun(self, slot: int, text: Tokens) -> bool:
        seen = self._seen[slot]
        n = len(seen)
        # The last token first: it tells most states apart.
        return 0 < n < len(text) and seen[-1] == text[n - 1] and np.array_equal(seen, text[:n])

    def _copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies states between slots, all at once: a slot may be among both."""
        moved = [(s, t) for s, t in zip(sources, targets, strict=True) if s != t]
        if not moved:
            return
        source, target = torch.tensor(moved, device=self._device).unbind(1)
        for mixer in self._mixers:
            for state in mixer.kv_cache:
                state[target] = state[source]
        seen = [self._seen[s] for s, _ in moved]
        for (_, t), tokens in zip(moved, seen, strict=True):
            self._seen[t] = tokens

    def _run(self, slots: Sequence[int], texts: Sequence[Tokens]) -> torch.Tensor:
        """Lets the states see their texts to the end; returns the likeliest next tokens [S]."""
        found = torch.zeros(len(slots), dtype=torch.long, device=self._device)
        todo = list(range(len(slots)))
        while todo:
            batch, parts, room = [], [], self._max_tokens
            for i in todo:
                begin = len(self._seen[slots[i]])
                part = texts[i][begin : begin + room]
                if len(part):
                    batch.append(i)
                    parts.append(part)
                    room -= len(part)
            rows = torch.tensor(batch, device=self._device)
            found[rows] = self._prefill([slots[i] for i in batch], parts)
            for i, part in zip(batch, parts, strict=True):
                self._seen[slots[i]] = texts[i][: len(self._seen[slots[i]]) + len(part)]
            todo = [i for i in todo if len(self._seen[slots[i]]) < len(texts[i])]
        return found

    def _prefill(self, slots: Sequence[int], parts: Sequence[Tokens]) -> torch.Tensor:
        """Parts of texts, of any lengths, on top of the states; the likeliest next tokens [S]."""
        num_seen = [len(self._seen[slot]) for slot in slots]
        ends = np.cumsum([len(part) for part in parts])
        num_tokens = int(ends[-1])
        batch = _Batch(
            num_decodes=0,
            num_decode_tokens=0,
            num_prefills=len(slots),
            num_prefill_tokens=num_tokens,
            seq_lens=self._integers(
                [n + len(part) for n, part in zip(num_seen, parts, strict=True)]
            ),
            state_indices_tensor_d=self._integers([]),
            state_indices_tensor_p=self._integers(slots),
            has_initial_states_p=torch.tensor([n > 0 for n in num_seen], device=self._device),
            query_start_loc_p=self._integers([0, *ends.tolist()]),
        )
        tokens = torch.from_numpy(np.concatenate(parts)).to(self._device)
        return self._next_tokens(tokens, batch, torch.from_numpy(ends - 1).to(self._device))

    def _decode(
        self, slots: Sequence[int], tokens: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """One more token [S] for each state, which has seen ``lengths`` [S] tokens with it."""
        batch = _Batch(
            num_decodes=len(slots),
            num_decode_tokens=len(slots),
            num_prefills=0,
            num_prefill_tokens=0,
            seq_lens=self._integers(lengths),
            state_indices_tensor_d=self._integers(slots),
            state_indices_tensor_p=self._integers([]),
            has_initial_states_p=torch.empty(0, dtype=torch.bool, device=self._device),
            query_start_loc_p=self._integers([0]),
        )
        return self._next_tokens(tokens, batch, None)

    def _next_tokens(
        self, tokens: torch.Tensor, batch: _Batch, last: torch.Tensor | None
    ) -> torch.Tensor:
        """Runs the model on packed tokens [T]; the likeliest tokens after those at ``last``."""
        self.num_computed_tokens += len(tokens)
        metadata = {mixer.prefix: batch for mixer in self._mixers}
        # The model has no positional encoding.
        positions = torch.zeros(len(tokens), dtype=torch.long, device=self._device)
        with set_forward_context(metadata, self._draft, num_tokens=len(tokens)):
            hidden = self._model(tokens, positions)
        logits = self._model.compute_logits(hidden if last is None else hidden[last])
        found: torch.Tensor = logits.argmax(-1)
        return found

    def _integers(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def _draft_config(target: VllmConfig) -> VllmConfig:
    """vLLM's settings for the draft model: the target's, without what belongs to the target alone.

    Layers register in the compilation settings; with ones of their own, vLLM does not take the
    draft's for layers of the target, and makes no cache for them.
    """
    extra = target.additional_config
    name = extra.get(OPTION) if isinstance(extra, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            f"additional_config: {OPTION!r} is {name!r}; it must name the folder or repository of "
            f"a Llamba, as in --additional-config '{json.dumps({OPTION: 'thinkfast/llamba-1b'})}'."
        )
    if target.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size={target.parallel_config.pipeline_parallel_size} with a draft "
            "model: only 1 is accepted."
        )
    model = ModelConfig(
        model=name,
        dtype=target.model_config.dtype,
        seed=target.model_config.seed,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    if not set(model.architectures) & set(ATTENTION_FREE):
        raise ValueError(
            f"{OPTION} {name}: {', '.join(model.architectures)} cannot draft; accepted: Llamba "
            "models, which need no keys and values."
        )
    sizes = model.get_vocab_size(), target.model_config.get_vocab_size()
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{OPTION} {name}: its vocabulary has {sizes[0]} tokens, the target's {sizes[1]}; it "
            "must be the same."
        )
    load_config = copy.copy(target.load_config)
    if load_config.load_format not in ("auto", "dummy"):
        load_config.load_format = "auto"
        load_config.model_loader_extra_config = {}
    draft = copy.copy(target)
    # A draft's step is not one that data-parallel ranks of a target with experts wait for.
    draft.parallel_config = copy.copy(target.parallel_config)
    draft.parallel_config.is_moe_model = False
    # Options for the kernels of vLLM's own Mamba-2, which the target may be.
    draft.cache_config = copy.copy(target.cache_config)
    draft.cache_config.use_replayssm = False
    draft.mamba_config = copy.copy(target.mamba_config)
    draft.mamba_config.enable_stochastic_rounding = False
    draft.model_config = model
    draft.load_config = load_config
    draft.quant_config = VllmConfig.get_quantization_config(model, load_config)
    draft.speculative_config = draft.lora_config = draft.kv_transfer_config = None
    draft.compilation_config = CompilationConfig(
        mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE, custom_ops=["all"]
    )
    return draft
