"""From run folders to the numbers of a report: one JSON object, which tables and figures read.

Runs of the same task, version and regime form a group; inside a group all comparisons are over the
problems that every run has, and paired.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_tasks.budget import (
    MAX_EXHAUSTED,
    NUM_ORDERS,
    REWARD_METHODS,
    BudgetCurve,
    largest_budget,
    latency_curve,
    saturated_curve,
)
from lm_eval_tasks.comparable import check_problems, check_rewards, check_scored
from lm_eval_tasks.costs import Occupancy, token_throughput
from lm_eval_tasks.curves import (
    DRAWS,
    LEVEL,
    band,
    envelope,
    log_grid,
    pareto_front,
    times_to_target,
)
from lm_eval_tasks.errors import stop
from lm_eval_tasks.estimators import bootstrap, reported_ks
from lm_eval_tasks.provenance import CONDITIONS, read_grading, read_reward, values_of
from lm_eval_tasks.rewards.scores import reward_names
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.scored import (
    ScoredSample,
    load_scored_run,
    rate_over_problems,
    say_unfinished,
)
from lm_eval_tasks.scoring import ProblemScore, method_values
from lm_eval_tasks.throughput import read_throughput
from lm_eval_tasks.timing import caches_of, loads_of, rounds_of, slowness, timing_spread

Floats = NDArray[np.float64]

_GRID_POINTS = 160
#: Method against k in `scoring.METHODS` -> against seconds in `budget.METHODS`.
_OVER_SECONDS = {"pass": "coverage", "maj": "maj", "bon": "bon", "weighted_bon": "weighted_bon"}


@dataclass(frozen=True)
class Settings:
    """How the numbers are computed."""

    reward: str | None = None
    """Name of the reward whose scores weigh votes; None: no Best-of-N."""
    aggregation: str = "last"
    with_reward_time: bool = False
    """Count the reward model's seconds in curves of methods that use it."""
    level: float = LEVEL
    draws: int = DRAWS
    num_orders: int = NUM_ORDERS
    max_exhausted: float = MAX_EXHAUSTED
    seed: int = 0
    window: tuple[float, float] | None = None
    """Seconds between which areas are taken; None: see docs/metrics.md."""

    @property
    def methods(self) -> list[str]:
        """Methods that can be computed, in the order of tables, in the words of `scoring`."""
        return ["pass", "maj", *(REWARD_METHODS if self.reward else ())]


@dataclass(frozen=True)
class Run:
    """A run folder as the report needs it."""

    folder: Path
    name: str
    config: dict[str, Any]
    sessions: list[dict[str, Any]]
    samples: dict[str, list[ScoredSample]]
    """By problem."""
    occupancy: Occupancy
    facts: dict[str, Any]
    throughput: list[dict[str, Any]]
    grading: list[dict[str, Any]]
    """Lines of grading.jsonl: who judged the samples."""
    reward: dict[str, Any] | None
    """Which reward model made the scores, see `lm_eval_tasks.provenance.read_reward`."""

    @property
    def reward_hash(self) -> str | None:
        """Of the reward model whose scores these are; None without scores."""
        return None if self.reward is None else self.reward["reward_hash"]

    @property
    def group(self) -> tuple[str, str, str]:
        """What must agree for two runs to be compared."""
        return (self.config["task"], self.config["task_version"], self.config["regime"])


