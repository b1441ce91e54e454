"""``thinkfast-eval prm-study``: what Best-of-N and weighted Best-of-N lose with a worse reward.

Works on run folders with verdicts. Rewards are named as their score files are; one that is given as
a model (see ``thinkfast-eval reward``) is run first where scores are missing.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.analysis import Run, Settings, load_run
from lm_eval_tasks.commands.reward import load_and_score
from lm_eval_tasks.comparable import check_rewards_by_task, check_scored
from lm_eval_tasks.errors import stop
from lm_eval_tasks.estimators import reported_ks
from lm_eval_tasks.jsonl import write_atomically
from lm_eval_tasks.prm_study.degrade import LEVELS
from lm_eval_tasks.prm_study.evaluate import (
    Condition,
    Outcomes,
    ScoreTable,
    Study,
    conditions,
    study_run,
)
from lm_eval_tasks.rewards.aggregation import AGGREGATIONS
from lm_eval_tasks.rewards.phase import ScorePhase
from lm_eval_tasks.rewards.scores import read_scores, reward_names
from lm_eval_tasks.rewards.spec import parse_spec
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.scored import load_scored, refuse_early_stops
from lm_eval_tasks.tables import what_was_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="scored run folders")
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME|SPEC",
        help="name of scores in the runs, or a reward model as for thinkfast-eval reward; give "
        "several to swap them: losses are against the first (all scores that every run has)",
    )
    parser.add_argument(
        "--aggregation",
        choices=AGGREGATIONS,
        default="last",
        help="of the scores that are made worse; clean scores are compared under all (%(default)s)",
    )
    parser.add_argument(
        "--k", type=int, help="of table and figure (largest power of two up to half the samples)"
    )
    defaults = ", ".join(f"{f}={','.join(f'{x:g}' for x in v)}" for f, v in LEVELS.items())
    parser.add_argument(
        "--levels",
        nargs="+",
        default=[],
        metavar="FAMILY=L[,L...]",
        help=f"other levels of a family, or none: FAMILY= ({defaults})",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="of every random condition (%(default)s)"
    )
    parser.add_argument(
        "--num-subsets",
        type=int,
        default=256,
        help="random subsets per problem, k and repeat (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (%(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (prm-study in the one run, or beside them)"
    )
    parser.add_argument("--no-figure", action="store_true", help="leave the figure out")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    Raises:
        InputError: bad options, missing verdicts or scores, k above the number of samples.
    """
    _check(options)
    levels = _levels(options.levels)
    if not options.no_figure:
        from lm_eval_tasks.prm_study.figure import require_matplotlib

        require_matplotlib()
    rewards = _rewards(options)
    for reward in rewards:
        check_rewards_by_task(options.runs, reward)
    loaded = {str(folder): _load(folder, rewards) for folder in options.runs}
    runs = [load_run(folder, Settings()) for folder in options.runs]
    ks, k = _ks(options, loaded)
    study = Study(ks, options.num_subsets, options.repeats, options.seed)
    chosen = list(conditions(rewards, AGGREGATIONS, options.aggregation, levels))
    results = _study(loaded, chosen, study)
    text = _write(options, runs, results, rewards, study, k)
    sys.stdout.write(text)
    return 0


def _check(options: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--k", options.k, 1),
        ("--repeats", options.repeats, 1),
        ("--num-subsets", options.num_subsets, 2),
        ("--seed", options.seed, 0),
    ):
        if value is not None and value < least:
            stop(f"{flag} {value}: need a whole number of at least {least}")
    for folder in options.runs:
        if options.runs.count(folder) > 1:
            stop(f"{folder} is given twice")
        if not (folder / "config.json").is_file():
            stop(f"{folder} is no run folder (no config.json)")
        refuse_early_stops(folder, SampleStore(folder).config())  # before a model is loaded


def _levels(given: Sequence[str]) -> dict[str, tuple[float, ...]]:
    levels = dict(LEVELS)
    for text in given:
        family, equals, values = text.partition("=")
        if family not in LEVELS or not equals:
            stop(f"--levels {text}: need FAMILY=L[,L...] with one of {', '.join(LEVELS)}")
        try:
            numbers = tuple(float(value) for value in values.split(",") if value)
        except ValueError:
            stop(f"--levels {text}: levels must be numbers")
        most = math.inf if family == "noise" else 1.0
        if not all(0 <= number <= most and math.isfinite(number) for number in numbers):
            stop(f"--levels {text}: levels go from 0 {'up' if most > 1 else 'to 1'}")
        levels[family] = numbers
    return levels


