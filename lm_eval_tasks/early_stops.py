"""What a run with early stops gives, and what it saves against a uniform run.

Such a run (``thinkfast-eval sample --stop-error``) has as many samples of a problem as its answers
asked for. Sound is what the policy itself did: the vote of each problem at its stop, and what was
spent on the way. Expectations over subsets and orders are not; docs/metrics.md says why.

Against a *uniform run*, which has the same number of samples of every problem, the policies are
compared twice: with the uniform vote of as many samples as the cap, and at equal accuracy, with the
smallest k at which the uniform run's maj@k reaches the accuracy of the stopped votes.

Shapes: P problems, D bootstrap draws, K subset sizes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_tasks.analysis import Run, Settings, load_run
from lm_eval_tasks.errors import stop
from lm_eval_tasks.estimators import (
    bootstrap,
    majority_at_k,
    paired_difference,
    reported_ks,
    resample_counts,
)
from lm_eval_tasks.figures import Figure, Series
from lm_eval_tasks.scored import ScoredSample
from lm_eval_tasks.stopping import End, StopRule
from lm_eval_tasks.tables import Table, what_was_run
from lm_eval_tasks.voting import vote

Floats = NDArray[np.float64]

LEVEL, DRAWS = 0.95, 2000
_MOST_KS = 64
#: What a uniform run must have in common with the run that it is compared with.
_SAME = (
    *("model_id", "task", "task_version", "data_sha256", "prompt"),
    *("temperature", "top_p", "max_tokens", "regime"),
)
_ENDS: dict[End, str] = {
    "level": "decided at the error level",
    "certain": "decided: the remaining samples could not change the vote",
    "cap": "all samples drawn, not decided at the level",
}


def load_stopped(folder: Path, uniform: Path | None = None, draws: int = DRAWS) -> dict[str, Any]:
    """Return the numbers of a run with early stops.

    Args:
        folder: the run folder.
        uniform: a run without early stops to compare it with.
        draws: bootstrap resamples of the problems.

    Raises:
        InputError: it has no early stops, is not finished or not scored, or the other run does not
            fit it.
    """
    run = load_run(folder, Settings(), with_early_stops=True)
    found = _describe(run, draws)
    if uniform is not None:
        other = load_run(uniform, Settings(), whole=True)  # an unfinished one is refused
        found["against"] = _compare(run, other, draws)
    return found


def _describe(run: Run, draws: int) -> dict[str, Any]:
    rule = StopRule.of(run.config)
    if rule is None:
        stop(
            f"{run.folder} was drawn without early stops; thinkfast-eval adaptive replays such "
            "runs, without --against"
        )
    cap = int(run.config["num_samples"])
    ends = _ends(run, rule, cap)
    stops = Counter(map(len, run.samples.values()))
    values = _votes(run)
    drawn = np.array([len(samples) for samples in run.samples.values()], dtype=np.float64)
    seconds = _seconds(run)
    (accuracy,) = bootstrap(values, LEVEL, draws)
    (per_problem,) = bootstrap(drawn, LEVEL, draws)
    (seconds_per_problem,) = bootstrap(seconds, LEVEL, draws)
    rows = []
    for count in sorted(stops):
        names = [name for name, samples in run.samples.items() if len(samples) == count]
        here = Counter(ends[name] for name in names)
        right = [values[i] for i, s in enumerate(run.samples.values()) if len(s) == count]
        rows.append(
            {"samples": count, "problems": len(names), "accuracy": math.fsum(right) / len(right)}
            | {end: here[end] for end in _ENDS}
        )
    return {
        "run": run.name,
        "folder": str(run.folder),
        "config": run.config,
        "sessions": run.sessions,
        "grading": run.grading,
        "facts": run.facts,
        "stop_error": rule.error,
        "stop_every": rule.every,
        "cap": cap,
        "draws": draws,
        "num_problems": len(values),
        "num_samples": int(drawn.sum()),
        "accuracy": asdict(accuracy),
        "samples_per_problem": asdict(per_problem),
        "seconds_per_problem": asdict(seconds_per_problem),
        "seconds": float(seconds.sum()),
        "idle_s": _fact(run, "idle_s"),
        "unfilled_s": _fact(run, "unfilled_s"),
        "grading_s": _fact(run, "grading_s"),
        "ends": {end: sum(found == end for found in ends.values()) for end in _ENDS},
        "stops": rows,
    }


def _ends(run: Run, rule: StopRule, cap: int) -> dict[str, End]:
    """Return why each problem has no further samples.

    Raises:
        InputError: a problem is open, so that the run is not finished.
    """
    ends: dict[str, End] = {}
    num_open = 0
    for name, samples in run.samples.items():
        votes = Counter(one.answer_class for one in samples if one.answer_class is not None)
        indices = {one.sample_index for one in samples}
        end = rule.end(votes.values(), len(samples), cap)
        if end is None or not rule.is_at_border(indices, cap):
            num_open += 1
        else:
            ends[name] = end
    if num_open:
        stop(
            f"{run.folder}: {num_open} of {len(run.samples)} problems are still open; finish "
            "thinkfast-eval sample with the same options, it resumes"
        )
    return ends


def _votes(run: Run) -> list[float]:
    """Return what the vote of each problem's samples is worth; ties as in `voting.vote`."""
    return [
        vote([one.answer_class for one in samples], [one.correct for one in samples])
        for samples in run.samples.values()
    ]


