"""Prefill a prompt once and fork its state to N samples: when, and with which settings.

The mechanism is vLLM's prefix cache with a match unit of one token: the state at the prompt's last
but one position is cached, and every further sample starts from a copy of it. This file decides
when that is used; the parts of vLLM that had to be opened for it are in ``compat.py``. Design and
alternatives: ``docs/design/fork.md``.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from vllm_thinkfast import envs

logger = logging.getLogger(__name__)

MATCH_UNIT = 1
"""Tokens. The prefix cache then ends a prefill right before the prompt's last token."""

NUM_REMEMBERED_PROMPTS = 8
"""Prompts whose hashes are kept. Samples of one prompt arrive one after another."""

_NO_FORK = "Every sample of a prompt will prefill it for itself: %s."

BlockHasher = Callable[[Any], list[bytes]]
"""vLLM's type: hashes of a request's tokens that it has no hashes of yet."""


def configure(vllm_config: Any, *, is_attention_free: bool, obstacle: str | None) -> None:
    """Turns forking on in ``vllm_config``, unless the user's settings speak against it.

    Args:
        vllm_config: vLLM's configuration before its own defaults for state models are applied.
        is_attention_free: the model has no attention layers.
        obstacle: why this vLLM cannot fork; None if it can.
    """
    cache_config = vllm_config.cache_config
    if not envs.fork():
        return
    if not cache_config.enable_prefix_caching:
        # vLLM's default for an attention-free model that cannot fork, or the user's choice: which
        # one, vLLM does not keep. The warning is true of both.
        if obstacle is not None:
            logger.warning(_NO_FORK, obstacle)
        return
    # vLLM makes the connector of --kv-offloading-size only after this.
    is_offloading = getattr(cache_config, "kv_offloading_size", None) is not None
    if obstacle is None and (is_offloading or vllm_config.kv_transfer_config is not None):
        obstacle = "a KV connector is configured"
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        # vLLM stops here, for hybrids with an assertion that names no option.
        cache_config.enable_prefix_caching = False
        obstacle = "without chunked prefill there is no prefix caching"
    if obstacle is not None:
        logger.warning(_NO_FORK, obstacle)
        return
    if cache_config.prefix_match_unit is not None:
        return
    cache_config.prefix_match_unit = MATCH_UNIT
    # States at block borders are wanted only by users who set a grid. Otherwise the one state that
    # a sequence needs is the cheapest: a block that no sequence ever fills.
    has_grid = (
        cache_config.mamba_block_size is not None
        or cache_config.user_specified_block_size
        or cache_config.prefix_cache_retention_interval != 0
    )
    if is_attention_free and not has_grid:
        cache_config.mamba_block_size = _endless_block_size(vllm_config)


def _endless_block_size(vllm_config: Any) -> int:
    """Tokens per state block so that it neither fills up nor clips prefill chunks.

    vLLM ends chunks at block borders, unless a block is larger than the largest chunk.
    """
    longest = max(
        vllm_config.model_config.max_model_len,
        vllm_config.scheduler_config.max_num_batched_tokens,
    )
    return int(longest) // 8 * 8 + 8  # vLLM wants a multiple of 8


def remember_prompts(hasher: BlockHasher) -> BlockHasher:
    """``hasher``, but a prompt that was hashed a moment ago is not hashed again."""
    remembered: OrderedDict[Any, list[bytes]] = OrderedDict()

    def hash_tokens(request: Any) -> list[bytes]:
        is_plain_prompt = (
            not request.block_hashes
            and not request.num_output_tokens
            and request.prompt_token_ids is not None
            and request.prompt_embeds is None
            and not request.mm_features
            and request.lora_request is None
        )
        if not is_plain_prompt:
            return hasher(request)
        key = (request.cache_salt, tuple(request.prompt_token_ids))
        hashes = remembered.pop(key, None)
        if hashes is None:
            hashes = hasher(request)
        remembered[key] = hashes
        if len(remembered) > NUM_REMEMBERED_PROMPTS:
            remembered.popitem(last=False)
        return hashes

    return hash_tokens
