"""What both causal language models share: embedding, stack of blocks, head, vLLM's hooks."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_thinkfast import compat, state_cache
from vllm_thinkfast.layers.norm import rms_norm
from vllm_thinkfast.models.loading import load_house_tensors
from vllm_thinkfast.models.stages import check_stages

BlockFactory = Callable[[str], nn.Module]

_DRAFTS_WITHOUT_MODEL = ("ngram", "suffix")
"""Methods of speculative decoding whose drafts come from the text so far."""
_DRAFTER = "vllm_thinkfast.drafter.RecurrentDrafter"
"""How a configuration names our own proposer."""


def check_speculation(vllm_config: VllmConfig) -> None:
    """Raises ValueError for a kind of speculative decoding that would not work."""
    speculation = vllm_config.speculative_config
    if speculation is None:
        return
    if not compat.has_drafts():
        raise ValueError(
            f"speculative_config: recurrent models need vLLM {compat.FIRST_WITH_DRAFTS} for it; "
            "update vLLM or leave it out."
        )
    if vllm_config.kv_transfer_config is not None:
        raise ValueError(
            "speculative_config: a KV connector (kv_transfer_config, kv_offloading_size) brings a "
            "state without its number of tokens, which drafts need; leave out one of the two."
        )
    if speculation.method in _DRAFTS_WITHOUT_MODEL or speculation.model == _DRAFTER:
        return
    model = vllm_config.model_config.model
    accepted = (
        f"accepted: {', '.join(_DRAFTS_WITHOUT_MODEL)}, and for a Llamba as draft model "
        f"{_DRAFTER} (docs/serving.md)."
    )
    if speculation.draft_model_config is vllm_config.model_config:
        raise ValueError(
            f"speculative_config: {model} cannot be the draft model: vLLM rolls a draft back by "
            "overwriting keys and values, and a recurrent state has no positions to overwrite; "
            + accepted
        )
    raise ValueError(
        f"speculative_config: method {speculation.method!r} was never run with a recurrent model "
        f"like {model}; {accepted}"
    )


class RecurrentModel(nn.Module):
    """Embedding, blocks, final norm. Blocks map (positions, hidden, residual) to the last two."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        make_block: BlockFactory,
        final_norm_eps: float,
    ) -> None:
        """Builds this pipeline stage's part of the stack.

        Raises:
            ValueError: a stage of the pipeline lacks layers that it needs.
        """
        super().__init__()
        config = vllm_config.model_config.hf_config
        kinds = getattr(config, "layers_block_type", ["mamba"] * config.num_hidden_layers)
        check_stages(kinds, vllm_config.parallel_config.pipeline_parallel_size)
        pp_group = get_pp_group()
        if pp_group.is_first_rank or (config.tie_word_embeddings and pp_group.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, make_block, prefix=f"{prefix}.layers"
        )
        if pp_group.is_last_rank:
            self.norm = rms_norm(config.hidden_size, eps=final_norm_eps)
        else:
            self.norm = PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] token ids -> [T, D]."""
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """[T] packed tokens -> [T, D], or what the next pipeline stage needs."""
        residual: torch.Tensor | None
        if get_pp_group().is_first_rank:
            if inputs_embeds is not None:
                hidden_states = inputs_embeds
            else:
                assert input_ids is not None
                hidden_states = self.embed_input_ids(input_ids)
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class RecurrentForCausalLM(nn.Module, SupportsLoRA):
    """Head, logits, weights and the state hooks that vLLM calls on the class."""

    # Fused linear layers and what they are called in adapters and quantised checkpoints. A model
    # may have its own, as vLLM's interface says.
    packed_modules_mapping: dict[str, list[str]] = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # Names in adapters, and in a quantised checkpoint's list of layers to leave alone.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"backbone.": "model."},
        orig_to_new_substr={".mamba.dt_proj_down": ".mamba.dt_in_proj"},
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """vLLM's constructor signature.

        Raises:
            ValueError: a kind of speculative decoding that these models cannot do.
        """
        super().__init__()
        check_speculation(vllm_config)
        config = vllm_config.model_config.hf_config
        self.config = config
        self.source = vllm_config.model_config.model
        self.is_quantised = vllm_config.quant_config is not None
        self.model = self.make_model(vllm_config, maybe_prefix(prefix, "model"))
        has_head_bias = getattr(config, "lm_head_bias", False)
        if not get_pp_group().is_last_rank:
            self.lm_head = PPMissingLayer()
        elif config.tie_word_embeddings and not has_head_bias:
            # The embedding itself, not a head with its weight: on a CPU vLLM 0.32 packs a head's
            # weight once and would not see that of a reloaded embedding.
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                bias=has_head_bias,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def make_model(self, vllm_config: VllmConfig, prefix: str) -> Any:
        """The stack of blocks."""
        raise NotImplementedError

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] token ids -> [T, D]."""
        embedded: torch.Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """[T] packed tokens -> [T, D]; vLLM may pass further arguments that are not for us."""
        hidden: torch.Tensor | IntermediateTensors = self.model(
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[S, D] -> [S, V]."""
        bias = getattr(self.lm_head, "bias", None)
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states, bias)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fills the parameters, strictly; returns the names of those that were filled."""
        return load_house_tensors(
            self, self.config, weights, source=self.source, is_quantised=self.is_quantised
        )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> state_cache.StateShapes:
        """vLLM's hook: shapes before any layer exists."""
        return state_cache.state_shapes(
            vllm_config.model_config.hf_config,
            vllm_config.parallel_config.tensor_parallel_size,
            state_cache.state_dtypes(vllm_config)[1],
        )

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """vLLM's hook: dtypes before any layer exists."""
        return state_cache.state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """vLLM's hook: how states are copied between cache blocks."""
        return state_cache.state_copy_funcs()

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[Any]) -> dict[Any, Any]:
        """vLLM's hook of later releases: the same per kind of layer.

        It comes with the interface ``SupportsMambaPrefixCaching``, which we do not claim: in
        vLLM 0.25 it promises that kernels write states at every block border (cache mode "all").
        Mode "align" needs only the copy functions.
        """
        return {mamba_type: cls.get_mamba_state_copy_func() for mamba_type in mamba_types}
