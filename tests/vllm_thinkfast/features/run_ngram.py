"""Greedy tokens and counts of drafts of a speculating engine, in a process of its own.

vLLM 0.32 cannot make a second speculating engine in one.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.vllm_thinkfast.models.engines import EnginePool, greedy


def run_ngram(
    folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> tuple[list[list[int]], int, int]:
    """Runs this program.

    Returns:
        tokens of each prompt, number of drafted tokens, number of accepted ones.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        input=repr((prompts, num_tokens)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: tuple[list[list[int]], int, int] = ast.literal_eval(lines[-1].removeprefix("RESULT "))
    return found


def main() -> None:
    """Reads (prompts, number of tokens) from stdin, prints (tokens, drafted, accepted)."""
    prompts, num_tokens = ast.literal_eval(sys.stdin.read())
    settings = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    pool = EnginePool()
    llm = pool.get(
        sys.argv[1], max_num_seqs=4, speculative_config=settings, disable_log_stats=False
    )
    tokens = greedy(llm, prompts, num_tokens)
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
