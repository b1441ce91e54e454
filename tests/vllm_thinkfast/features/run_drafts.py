"""Greedy tokens and counts of drafts of a speculating engine, in a process of its own.

vLLM 0.32 cannot make a second speculating engine in one.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vllm_thinkfast.models.engines import EnginePool, greedy_params, token_prompts


def run_ngram(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    arrivals: Sequence[int] | None = None,
    preempted_at: Sequence[int] = (),
    **options: Any,
) -> tuple[list[list[int]], int, int]:
    """Runs this program.

    Args:
        folder: of the model.
        prompts: token ids.
        num_tokens: to generate for each.
        arrivals: step before which each prompt arrives; default: all at once.
        preempted_at: steps after which everything that runs is preempted.
        options: of the engine.

    Returns:
        tokens of each prompt, number of drafted tokens, number of accepted ones.
    """
    plan = (prompts, num_tokens, list(arrivals or [0] * len(prompts)), preempted_at, options)
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        input=repr(plan),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: tuple[list[list[int]], int, int] = ast.literal_eval(lines[-1].removeprefix("RESULT "))
    return found


def run(llm: Any, prompts: Any, num_tokens: int, arrivals: Any, preempted_at: Any) -> Any:
    """Steps an engine until every prompt has its tokens; returns them."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    finished: dict[str, list[int]] = {}
    step = num_preempted = 0
    while len(finished) < len(prompts):
        for i, prompt in enumerate(prompts):
            if arrivals[i] == step:
                engine.add_request(str(i), token_prompts([prompt])[0], greedy_params(num_tokens))
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        if step in preempted_at:
            assert engine.reset_prefix_cache(reset_running_requests=True)
            num_preempted += sum(r.num_preemptions > 0 for r in scheduler.requests.values())
    assert num_preempted or not preempted_at, "nothing was preempted"
    return [finished[str(i)] for i in range(len(prompts))]


def main() -> None:
    """Reads the plan from stdin, prints (tokens, drafted, accepted)."""
    prompts, num_tokens, arrivals, preempted_at, options = ast.literal_eval(sys.stdin.read())
    settings = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    pool = EnginePool()
    options = {"max_num_seqs": 4, "disable_log_stats": False, **options}
    llm = pool.get(sys.argv[1], speculative_config=settings, **options)
    tokens = run(llm, prompts, num_tokens, arrivals, preempted_at)
    counts = {
        m.name: m.value
        for m in llm.get_metrics()
        if m.name.startswith("vllm:spec_decode") and hasattr(m, "value")
    }
    drafted = int(counts["vllm:spec_decode_num_draft_tokens"])
    accepted = int(counts["vllm:spec_decode_num_accepted_tokens"])
    sys.stdout.write(f"RESULT {(tokens, drafted, accepted)}\n")
    pool.close()


if __name__ == "__main__":
    main()
