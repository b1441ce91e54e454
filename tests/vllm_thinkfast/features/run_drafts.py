"""Greedy tokens and counts of drafts of a speculating engine, in a process of its own.

vLLM 0.32 cannot make a second speculating engine in one.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.vllm_thinkfast.models.engines import EnginePool, token_prompts

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


class Drafts(NamedTuple):
    """What a speculating engine did."""

    tokens: list[list[int]]
    """Generated for each prompt."""
    num_drafted: int
    num_accepted: int
    num_computed: int
    """Tokens that our draft model computed; 0 without one."""


def run_drafts(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    arrivals: Sequence[int] | None = None,
    preempted_at: Sequence[int] = (),
    sampling: Mapping[str, float] | None = None,
    **options: Any,
) -> Drafts:
    """Runs this program.

    Args:
        folder: of the model.
        prompts: token ids.
        num_tokens: to generate for each.
        arrivals: step before which each prompt arrives; default: all at once.
        preempted_at: steps after which everything that runs is preempted.
        sampling: settings of the requests; default: greedy.
        options: of the engine; ``speculative_config`` is that of n-grams by default.
    """
    arrivals = list(arrivals or [0] * len(prompts))
    sampling = dict(sampling or {"temperature": 0})
    plan = (prompts, num_tokens, arrivals, preempted_at, sampling, options)
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
    return Drafts(*ast.literal_eval(lines[-1].removeprefix("RESULT ")))


def run(
    llm: Any, prompts: Any, num_tokens: int, arrivals: Any, preempted_at: Any, sampling: Any
) -> Any:
    """Steps an engine until every prompt has its tokens; returns them."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False, **sampling)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    finished: dict[str, list[int]] = {}
    step = num_preempted = 0
    while len(finished) < len(prompts):
        for i, prompt in enumerate(prompts):
            if arrivals[i] == step:
                engine.add_request(str(i), token_prompts([prompt])[0], params.clone())
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
    """Reads the plan from stdin, prints the fields of ``Drafts``."""
    *plan, options = ast.literal_eval(sys.stdin.read())
    pool = EnginePool()
    defaults = {"max_num_seqs": 4, "disable_log_stats": False, "speculative_config": NGRAM}
    llm = pool.get(sys.argv[1], **{**defaults, **options})
    tokens = run(llm, *plan)
    counts = {
        m.name: m.value
        for m in llm.get_metrics()
        if m.name.startswith("vllm:spec_decode") and hasattr(m, "value")
    }
    drafted = int(counts["vllm:spec_decode_num_draft_tokens"])
    accepted = int(counts["vllm:spec_decode_num_accepted_tokens"])
    core = llm.llm_engine.engine_core.engine_core
    drafter = core.model_executor.driver_worker.worker.model_runner.drafter
    computed = getattr(drafter, "num_computed_tokens", 0)
    sys.stdout.write(f"RESULT {(tokens, drafted, accepted, computed)}\n")
    pool.close()


if __name__ == "__main__":
    main()