def _rewards(options: argparse.Namespace) -> list[str]:
    """Return the names of the rewards, after scoring what a given model has not scored yet."""
    there = [set(reward_names(folder)) for folder in options.runs]
    common = set.intersection(*there)
    if not options.reward:
        if not common:
            stop(
                "the runs have no scores in common; make some with thinkfast-eval reward RUN... "
                "--reward SPEC, or give --reward SPEC here"
            )
        return sorted(common)
    names = []
    for given in options.reward:
        if given in common:
            names.append(given)
            continue
        spec = parse_spec(given)
        phases = [ScorePhase(folder, spec) for folder in options.runs]
        load_and_score(spec, phases, batch_size=64, command=options.command_line)
        names.append(spec.name)
    return list(dict.fromkeys(names))


def _load(
    folder: Path, rewards: Sequence[str]
) -> tuple[dict[str, Outcomes], dict[tuple[str, str], ScoreTable]]:
    """Return a run's outcomes and the clean scores by reward and aggregation."""
    outcomes: dict[str, Outcomes] = {}
    tables: dict[tuple[str, str], ScoreTable] = {}
    for reward in rewards:
        samples = load_scored(folder, reward)  # checks that verdicts and scores are complete
        check_scored(folder, reward, [one.score for drawn in samples.values() for one in drawn])
        steps = {record.key: record for record in read_scores(folder, reward)}
        outcomes = {
            name: Outcomes([s.answer_class for s in drawn], [s.correct for s in drawn])
            for name, drawn in samples.items()
        }
        for aggregation in AGGREGATIONS:
            tables[reward, aggregation] = [
                [steps[name, sample.sample_index].score(aggregation) for sample in drawn]
                for name, drawn in samples.items()
            ]
    return outcomes, tables


def _ks(
    options: argparse.Namespace, loaded: Mapping[str, tuple[dict[str, Outcomes], Any]]
) -> tuple[tuple[int, ...], int]:
    """Return all subset sizes, and that of table and figure."""
    least = math.inf
    for folder, (outcomes, _) in loaded.items():
        if not outcomes:
            stop(f"{folder} has no problem")
        name = min(outcomes, key=lambda one: len(outcomes[one].classes))
        count = len(outcomes[name].classes)
        if count < max(options.k or 1, 1):
            stop(
                f"{folder}: {name} has {count} samples, k is {options.k or 1}; draw more, or give "
                "a smaller --k"
            )
        least = min(least, count)
    num_samples = int(least)
    k = options.k or 2 ** max(0, (num_samples // 2).bit_length() - 1)
    return tuple(sorted({*reported_ks(num_samples), k})), k


def _study(
    loaded: Mapping[str, tuple[dict[str, Outcomes], dict[tuple[str, str], ScoreTable]]],
    chosen: Sequence[Condition],
    study: Study,
) -> list[dict[str, Any]]:
    total, done = len(loaded) * len(chosen), 0
    is_terminal = sys.stderr.isatty()

    def report() -> None:
        nonlocal done
        done += 1
        if is_terminal:
            sys.stderr.write(f"{done}/{total} conditions\r")
            sys.stderr.flush()

    results = []
    for folder, (outcomes, tables) in loaded.items():
        config = SampleStore(folder).config()
        head = {"name": config.get("name", folder), "run": folder}
        head["config_hash"] = config["config_hash"]
        results.append(head | study_run(outcomes, tables, chosen, study, report))
    if is_terminal:
        sys.stderr.write("\n")
    return results


def _write(
    options: argparse.Namespace,
    runs: Sequence[Run],
    results: list[dict[str, Any]],
    rewards: Sequence[str],
    study: Study,
    k: int,
) -> str:
    """Write JSON, table and figure; return what is printed."""
    from lm_eval_tasks.prm_study.table import render
    from lm_eval_tasks.sampling import environment

    first: Path = options.runs[0]
    folder: Path = options.out or (first if len(options.runs) == 1 else first.parent) / "prm-study"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out {folder}: cannot be made ({error.strerror})")
    document = {
        "command": options.command_line,
        "settings": {
            "rewards": list(rewards),
            "reference": {"reward": rewards[0], "aggregation": options.aggregation},
            "aggregation": options.aggregation,
            "k": k,
            "ks": list(study.ks),
            "num_subsets": study.num_subsets,
            "repeats": study.repeats,
            "seed": study.seed,
        },
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "git_commit": environment.git_commit(),
        "runs": [one | {"facts": run.facts} for one, run in zip(results, runs, strict=True)],
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "prm_study.json", text)
    doubts = what_was_run(
        "latency" if any(run.config["regime"] == "latency" for run in runs) else "saturated",
        [{"name": run.name, "facts": run.facts} for run in runs],
    )
    table = f"{render(results, k)}\n### {doubts.title}\n\n{doubts.markdown()}"
    write_atomically(folder / "prm_study.md", table)
    if not options.no_figure:
        from lm_eval_tasks.prm_study.figure import draw

        draw(results, k, folder)
    return text if options.json else f"{table}\nwritten to {folder}\n"