def load_run(
    folder: Path, settings: Settings, with_early_stops: bool = False, whole: bool = False
) -> Run:
    """Read a scored run folder.

    Args:
        folder: the run folder.
        settings: which reward is wanted.
        with_early_stops: see `lm_eval_tasks.scored.load_scored_run`.
        whole: see there; else what of an unfinished run is used is said on stderr.

    Raises:
        InputError: it is no run folder, is not scored, or a problem has no sample.
    """
    store = SampleStore(folder)
    config = store.config()
    if settings.reward is not None and settings.reward not in reward_names(folder):
        known = ", ".join(reward_names(folder)) or "none"
        stop(
            f"--reward {settings.reward}: {folder} has no such scores (there: {known}); make them "
            f"with thinkfast-eval reward {folder} --reward SPEC"
        )
    scored = load_scored_run(folder, settings.reward, settings.aggregation, with_early_stops, whole)
    samples, records, occupancy = scored.samples, scored.records, scored.occupancy
    say_unfinished(folder, scored.unfinished)
    empty = [name for name, drawn in samples.items() if not drawn]
    if empty:
        stop(
            f"{folder}: {len(empty)} of {len(samples)} problems have no sample yet ({empty[0]}, "
            "...); finish it with the thinkfast-eval sample command in its config.json"
        )
    sessions = store.sessions()
    flat = [one for drawn in samples.values() for one in drawn]
    prompt_tokens = sum(record.num_prompt_tokens for record in records)
    cached = [record.num_cached_tokens for record in records]
    known_cached = [count for count in cached if count is not None]
    counts = [len(drawn) for drawn in samples.values()]
    facts = {  # what the server did, by all that is stored: of an unfinished run that is more
        "num_problems": len(samples),
        "num_samples": len(flat),
        "seed": config["seed"],
        "fewest_samples": min(counts),
        "most_samples": max(counts),
        "distinct_texts": scored.num_distinct_texts / len(records),
        "truncated": rate_over_problems(samples.values(), lambda one: one.is_truncated),
        "no_answer": rate_over_problems(samples.values(), lambda one: one.answer_class is None),
        "tokens_per_sample": rate_over_problems(samples.values(), lambda one: one.num_tokens),
        "prompt_tokens_per_sample": prompt_tokens / len(records),
        "prefix_cache_hits": sum(known_cached) / prompt_tokens
        if len(known_cached) == len(cached) and prompt_tokens
        else None,
        "effective_batch_size": occupancy.effective_batch_size,
        "has_first_tokens": occupancy.has_first_tokens,
        "busy_s": occupancy.busy_s,
        "drain_share": occupancy.drain_s / occupancy.busy_s if occupancy.busy_s else 0.0,
        "tokens_per_s": token_throughput(records, occupancy),
        "server_s_per_sample": occupancy.busy_s / len(records),
        "preemptions": _total(sessions, "num_preemptions"),
        "num_sessions": len(sessions),
        "startup_s": _total(sessions, "startup_s"),
        "warmup_s": _total(sessions, "warmup_s"),
        "resumed_problems": len({p for s in sessions for p in s.get("resumed_problems", [])}),
        "load": loads_of(records),
        "rounds": rounds_of(sessions, records, scored.costs),
        "caches": caches_of(sessions),
    }
    if scored.unfinished is not None:
        facts["unfinished"] = scored.unfinished.sentence
    return Run(
        folder=folder,
        name=config["name"],
        config=config,
        sessions=sessions,
        samples=samples,
        occupancy=occupancy,
        facts=facts,
        throughput=read_throughput(folder),
        grading=read_grading(folder),
        reward=None if settings.reward is None else read_reward(folder, settings.reward),
    )


def _total(sessions: Sequence[dict[str, Any]], field: str) -> float | None:
    """Return the sum of a fact over sessions, None unless all know it."""
    values = [session.get(field) for session in sessions]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def analyse(runs: Sequence[Run], settings: Settings) -> list[dict[str, Any]]:
    """Return the groups of a report, in the order in which their first runs are given.

    Raises:
        InputError: two runs of a group have one name, share no problem, have other problems under
            the same names or scores of different reward models under one name, or a reward has no
            score for any sample of a run.
    """
    runs = _charge_reward_by_token(runs)
    named = [(*run.group, run.name) for run in runs]
    for key in named:
        if named.count(key) > 1:
            stop(f"two runs are named {key[-1]}; give one another name in its config.json")
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return [_analyse_group(key, members, settings) for key, members in groups.items()]


