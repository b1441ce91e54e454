"""How many sequences the cache holds at once: counted in blocks, as vLLM hands them out.

vLLM's own "Maximum concurrency" counts two blocks per state in its mode "align". A decoding
sequence holds one; the second is needed for one step where a state moves on: at the prompt's end,
whose state stays in the prefix cache while the sequence goes on with a copy, and where decoding
enters a new block. Sequences that do so in different steps take turns with the second one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlocksPerSequence:
    """Cache blocks of one sequence, all groups of layers together."""

    held: int
    """While it decodes, at its full length."""
    moving: int
    """More of them in a step in which its states move on; 0 without a prefix cache."""
    crosses: bool
    """Decoding enters a new block of states."""


def blocks_per_sequence(
    vllm_config: Any, cache: Any, num_prompt_tokens: int, num_tokens: int
) -> BlocksPerSequence:
    """What a sequence takes.

    Args:
        vllm_config: of the engine.
        cache: the scheduler's ``kv_cache_config``.
        num_prompt_tokens: of each prompt.
        num_tokens: generated; the last one is never put in again, so it needs no place.
    """
    from vllm.v1.kv_cache_interface import MambaSpec

    held = moving = 0
    crosses = False
    length = num_prompt_tokens + num_tokens - 1
    model_config = vllm_config.model_config
    kept = model_config.max_model_len
    model_config.max_model_len = length
    try:
        for group in cache.kv_cache_groups:
            spec = group.kv_cache_spec
            held += -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
            if isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align":
                moving += 1
                blocks_of_prompt = -(-num_prompt_tokens // spec.block_size)
                crosses |= -(-length // spec.block_size) > blocks_of_prompt
    finally:
        model_config.max_model_len = kept
    return BlocksPerSequence(held - moving, moving, crosses)


def max_decoding(sequence: BlocksPerSequence, num_blocks: int) -> int:
    """Sequences that decode at once without preemption, if they begin one after another.

    Args:
        sequence: what each takes.
        num_blocks: of the cache, with the null block that vLLM keeps for itself.
    """
    return max(0, (num_blocks - 1 - sequence.moving) // sequence.held)


def largest_batch(
    sequence: BlocksPerSequence, num_blocks: int, num_prompt_tokens: int, budget: int
) -> int:
    """Sequences that may be submitted at once and run together without any preemption.

    Prompts that end in the same step need their second blocks in the same step. With short prompts
    that is the whole batch; with long ones the token budget lets a few end at a time.

    Args:
        sequence: what each takes.
        num_blocks: of the cache, with the null block.
        num_prompt_tokens: of each prompt.
        budget: tokens of a step, ``max_num_batched_tokens``.
    """
    usable = num_blocks - 1

    def fits(batch: int) -> bool:
        steps = list(_ends_of_prompts(batch, num_prompt_tokens, budget))
        peaks = [begun * sequence.held + ending * sequence.moving for begun, ending in steps]
        if sequence.crosses:
            # The first ones enter their last block before the others do: one more block of keys
            # and values for them, if there are any.
            grown = min(1, sequence.held - sequence.moving)
            together = max(ending for _, ending in steps)
            peaks.append(batch * (sequence.held - grown) + together * (sequence.moving + grown))
        return max(peaks) <= usable

    least, most = 0, usable // sequence.held
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _ends_of_prompts(batch: int, num_prompt_tokens: int, budget: int) -> Iterator[tuple[int, int]]:
    """For each step of the prefill: sequences begun before it, and prompts that end in it.

    The prompt's last token is a step of its own. Sequences that got there take a token of the
    budget each, and prompts fill what they leave.
    """
    per_prompt = max(1, num_prompt_tokens - 1)
    ended = computed = 0
    while ended < batch:
        ready = computed // per_prompt
        yield -(-computed // per_prompt), ready - ended
        ended = ready
        left = budget - ended
        if left < per_prompt:
            yield batch, 1
            return
        computed = min(batch * per_prompt, computed + left)