def _seconds(run: Run) -> Floats:
    """Return the server seconds of each problem, (P,).

    Seconds in which the server waited for decisions are nobody's cost; they are shared in
    proportion.
    """
    costs = np.array([_cost(samples) for samples in run.samples.values()])
    busy = costs.sum()
    return costs * (busy + (_fact(run, "idle_s") or 0.0)) / busy if busy else costs


def _cost(samples: Sequence[ScoredSample]) -> float:
    return math.fsum(one.cost_s for one in samples)


def _fact(run: Run, name: str) -> float | None:
    """Return the sum of a fact over the sessions that know it."""
    known = [session[name] for session in run.sessions if name in session]
    return math.fsum(known) if known else None


# -- against a uniform run ------------------------------------------------------------------------


def _compare(run: Run, uniform: Run, draws: int) -> dict[str, Any]:
    _check_pair(run, uniform)
    cap = int(run.config["num_samples"])
    pairs = [uniform.samples[name] for name in run.samples]
    num_samples = len(pairs[0])
    full = min(cap, num_samples)
    ks = _chosen_ks(num_samples, full)
    table = np.array(
        [
            majority_at_k([one.answer_class for one in s], [one.correct for one in s], ks).values
            for s in pairs
        ]
    )  # (P, K)
    at_full = table[:, ks.index(full)]
    values = np.array(_votes(run))
    difference, stderr = paired_difference(values.tolist(), at_full.tolist(), LEVEL, draws)
    count = len(values)
    counts = np.concatenate([np.ones((1, count)), resample_counts(count, draws)])
    drawn = counts @ np.array([len(samples) for samples in run.samples.values()]) / count
    seconds = counts @ _seconds(run) / count
    unit_s = counts @ np.array([_cost(s) / len(s) for s in pairs]) / count  # of a uniform sample
    curve = counts @ table / count
    targets = counts @ values / count
    # The smallest k that has the accuracy of the stopped votes, in every draw; inf: none has.
    has_it = curve >= targets[:, None] - 1e-12
    equal = np.where(has_it.any(axis=1), np.array(ks)[has_it.argmax(axis=1)], math.inf)
    (accuracy,) = bootstrap(at_full, LEVEL, draws)
    return {
        "run": uniform.name,
        "folder": str(uniform.folder),
        "config": uniform.config,
        "sessions": uniform.sessions,
        "grading": uniform.grading,
        "facts": uniform.facts,
        "num_samples": num_samples,
        "k": full,
        "accuracy": asdict(accuracy),
        "difference": asdict(difference) | {"stderr": stderr},
        "samples_saved": _interval(1 - drawn / full),
        "seconds_saved": _interval(1 - seconds / (full * unit_s)),
        "equal": {
            "k": _interval(equal),
            "samples_saved": _interval(_saved(drawn, equal)),
            "seconds_saved": _interval(_saved(seconds, equal * unit_s)),
            "share_not_reached": float(np.isinf(equal[1:]).mean()),
        },
        "differences": [
            field
            for field in ("engine", "seed", "versions", "hardware")
            if run.config.get(field) != uniform.config.get(field)
        ],
    }