def _charge_reward_by_token(runs: Sequence[Run]) -> list[Run]:
    """Give all samples one price per token that the reward model read.

    It reads the runs one after another. What the machine does meanwhile would pass for a difference
    between them, though reading a token costs the same whoever wrote it. Every reward model has its
    own price. Scores of earlier versions, which do not say how many tokens were read, keep the
    measured seconds, and so do all others of their reward model.
    """
    of_reward: dict[str | None, list[ScoredSample]] = {}
    for run in runs:
        read = [one for drawn in run.samples.values() for one in drawn if one.reward_s is not None]
        of_reward.setdefault(run.reward_hash, []).extend(read)
    prices: dict[str | None, float] = {}
    for reward_hash, read in of_reward.items():
        tokens = sum(one.reward_tokens or 0 for one in read)
        if tokens and all(one.reward_tokens is not None for one in read):
            prices[reward_hash] = math.fsum(one.reward_s or 0.0 for one in read) / tokens

    def charged(one: ScoredSample, price: float) -> ScoredSample:
        return replace(
            one,
            reward_s=None if one.reward_s is None else price * (one.reward_tokens or 0),
            measured_reward_s=one.reward_s,
        )

    return [
        replace(
            run,
            samples={
                name: [charged(one, prices[run.reward_hash]) for one in drawn]
                for name, drawn in run.samples.items()
            },
        )
        if run.reward_hash in prices
        else run
        for run in runs
    ]


def _analyse_group(
    key: tuple[str, str, str], runs: list[Run], settings: Settings
) -> dict[str, Any]:
    check_rewards([(run.folder, run.reward) for run in runs])
    shared = [p for p in runs[0].samples if all(p in run.samples for run in runs)]
    if not shared:
        stop(f"{', '.join(run.name for run in runs)}: no problem is in all of these runs")
    check_problems([run.folder for run in runs], shared)
    problems = {run.name: [run.samples[p] for p in shared] for run in runs}
    for run in runs:
        if run.reward is not None:
            scores = [one.score for drawn in problems[run.name] for one in drawn]
            check_scored(run.folder, run.reward["name"], scores)
    group: dict[str, Any] = {
        "task": key[0],
        "task_version": key[1],
        "regime": key[2],
        "baseline": runs[0].name,
        "num_problems": len(shared),
        "problems": shared,
        "problems_left_out": {run.name: len(run.samples) - len(shared) for run in runs},
        "differences": _differences(runs),
        "runs": [_describe(run, problems[run.name], settings) for run in runs],
    }
    rounds = {run.name: run.facts["rounds"] for run in runs}
    timed = _TimedGroup(key[2], problems, rounds, settings)
    group |= timed.results()
    return group


_SAME = ("temperature", "top_p", "max_tokens", "num_samples", "data_sha256", "prompt")


