"""``make paper``: the paper in miniature, on the embedded models.

What a fixed time buys (https://arxiv.org/abs/2502.20339): the teacher, a pure and a hybrid student
solve the same problems many times; coverage, the majority vote and weighted Best-of-N with the tiny
process reward model are reported against the number of samples and against seconds, on a saturated
server and with one problem at a time, and speeds against the batch size.

This is one call of ``thinkfast-eval compare``, which continues where it was killed and draws the
figures. docs/evaluation.md says what a kill can change.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.contenders import MODELS, find_contenders
from demo.errors import InputError
from lm_eval_tasks.cli import main as thinkfast_eval
from lm_eval_tasks.commands.sample import DEFAULT_SEED
from lm_eval_tasks.compare import PLAN
from scripts.tiny_models import ENVIRONMENT as ONE_THREAD
from scripts.tiny_models import ROOT

NUM_PROBLEMS, LATENCY_PROBLEMS, NUM_SAMPLES = 150, 50, 64
BATCH_SIZES = (1, 4, 16, 64, 256)
ENGINE = {
    "dtype": "float32",
    "enforce_eager": "true",
    "max_model_len": "512",
    "max_num_seqs": "256",
    "max_num_batched_tokens": "4096",
    "kv_cache_memory_bytes": str(2**30),
    # The smallest blocks that the teacher's attention has on a CPU: with larger ones it would not
    # share these short prompts among samples, as the students do.
    "enable_prefix_caching": "true",
    "block_size": "32",
    "use_tqdm_on_load": "false",
}
"""Of every model: the same memory, the same places in the batch."""
PUBLISHED = ("report.md", "report.html", "results.json", "points.csv")
ENVIRONMENT = ONE_THREAD | {
    # Only progress and errors: what vLLM and torch say about themselves is not news here.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


def compare_arguments(options: argparse.Namespace) -> list[str]:
    """The call of ``thinkfast-eval`` that does everything.

    Raises:
        demo.errors.InputError: a model is missing.
    """
    if not (options.reward / "config.json").is_file():
        raise InputError(
            f"{options.reward}: there is no reward model; restore it with "
            "`git checkout thinkfast`, or name another with --reward"
        )
    arguments = ["compare", "--task", "arith", "--regime", "saturated", "latency"]
    for contender in find_contenders(options.models):
        arguments += ["--model", _shown(contender.folder)]
    arguments += ["--num-samples", str(options.num_samples), "--limit", str(options.problems)]
    arguments += ["--latency-limit", str(options.latency_problems)]
    if options.rounds is not None:
        arguments += ["--rounds", str(options.rounds)]
    seed = options.seed
    if seed is None and not (options.out / PLAN).exists():
        # Seeds, though they cost time in every step: the same call gives the same samples, also
        # after a kill. In one measurement (process time, batch 256) they made a step of llama-tiny
        # and of llamba-tiny 8 % longer, which leaves their ratio as it was. A comparison that was
        # begun goes on with what it has.
        seed = DEFAULT_SEED
    if seed is not None:
        arguments += ["--seed", str(seed)]
    arguments += ["--batch-sizes", *map(str, options.batch_sizes)]
    arguments += ["--speed-tokens", "64", "128"]
    arguments += ["--reward-model", _shown(options.reward), "--reward-time"]
    # The tiny reward model judges each step for itself: a solution is as good as its worst step.
    arguments += ["--aggregation", "min"]
    arguments += ["--title", "The paper in miniature", "--out", _shown(options.out)]
    arguments += ["--engine-args", *(f"{key}={value}" for key, value in ENGINE.items())]
    return arguments


def _shown(path: Path) -> str:
    """Relative to the checkout where possible: reports quote the command."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def summary(results: dict[str, Any]) -> str:
    """The main numbers of a report as a Markdown table.

    Args:
        results: content of ``results.json``.
    """
    lines = []
    for group in results["groups"]:
        num_samples = group["runs"][0]["ks"][-1]
        # Curves are read up to half of the samples; see docs/metrics.md.
        keys = ["pass@1", *(f"{name}@{num_samples // 2}" for name in ("pass", "maj"))]
        keys.append(f"weighted_bon@{num_samples // 2}")
        keys = [key for key in dict.fromkeys(keys) if key in group["runs"][0]["metrics"]]
        lines += [
            f"{group['regime']}: {group['num_problems']} problems, {num_samples} samples each",
            "",
            f"| model | {' | '.join(keys)} | tokens/s | sooner than {group['baseline']} |",
            f"| --- |{' ---: |' * (len(keys) + 2)}",
        ]
        for run in group["runs"]:
            cells = [f"{100 * run['metrics'][key]['value']:.1f} %" for key in keys]
            cells.append(f"{run['facts']['tokens_per_s']:.0f}")
            cells.append(_speed_up(group, run["name"]))
            lines.append(f"| {run['name']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _speed_up(group: dict[str, Any], run: str) -> str:
    """How many times sooner a run has the coverage of the middle of the baseline's curve."""
    targets = [t for t in group["targets"] if t["run"] == run and t["method"] == "coverage"]
    if not targets:
        return ""
    target = targets[(len(targets) - 1) // 2]
    if target["seconds"] is None:
        return f"not reached ({100 * target['target']:.0f} %)"
    spread = "one round"
    if target["round_speedup_low"] is not None:
        spread = "rounds {round_speedup_low:.2f}-{round_speedup_high:.2f}".format(**target)
    return f"{target['speedup']:.2f} ({spread}; to {100 * target['target']:.0f} %)"


def publish(report: Path, folder: Path) -> None:
    """Copy what ``docs/results`` keeps of a report: texts, numbers and each figure alone.

    Args:
        report: folder of the report.
        folder: is made if it is missing; figures of an earlier report are removed.
    """
    pictures = [path for path in report.glob("figures/*/*.png") if path.stem != "overview"]
    shutil.rmtree(folder / "figures", ignore_errors=True)
    for source in [*(report / name for name in PUBLISHED), *pictures]:
        target = folder / source.relative_to(report)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="paper", description="The paper in miniature.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "paper", help="folder")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the three models")
    parser.add_argument("--reward", type=Path, help="reward model (MODELS/prm-tiny)")
    for flag, default, text in (
        ("--problems", NUM_PROBLEMS, "on the saturated server"),
        ("--latency-problems", LATENCY_PROBLEMS, "one at a time"),
        ("--num-samples", NUM_SAMPLES, "of each problem"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--rounds", type=int, help="in which the models take turns (3)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="B")
    parser.add_argument("--results", type=Path, help="also copy the report here (docs/results/...)")
    parser.add_argument(
        "--seed", type=int, help=f"of the samples; -1: drawn without ({DEFAULT_SEED})"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    options.out, options.models = options.out.resolve(), options.models.resolve()
    results_folder = options.results.resolve() if options.results else None
    if results_folder == options.out / "report":
        sys.stderr.write(f"error: --results {options.results}: that is the report's own folder\n")
        return 2
    options.reward = (options.reward or options.models / "prm-tiny").resolve()
    os.chdir(ROOT)  # the commands that the report quotes are relative to it
    os.environ.update(ENVIRONMENT)
    try:
        code = thinkfast_eval(compare_arguments(options))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if code:
        return code
    report = options.out / "report"
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    if results_folder:
        publish(report, results_folder)
    sys.stdout.write(f"\n{summary(results)}")
    sys.stdout.write(f"{_shown(report)}: report.html, report.md, points.csv, figures\n")
    sys.stdout.write(f"this call took {(time.monotonic() - started) / 60:.1f} minutes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