def _check_pair(run: Run, uniform: Run) -> None:
    """Refuse a run of another model, other settings or other problems, or an unfinished one.

    Raises:
        InputError: it does not fit.
    """
    for field in _SAME:
        here, there = run.config.get(field), uniform.config.get(field)
        if here != there:
            stop(
                f"--against {uniform.folder}: {field} is {there!r} there and {here!r} in "
                f"{run.folder}; need a run of the same model, problems and sampling settings"
            )
    missing = [name for name in run.samples if name not in uniform.samples]
    if missing:
        stop(
            f"--against {uniform.folder}: {len(missing)} of {len(run.samples)} problems are not "
            f"in it (first: {missing[0]}); need a run of the same problems"
        )
    wanted = int(uniform.config["num_samples"])
    short = [name for name in run.samples if len(uniform.samples[name]) != wanted]
    if short:
        # What is there of them is what finished first: short texts.
        stop(
            f"--against {uniform.folder}: {len(short)} of {len(run.samples)} problems do not have "
            f"their {wanted} samples (first: {short[0]}, {len(uniform.samples[short[0]])}); finish "
            "thinkfast-eval sample with the same options, it resumes"
        )


def _chosen_ks(num_samples: int, full: int) -> list[int]:
    """Return the subset sizes of the uniform run: all of them, or evenly spaced ones."""
    step = -(-num_samples // _MOST_KS)
    return sorted({*reported_ks(num_samples), *range(step, num_samples + 1, step), full})


def _saved(spent: Floats, uniform: Floats) -> Floats:
    """Return the share saved; inf where the uniform run does not come that far."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(uniform), math.inf, 1 - spent / uniform)


def _interval(draws: Floats) -> dict[str, float | None]:
    """Return the value of all problems and percentiles of the draws; None: not reached."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws[1:], [tail, 1 - tail], method="inverted_cdf")
    numbers = {"value": float(draws[0]), "low": float(low), "high": float(high)}
    return {end: number if math.isfinite(number) else None for end, number in numbers.items()}


def summary(run: dict[str, Any]) -> str:
    """Return the numbers of a run as a few lines of text.

    Args:
        run: of `load_stopped`.
    """
    accuracy, ends = run["accuracy"], run["ends"]
    return (
        f"{run['folder']}: early stops at error level {run['stop_error']:g}, "
        f"{run['num_problems']} problems\n"
        f"accuracy of the votes at their stops {accuracy['value']:.4f} "
        f"({accuracy['low']:.4f} to {accuracy['high']:.4f}), {_spent(run)} samples, "
        f"{run['seconds']:.4g} server seconds\n"
        f"{ends['level']} problems decided at the level, {ends['certain']} because the rest cannot "
        f"change the vote, {ends['cap']} with all samples drawn\n"
        f"no pass@k or maj@k: the number of samples depends on the answers; see thinkfast-eval "
        f"adaptive {run['folder']}"
    )


# -- tables ---------------------------------------------------------------------------------------


def tables_of(runs: Sequence[dict[str, Any]]) -> list[Table]:
    """Return the tables of a report.

    Args:
        runs: of `load_stopped`.
    """
    found = [_stopped(runs), _borders(runs)]
    if any("against" in run for run in runs):
        found.append(_against([run for run in runs if "against" in run]))
    facts = [{"name": run["run"], "facts": run["facts"]} for run in runs]
    facts += [
        {"name": run["against"]["run"], "facts": run["against"]["facts"]}
        for run in runs
        if "against" in run
    ]
    return [*found, what_was_run("saturated", facts)]


def _stopped(runs: Sequence[dict[str, Any]]) -> Table:
    cells: list[list[str]] = [
        ["error level", *(f"{run['stop_error']:g}" for run in runs)],
        ["looked at after every", *(f"{run['stop_every']} samples" for run in runs)],
        ["samples of a problem at most", *(str(run["cap"]) for run in runs)],
        ["problems", *(str(run["num_problems"]) for run in runs)],
        ["accuracy of the vote at its stop [%]", *(_text(r["accuracy"], 100, 1) for r in runs)],
        ["samples per problem", *(_text(run["samples_per_problem"], 1, 2) for run in runs)],
        ["samples", *(_spent(run) for run in runs)],
        ["server seconds per problem", *(_text(r["seconds_per_problem"], 1, 4) for r in runs)],
        ["server seconds", *(f"{run['seconds']:.4g}" for run in runs)],
    ]
    for name, title in (
        ("idle_s", "of them waiting for decisions, nothing under way"),
        ("unfilled_s", "seconds with a free place in the batch and no sample to draw"),
        ("grading_s", "seconds of judging, beside the engine"),
    ):
        known = [run[name] for run in runs]
        cells.append([title, *("unknown" if s is None else f"{s:.3g}" for s in known)])
    for end, title in _ENDS.items():
        cells.append([title, *(str(run["ends"][end]) for run in runs)])
    note = (
        "In brackets 95% bootstrap intervals over problems. The number of samples depends on the "
        "answers, so there is no pass@k or other estimate over subsets of this run; the error "
        "level is a posterior probability for one look."
    )
    header = ["", *(run["run"] for run in runs)]
    return Table("Votes at their stops", header, cells, note)


def _spent(run: dict[str, Any]) -> str:
    most = run["num_problems"] * run["cap"]
    return f"{run['num_samples']} of at most {most} ({100 * run['num_samples'] / most:.1f} %)"


def _borders(runs: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [run["run"], str(row["samples"]), str(row["problems"]), f"{100 * row['accuracy']:.1f} %"]
        + [str(row[end]) for end in _ENDS]
        for run in runs
        for row in run["stops"]
    ]
    header = ["run", "stopped after", "problems", "their votes right", "level", "certain", "cap"]
    return Table("Problems by the number of their samples", header, rows)


def _against(runs: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for run in runs:
        other = run["against"]
        equal, full = other["equal"], other["k"]
        lines = {
            f"accuracy of {other['run']}, {full} samples [%]": _text(other["accuracy"], 100, 1),
            "difference of the stopped votes [points]": _text(other["difference"], 100, 2),
            f"samples saved against all {full} [%]": _text(other["samples_saved"], 100, 1),
            f"server seconds saved against all {full} [%]": _text(other["seconds_saved"], 100, 1),
            "uniform samples per problem for equal accuracy": _text(equal["k"], 1, 0),
            "samples saved at equal accuracy [%]": _text(equal["samples_saved"], 100, 1),
            "server seconds saved at equal accuracy [%]": _text(equal["seconds_saved"], 100, 1),
            "draws in which uniform sampling does not reach it": (
                f"{100 * equal['share_not_reached']:.0f} %"
            ),
        }
        rows += [[run["run"], title, text] for title, text in lines.items()]
    note = (
        "Uniform: the majority vote of k samples of every problem, expected over all subsets. At "
        "equal accuracy: the smallest k at which it has the accuracy of the stopped votes, taken "
        "anew in each draw; negative: more was spent than saved. In brackets 95% bootstrap "
        "intervals, paired over problems; they know nothing of timing noise between the two runs."
    )
    changed = sorted({field for run in runs for field in run["against"]["differences"]})
    if changed:
        note += f" Not the same in both runs: {', '.join(changed)}."
    return Table("Against uniform sampling", ["run", "", ""], rows, note)


def _text(interval: dict[str, float | None], scale: float, digits: int) -> str:
    never = "not reached"
    value, low, high = (
        never if interval[end] is None else f"{scale * (interval[end] or 0.0):.{digits}f}"
        for end in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def figures_of(runs: Sequence[dict[str, Any]]) -> list[Figure]:
    """Return the figure of a report: how many problems are undecided after how many samples."""
    lines = []
    for i, run in enumerate(runs):
        left, x, y = run["num_problems"], [1.0], [1.0]
        for row in run["stops"]:
            x += 2 * [float(row["samples"])]  # a step: nothing is decided between borders
            y.append(left / run["num_problems"])
            left -= row["level"] + row["certain"]
            y.append(left / run["num_problems"])
        lines.append(Series(f"{run['run']}, error {run['stop_error']:g}", x, y, colour=i % 6))
    return [
        Figure(
            "early-stops",
            "Problems whose vote is not decided",
            "samples per problem",
            "undecided problems [%]",
            lines,
            note="the end of a line: those that had all samples and stayed undecided",
        )
    ]