def _differences(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return the settings that a fair comparison would have in common and these runs have not."""
    candidates: dict[str, dict[str, Any]] = {}
    for field in (*_SAME, "engine"):
        candidates[field] = {run.name: run.config.get(field) for run in runs}
    for field in CONDITIONS:
        candidates[field] = {run.name: values_of(run.sessions, run.config, field) for run in runs}
    candidates["reward"] = {
        run.name: run.reward and run.reward["description"].get("resolved") for run in runs
    }
    found = {
        field: values
        for field, values in candidates.items()
        if any(value != values[runs[0].name] for value in values.values())
    }
    seeds = {run.name: run.config["seed"] for run in runs}
    if len({seed is None for seed in seeds.values()}) > 1:  # vLLM draws seeded samples slower
        found["seed"] = seeds
    return found


def _describe(
    run: Run, problems: Sequence[Sequence[ScoredSample]], settings: Settings
) -> dict[str, Any]:
    """Return what a report says about one run: facts, settings and metrics against k."""
    judged = [
        ProblemScore(
            classes=[one.answer_class for one in drawn],
            is_correct=[one.correct for one in drawn],
            scores=[one.score for one in drawn],
        )
        for drawn in problems
    ]
    ks = reported_ks(min(score.num_samples for score in judged))
    metrics: dict[str, Any] = {}
    for method in settings.methods:
        values = np.array([method_values(score, method, ks) for score in judged])
        intervals = bootstrap(values[:, :, 0], settings.level, settings.draws, settings.seed)
        errors = np.sqrt((values[:, :, 1] ** 2).sum(axis=0)) / len(judged)
        for k, interval, error in zip(ks, intervals, errors.tolist(), strict=True):
            metrics[f"{method}@{k}"] = asdict(interval) | {"mc_error": error}
    facts = dict(run.facts)
    if settings.reward is not None:
        flat = [one for drawn in problems for one in drawn]
        facts["reward_s_per_sample"] = _mean([one.reward_s for one in flat])
        facts["measured_reward_s_per_sample"] = _mean([one.measured_reward_s for one in flat])
    return {
        "name": run.name,
        "folder": str(run.folder),
        "config": run.config,
        "sessions": run.sessions,
        "grading": run.grading,
        "reward": run.reward,
        "facts": facts,
        "ks": ks,
        "metrics": metrics,
        "throughput": _summarise_throughput(run.throughput),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers among the values, None without any."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _summarise_throughput(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return median, smallest and largest value over rounds, for each batch size."""
    summary = []
    for batch in sorted({row["batch_size"] for row in rows}):
        found = [row for row in rows if row["batch_size"] == batch]
        entry: dict[str, Any] = {
            "batch_size": batch,
            "rounds": len(found),
            "num_prompt_tokens": found[0]["num_prompt_tokens"],
            "num_tokens": found[0]["num_tokens"],
            "preemptions": max(row["num_preemptions"] for row in found),
            "seeded": any(row["seeded"] for row in found),
        }
        for field in ("seconds", "tokens_per_s", "decode_tokens_per_s"):
            values = [row[field] for row in found]
            entry[field] = {
                "median": statistics.median(values),
                "low": min(values),
                "high": max(values),
            }
        summary.append(entry)
    return summary


# -- against seconds ------------------------------------------------------------------------------


class _TimedGroup:
    """The curves of one group on a common grid, and what follows from them."""

    def __init__(
        self,
        regime: str,
        problems: dict[str, list[list[ScoredSample]]],
        rounds: dict[str, list[dict[str, Any]]],
        settings: Settings,
    ) -> None:
        self.regime = regime
        self.problems = problems
        self.rounds = rounds
        self.settings = settings
        self.methods = [_OVER_SECONDS[method] for method in settings.methods]
        self.k = min(len(drawn) for run in problems.values() for drawn in run)

    def results(self) -> dict[str, Any]:
        """Return the curves, targets, areas, envelopes and fronts as JSON values."""
        found: dict[str, Any] = {"curves": [], "targets": [], "envelopes": [], "fronts": []}
        found["k"] = self.k if self.regime == "latency" else None
        for method in self.methods:
            self._add(found, method, "seconds", self.problems)
        as_tokens = {
            name: [
                [replace(one, cost_s=float(one.num_tokens), reward_s=None) for one in drawn]
                for drawn in run
            ]
            for name, run in self.problems.items()
        }
        for method in ("coverage", "maj"):
            self._add(found, method, "tokens", as_tokens)
        return found

    def _add(
        self,
        found: dict[str, Any],
        method: str,
        axis: str,
        problems: dict[str, list[list[ScoredSample]]],
    ) -> None:
        with_reward = self.settings.with_reward_time and method in REWARD_METHODS
        is_latency = self.regime == "latency" and axis == "seconds"
        limits = {
            name: _last_arrival(run, with_reward)
            if is_latency
            else largest_budget(
                run, with_reward_time=with_reward, max_exhausted=self.settings.max_exhausted
            )
            for name, run in problems.items()
        }
        highest = max(limits.values())
        if is_latency:
            limits = dict.fromkeys(limits, highest)  # a curve stays where it is after the last one
            first = min(one.finish_s for run in problems.values() for p in run for one in p)
        else:
            first = min(
                statistics.median(one.cost_s for p in run for one in p) for run in problems.values()
            )
        lowest = min(limits.values())
        # Where there are few samples, or of very different cost, the grid still begins below.
        first = min(max(first, highest * 1e-6), lowest / 4)
        window = self.settings.window if axis == "seconds" else None
        window = window or (first, lowest)
        if not window[0] < window[1] <= lowest:
            stop(
                f"--window {window[0]:g} {window[1]:g}: need two ascending times up to "
                f"{lowest:.4g}, where the samples of one of the runs end"
            )
        grid = log_grid(min(first / 2, window[0]), highest, _GRID_POINTS)
        curves = {}
        for name, run in problems.items():
            times = grid[grid <= limits[name]]
            make: Callable[..., BudgetCurve] = saturated_curve
            arguments: dict[str, Any] = {"max_exhausted": self.settings.max_exhausted}
            if is_latency:
                make, arguments = latency_curve, {"k": self.k}
            curves[name] = make(
                run,
                times,
                method,
                with_reward_time=with_reward,
                window=window,
                num_orders=self.settings.num_orders,
                seed=self.settings.seed,
                **arguments,
            )
            found["curves"].append(
                self._describe_curve(name, curves[name], axis, with_reward, limits[name], window)
            )
        if axis == "seconds":
            self._compare(found, method, grid, curves)

    def _describe_curve(
        self,
        name: str,
        curve: BudgetCurve,
        axis: str,
        with_reward: bool,
        limit: float,
        window: tuple[float, float],
    ) -> dict[str, Any]:
        settings = self.settings
        mean, low, high = band(curve.values, settings.level, settings.draws, settings.seed)
        assert curve.areas is not None
        (area,) = bootstrap(curve.areas, settings.level, settings.draws, settings.seed)
        return {
            "run": name,
            "method": curve.method,
            "axis": axis,
            "with_reward_time": with_reward,
            "limit": limit,
            "x": curve.times.tolist(),
            "y": mean.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "exhausted": curve.exhausted.tolist(),
            "largest_mc_error": float(curve.mc_errors.max()),
            "area": asdict(area) | {"window": list(window)},
        }

    def _compare(
        self, found: dict[str, Any], method: str, grid: Floats, curves: dict[str, BudgetCurve]
    ) -> None:
        if len(curves) < 2:
            return
        settings = self.settings
        padded = {name: _pad(curve.values, len(grid)) for name, curve in curves.items()}
        names = list(curves)
        last = len(curves[names[0]].times) - 1
        slow = self._slowness(method)
        # The value at a quarter, a half, three quarters of the baseline's curve, and at its end.
        for at in sorted({round(last * part / 4) for part in (1, 2, 3, 4)}):
            if not padded[names[0]][:, at].any():
                continue  # everything reaches nothing at once
            reached = times_to_target(
                list(padded.values()), grid, at, settings.level, settings.draws, settings.seed
            )
            found["targets"] += [
                {"run": name, "method": method, "at_s": float(grid[at])}
                | asdict(target)
                | timing_spread(target.seconds, target.speedup, slow[name], slow[names[0]])
                for name, target in zip(padded, reached, strict=True)
            ]
        means = [(name, curve.times, curve.mean) for name, curve in curves.items()]
        found["fronts"] += [
            {"method": method, "run": p.name, "seconds": p.seconds, "value": p.value}
            for p in pareto_front(means)
        ]
        common = min(len(curve.times) for curve in curves.values())
        if len(curves[names[0]].values) > 1:
            best = envelope([v[:, :common] for v in padded.values()], seed=settings.seed)
            found["envelopes"].append(
                {
                    "method": method,
                    "x": grid[:common].tolist(),
                    "y": best.values.tolist(),
                    "chosen": [names[i] for i in best.chosen],
                    "share_chosen": best.share_chosen.tolist(),
                }
            )

    def _slowness(self, method: str) -> dict[str, list[float]]:
        """Return for each run how slow its rounds were; the reward model's seconds stay as are."""
        has_reward = self.settings.with_reward_time and method in REWARD_METHODS
        found = {}
        for name, problems in self.problems.items():
            flat = [one for drawn in problems for one in drawn]
            reward_s = math.fsum(one.reward_s or 0.0 for one in flat) if has_reward else 0.0
            busy_s = math.fsum(one.cost_s for one in flat)
            found[name] = slowness(self.rounds[name], reward_s, busy_s)
        return found


def _last_arrival(problems: Sequence[Sequence[ScoredSample]], with_reward: bool) -> float:
    """Return when the last problem is finished, reward model included if it counts."""
    ends = []
    for drawn in problems:
        reading = math.fsum(one.reward_s or 0.0 for one in drawn) if with_reward else 0.0
        ends.append(max(one.finish_s for one in drawn) + reading)
    return max(ends)


def _pad(values: Floats, length: int) -> Floats:
    """Fill the times beyond a run's limit with NaN: nothing is known there."""
    missing = np.full((len(values), length - values.shape[1]), math.nan)
    return np.concatenate([values, missing], axis=1)
