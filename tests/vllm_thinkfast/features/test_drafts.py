"""Drafts beside what else happens to a sequence: the same tokens as without drafts."""

from pathlib import Path

import pytest

from tests.vllm_thinkfast.features.conftest import PLAIN
from tests.vllm_thinkfast.features.run_drafts import run_drafts
from tests.vllm_thinkfast.models.engines import EnginePool, greedy
from vllm_thinkfast import compat

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not compat.has_drafts(), reason="drafts are refused with this vLLM"),
]

NUM_TOKENS = 60
LONG = [[7, 8, 9, 10] * 10, [5, 6] * 20, [3] * 9, [11, 12, 13] * 7, [2, 4] * 5, [9] * 30]


def test_preempted_and_chunked(folder: Path, engines: EnginePool) -> None:
    """What a preempted sequence generated is computed again in chunks of any size.

    vLLM hands a mixer chunks that are as short as a draft as if they were one, longer ones as
    prefill, in any order. Without _move_to_first_slot one of these texts changes.
    """
    expected = greedy(engines.get(folder, **PLAIN), LONG, NUM_TOKENS)
    tokens, num_drafted, num_accepted, _ = run_drafts(
        folder,
        LONG,
        NUM_TOKENS,
        preempted_at=[25, 40, 60],
        max_num_batched_tokens=10,  # three sequences with drafts leave 1 to 7 to the fourth
        enable_chunked_prefill=True,
    )
    assert 0 < num_accepted < num_drafted
    assert tokens == expected


def test_prompt_of_one_token_beside_others(folder: Path, engines: EnginePool) -> None:
    """vLLM fills a new request's only token up with placeholders, to the length of a draft."""
    prompts = [LONG[0], [5], [3], LONG[1], [8]]
    expected = greedy(engines.get(folder, **PLAIN), prompts, NUM_TOKENS)
    tokens, *_ = run_drafts(folder, prompts, NUM_TOKENS, arrivals=[0, 4, 8, 8, 13], max_num_seqs=5)
    assert tokens == expected
