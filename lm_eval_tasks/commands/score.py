"""``thinkfast-eval score``: judge stored samples, and show what they are worth for each k.

Writes ``verdicts.jsonl`` and ``classes.jsonl`` into each run folder (`lm_eval_tasks.verdicts`) and
prints a table; of a run with early stops the accuracy of the votes alone. Needs neither the model
nor the data set, and no torch, vllm or lm-eval.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval_tasks.comparable import check_rewards_by_task, check_scored
from lm_eval_tasks.early_stops import load_stopped, summary
from lm_eval_tasks.errors import stop
from lm_eval_tasks.estimators import mean_and_stderr, reported_ks
from lm_eval_tasks.rewards.aggregation import AGGREGATIONS
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.scored import load_scored_run, rate_over_problems, say_unfinished
from lm_eval_tasks.scoring import ProblemScore, grading_of, method_values
from lm_eval_tasks.stopping import StopRule
from lm_eval_tasks.verdicts import score_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--k",
        metavar="K,K...",
        help="subset sizes (default: powers of two up to N, and N)",
    )
    parser.add_argument(
        "--reward",
        metavar="NAME",
        help="also Best-of-N and weighted Best-of-N with these scores (files in RUN/scores)",
    )
    parser.add_argument(
        "--aggregation",
        choices=AGGREGATIONS,
        default="last",
        help="step scores to the score of a solution (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


@dataclass(frozen=True)
class RunScores:
    """The numbers of one run."""

    run: str
    task: str
    task_version: str
    num_problems: int
    num_samples: int
    """N: samples that every problem has; some may have more, which are used."""
    no_answer: float
    """Share of samples without an answer, mean over problems, as the other rates."""
    truncated: float
    gen_tokens: float
    metrics: dict[str, dict[str, float]]
    """Metric key to ``mean``, ``stderr`` over problems, and ``mc_stderr`` of the random subsets."""
    unfinished: str | None = None
    """What of an unfinished run is used."""


def run(options: argparse.Namespace) -> int:
    """Score the runs and print their tables."""
    if options.reward is not None:
        check_rewards_by_task(options.runs, options.reward)
    results: list[RunScores | dict[str, Any]] = []
    for folder in options.runs:
        try:
            counts = score_run(folder, getattr(options, "command_line", None))
        except (ImportError, RuntimeError) as error:
            stop(
                f"{error}; {folder} cannot be judged: mend that, then run the same command again, "
                "it resumes"
            )
        done = f"{counts.num_new} of {counts.num_samples} samples judged now"
        sys.stderr.write(f"{folder}: {done}\n")
        config = SampleStore(folder).config()
        if StopRule.of(config) is None or options.k is not None or options.reward is not None:
            results.append(evaluate_run(folder, options.k, options.reward, options.aggregation))
        else:
            results.append(load_stopped(folder))
    if options.json:
        rows = [asdict(found) if isinstance(found, RunScores) else found for found in results]
        found = {"command": getattr(options, "command_line", None), "runs": rows}
        text = json.dumps(_without_nan(found), indent=2, ensure_ascii=False)
    else:
        text = "\n\n".join(
            table(found) if isinstance(found, RunScores) else summary(found) for found in results
        )
    sys.stdout.write(text + "\n")
    return 0


def evaluate_run(
    folder: Path, ks: str | None = None, reward: str | None = None, aggregation: str = "last"
) -> RunScores:
    """Return the numbers of a run whose samples are judged.

    Args:
        folder: the run folder.
        ks: subset sizes separated by commas; None for the usual ones.
        reward: name of the scores to weight votes with; None leaves out bon and weighted_bon.
        aggregation: of the step scores.

    Raises:
        InputError: as for `load_scored_run`; no samples, a k above the number of samples, or no
            sample with a reward.
    """
    loaded = load_scored_run(folder, reward, aggregation)
    say_unfinished(folder, loaded.unfinished)
    scored = loaded.samples
    if not scored:
        stop(f"{folder}: no problems; run thinkfast-eval sample first")
    fewest = min(scored, key=lambda name: len(scored[name]))
    num_samples = len(scored[fewest])
    if reward is not None:
        check_scored(folder, reward, [one.score for drawn in scored.values() for one in drawn])
    chosen = reported_ks(num_samples) if ks is None else _parse_ks(ks)
    if max(chosen) > num_samples:
        stop(
            f"--k {max(chosen)}: {fewest} in {folder} has {num_samples} samples; give k of at most "
            f"{num_samples}, or draw more with thinkfast-eval sample --num-samples {max(chosen)}"
        )
    problems = [
        ProblemScore(
            classes=[sample.answer_class for sample in samples],
            is_correct=[sample.correct for sample in samples],
            scores=[sample.score for sample in samples] if reward else None,
        )
        for samples in scored.values()
    ]
    methods = ("pass", "maj", "bon", "weighted_bon") if reward else ("pass", "maj")
    metrics = {}
    for method in methods:
        values = [method_values(problem, method, chosen) for problem in problems]
        for i, k in enumerate(chosen):
            mean, stderr = mean_and_stderr([row[i][0] for row in values])
            error = math.sqrt(math.fsum(row[i][1] ** 2 for row in values)) / len(values)
            is_voted = reward is not None and method in ("bon", "weighted_bon")
            name = f"{method}@{k}" + (f"[prm={reward},{aggregation}]" if is_voted else "")
            metrics[name] = {"mean": mean, "stderr": stderr, "mc_stderr": error}
    config = SampleStore(folder).config()
    return RunScores(
        run=str(folder),
        task=config["task"],
        task_version=grading_of(config["task"]).version_of(config["task_version"]),
        num_problems=len(scored),
        num_samples=num_samples,
        no_answer=rate_over_problems(scored.values(), lambda one: one.answer_class is None),
        truncated=rate_over_problems(scored.values(), lambda one: one.is_truncated),
        gen_tokens=rate_over_problems(scored.values(), lambda one: one.num_tokens),
        metrics=metrics,
        unfinished=None if loaded.unfinished is None else loaded.unfinished.sentence,
    )


def table(scores: RunScores) -> str:
    """Return a run's numbers as text: one line per k, one column per method."""
    columns: dict[str, dict[int, dict[str, float]]] = {}
    for name, found in scores.metrics.items():
        method, _, rest = name.partition("@")
        number, bracket, label = rest.partition("[")
        columns.setdefault(f"{method}@k{bracket}{label}", {})[int(number)] = found
    lines = [["k", *columns]]
    for k in next(iter(columns.values())):
        lines.append([str(k), *(_cell(by_k[k]) for by_k in columns.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    head = (
        f"{scores.run}: {scores.task} ({scores.task_version}), {scores.num_problems} problems x "
        f"{scores.num_samples} samples\n"
        f"no answer {scores.no_answer:.1%}, truncated {scores.truncated:.1%}, "
        f"{scores.gen_tokens:.0f} tokens per sample"
    )
    if scores.unfinished:
        head += f"\nnot finished: {scores.unfinished}"
    body = [
        "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in lines
    ]
    foot = "+- standard error over problems; (mc) error of the random subsets, 0 where not given"
    return "\n".join([head, *body, foot])


def _cell(found: dict[str, float]) -> str:
    text = f"{found['mean']:.4f} +- {found['stderr']:.4f}"
    return text + (f" (mc {found['mc_stderr']:.4f})" if found["mc_stderr"] else "")


def _parse_ks(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        stop(f"--k {text}: need whole numbers of at least 1, separated by commas, such as 1,8,64")
    return sorted({int(part) for part in parts})


def _without_nan(value: Any) -> Any:
    """Replace NaN by null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, str | int) or value is None:
        return value
    return [_without_nan(inner) for inner in value]
