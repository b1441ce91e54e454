"""``thinkfast-eval reward``: score the steps of stored samples with process reward models.

Options, run folders and the scores that are there already are checked before a model is loaded,
and a model is loaded only where samples are missing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import stop
from lm_eval_tasks.rewards.aggregation import AGGREGATIONS
from lm_eval_tasks.rewards.phase import PhaseCounts, ScorePhase
from lm_eval_tasks.rewards.protocols import PROTOCOLS
from lm_eval_tasks.rewards.reward import get_reward
from lm_eval_tasks.rewards.spec import BACKENDS, RewardSpec, parse_spec
from lm_eval_tasks.rewards.steps import SPLITS

SPEC_HELP = (
    "MODEL[,key=value...]: hub name or folder, then protocol= "
    f"({', '.join(PROTOCOLS)}; known for published models), split= ({', '.join(SPLITS)}), "
    f"backend= ({', '.join(BACKENDS)}), name=, dtype=, device=, url=, tokenizer=, revision=, "
    "max_tokens=, batch_tokens=, engine.NAME= for vllm.LLM"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="SPEC",
        help=f"{SPEC_HELP}; may be given more than once",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="samples scored and written at a time; what a kill can cost (%(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what is missing and stop")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.epilog = (
        "Step scores are stored; which number stands for a solution "
        f"({', '.join(AGGREGATIONS)}) is chosen by the commands that read them."
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    Raises:
        InputError: see the module; finished batches are kept.
    """
    if options.batch_size < 1:
        stop(f"--batch-size {options.batch_size}: need a whole number of at least 1")
    specs = [parse_spec(text) for text in options.reward]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            stop(f"--reward: two rewards are named {name}; tell them apart with name=")
    results = []
    for spec in specs:
        phases = [ScorePhase(folder, spec) for folder in options.runs]
        if options.dry_run:
            counts = [phase.counts() for phase in phases]
        else:
            counts = load_and_score(spec, phases, options.batch_size, options.command_line)
        results += [_result(*pair) for pair in zip(phases, counts, strict=True)]
    if options.json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    else:
        sys.stdout.writelines(_line(result) for result in results)
    return 0


def load_and_score(
    spec: RewardSpec, phases: Sequence[ScorePhase], batch_size: int, command: str
) -> list[PhaseCounts]:
    """Score what runs miss; the model is loaded only if they miss anything.

    Args:
        spec: of the reward model.
        phases: one per run, of this reward.
        batch_size: samples scored and written at a time.
        command: the command line, as it is stored beside the scores.

    Returns:
        What each score file holds at the end.

    Raises:
        InputError: see `ScorePhase.run`.
    """
    counts = [phase.counts() for phase in phases]
    if all(one.num_scored == one.num_samples for one in counts):
        return counts
    from lm_eval_tasks.sampling import environment

    if spec.backend == "vllm":
        # Their lines would tear the progress line; a chosen level stays.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    started = time.monotonic()
    reward = get_reward(spec)
    session = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "startup_s": round(time.monotonic() - started, 3),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "git_commit": environment.git_commit(),
    }
    try:
        return [
            phase.run(reward, batch_size, session, sys.stderr)
            if one.num_scored < one.num_samples
            else one
            for phase, one in zip(phases, counts, strict=True)
        ]
    finally:
        reward.close()


def _result(phase: ScorePhase, counts: PhaseCounts) -> dict[str, Any]:
    return {
        "run": str(phase.folder),
        "reward": phase.spec.name,
        "reward_hash": phase.reward_hash,
        "protocol": phase.spec.protocol,
        "split": phase.spec.split,
        "scores": str(phase.path),
        **vars(counts),
        "steps_per_solution": counts.steps_per_solution,
    }


def _line(result: dict[str, Any]) -> str:
    text = (
        f"{result['run']}: {result['reward']} ({result['protocol']}, split {result['split']}) has "
        f"scored {result['num_scored']} of {result['num_samples']} samples, "
        f"{result['num_new']} now; {result['steps_per_solution']:.1f} steps per solution, "
        f"{result['num_empty']} without a step, {result['num_too_long']} too long, "
        f"{result['seconds']:.1f} s\n"
    )
    if result["num_scored"] > 1 and 0 < result["steps_per_solution"] <= 1:
        text += (
            "  every solution is a single step: the split found nothing to cut, so this scores "
            f"outcomes; another split may fit ({', '.join(SPLITS)})\n"
        )
    return text
