"""Neither neighbours, chunks, preemption nor slots that others used change a sequence's tokens."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_thinkfast.models.conftest import Golden
from tests.vllm_thinkfast.models.engines import (
    EnginePool,
    greedy,
    greedy_params,
    random_prompts,
    token_prompts,
)

pytestmark = pytest.mark.engine

NUM_TOKENS = 64
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 100, 127, 128, 129, 17, 64]
CHUNKED = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}


def prompts_of(seed: int) -> list[list[int]]:
    """16 prompts of mixed lengths."""
    return random_prompts(LENGTHS, 150, seed)


def run_with_preemption(llm: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of a batch whose running requests are all preempted twice."""
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), token_prompts([prompt])[0], greedy_params(num_tokens))
    scheduler = engine.engine_core.engine_core.scheduler
    finished: dict[str, list[int]] = {}
    steps = num_preempted = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps in (20, 60):
            assert engine.reset_prefix_cache(reset_running_requests=True)
            num_preempted += sum(r.num_preemptions > 0 for r in scheduler.requests.values())
    assert num_preempted >= len(prompts), "nothing was preempted: this run proves nothing"
    return [finished[str(i)] for i in range(len(prompts))]


def test_golden_greedy(golden: Golden, engines: EnginePool) -> None:
    """The published code's own greedy continuation."""
    llm = engines.get(golden.folder)
    expected = golden.tensors["greedy_tokens"]
    prompts = golden.tensors["greedy_prompt"].tolist()
    assert greedy(llm, prompts, expected.shape[1]) == expected.tolist()


def test_alone_batched_chunked_preempted(golden: Golden, engines: EnginePool) -> None:
    check_alone_batched_chunked_preempted(golden.folder, engines)


def test_alone_batched_chunked_preempted_random(family_folder: Path, engines: EnginePool) -> None:
    check_alone_batched_chunked_preempted(family_folder, engines)


def check_alone_batched_chunked_preempted(folder: Path, engines: EnginePool) -> None:
    """64 greedy tokens of 16 prompts: the same in four ways."""
    prompts = prompts_of(seed=1)
    llm = engines.get(folder)
    alone = [greedy(llm, [prompt], NUM_TOKENS)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) > 1, "all continuations equal: proves nothing"
    assert greedy(llm, prompts, NUM_TOKENS) == alone, "batched differs from alone"
    assert run_with_preemption(llm, prompts, NUM_TOKENS) == alone, "preempted differs from alone"
    llm = engines.get(folder, **CHUNKED)
    assert greedy(llm, prompts, NUM_TOKENS) == alone, "chunked differs from alone"


@pytest.mark.parametrize("caching", [True, False], ids=["prefix_caching", "no_prefix_caching"])
def test_prefix_caching(family_folder: Path, engines: EnginePool, caching: bool) -> None:
    """A second and third use of the same prompt gives the same tokens as the first."""
    llm = engines.get(family_folder, enable_prefix_caching=caching, max_model_len=1024)
    prompt = random_prompts([700], 150, seed=8)[0]
    first = greedy(llm, [prompt], 16)[0]
    assert greedy(llm, [prompt, prompt[:690], prompt], 16)[::2] == [first, first]


def test_memory_pressure(engines: EnginePool, tmp_path: Path) -> None:
    """A hybrid whose cache is too small for the batch preempts, and the text stays the same."""
    from tests.reference.random_checkpoints import write_checkpoint

    folder = write_checkpoint(tmp_path / "ckpt", "m1", seed=11)
    prompts = prompts_of(seed=2)
    llm = engines.get(folder, enable_prefix_caching=False)
    alone = [greedy(llm, [prompt], NUM_TOKENS)[0] for prompt in prompts]
    llm = engines.get(folder, enable_prefix_caching=False, num_gpu_blocks_override=14)
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), token_prompts([prompt])[0], greedy_params(NUM_TOKENS))
    finished: dict[str, list[int]] = {}
    most_running = 0
    scheduler = engine.engine_core.engine_core.scheduler
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        most_running = max(most_running, len(scheduler.running))
    assert most_running < len(prompts), "the whole batch fitted: no pressure"
    assert [finished[str(i)] for i in range(len(prompts))] == alone


def test_no_state_leaks(family_folder: Path, engines: EnginePool) -> None:
    """300 sequences through 8 slots in random order: each as if it were alone."""
    order = random.Random(0)
    lengths = [order.randint(1, 60) for _ in range(300)]
    prompts = random_prompts(lengths, 150, seed=3)
    llm = engines.get(family_folder, max_num_seqs=8)
    alone = [greedy(llm, [prompt], 8)[0] for prompt in prompts]
    shuffled = list(range(300))
    order.shuffle(shuffled)
    together = greedy(llm, [prompts[i] for i in shuffled], 8)
    wrong = [i for i, tokens in zip(shuffled, together, strict=True) if tokens != alone[i]]
    assert not wrong, f"{len(wrong)} of 300 sequences changed, first: {wrong[:5]}"
