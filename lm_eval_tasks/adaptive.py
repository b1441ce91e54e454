"""Stop sampling a problem when its vote is decided, and give the time to others: a replay.

The rule is that of `lm_eval_tasks.stopping`, looked at after every sample. Its error level is a
posterior probability about the vote of infinitely many samples, not a frequentist guarantee under
repeated looks; the replay therefore also counts how often the stopped vote differs from the vote of
all stored samples. Runs that were drawn with early stops are reported by
`lm_eval_tasks.early_stops`.

The replay uses random orders of the stored samples. Both policies see the same orders:

uniform: all problems get one sample per round until the budget is spent.
adaptive: the same rounds, without the problems that are decided.

Shapes: P problems, N samples of each, R random orders, D bootstrap draws, B budgets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_tasks.budget import prefix_values
from lm_eval_tasks.curves import first_reached, log_grid
from lm_eval_tasks.estimators import resample_counts
from lm_eval_tasks.scored import ScoredSample
from lm_eval_tasks.stopping import least_lead

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_VOTES = 1
_GRID_POINTS = 120


def stopping_points(
    samples: Sequence[ScoredSample], orders: Ints, error: float, least_votes: int = MIN_VOTES
) -> Ints:
    """Return after how many samples the vote is decided, for each order.

    Args:
        samples: N of one problem.
        orders: (R, N) permutations of them.
        error: the stated level.
        least_votes: of the leader before a stop.

    Returns:
        (R,) numbers from 1 to N; N also where it is never decided.
    """
    count = len(samples)
    numbers: dict[int | None, int] = {None: -1}
    for sample in samples:
        numbers.setdefault(sample.answer_class, len(numbers) - 1)
    column = np.array([numbers[sample.answer_class] for sample in samples])
    needed = least_lead(count, error)
    votes = np.zeros((len(orders), max(2, len(numbers) - 1)), dtype=np.int64)
    stops = np.full(len(orders), count, dtype=np.int64)
    is_open = np.ones(len(orders), dtype=bool)
    rows = np.arange(len(orders))
    for j in range(count):
        drawn = column[orders[:, j]]
        casts = drawn >= 0
        votes[rows[casts], drawn[casts]] += 1
        top = np.partition(votes, votes.shape[1] - 2, axis=1)
        leader, second = top[:, -1], top[:, -2]
        is_decided = (leader >= needed[second]) & (leader >= least_votes)
        is_decided |= leader - second > count - j - 1  # nothing can change it any more
        stops[is_open & is_decided] = j + 1
        is_open &= ~is_decided
    return stops


@dataclass(frozen=True)
class Replay:
    """Both policies on the same random orders of every problem."""

    values: list[Floats]
    """P arrays (R, N + 1): the majority vote's worth after 0, 1, ... samples."""
    costs: list[Floats]
    """P arrays (R, N + 1): seconds spent on them."""
    stops: Ints
    """(P, R) samples after which the vote is decided."""
    differs: Floats
    """(P, R) distance between the chances that the stopped vote and that of all samples are right;
    between 0 and 1 only where one of them is a tie."""


def replay(
    problems: Sequence[Sequence[ScoredSample]],
    error: float,
    num_orders: int = 64,
    least_votes: int = MIN_VOTES,
    seed: int = 0,
) -> Replay:
    """Draw the orders and follow both policies along them.

    Args:
        problems: samples of each problem, with costs.
        error: the stated level.
        num_orders: R.
        least_votes: of the leader before a stop.
        seed: of the orders.
    """
    generator = np.random.default_rng(seed)
    values, costs, stops, differs = [], [], [], []
    for samples in problems:
        orders = np.argsort(generator.random((num_orders, len(samples))), axis=1)
        value = prefix_values(samples, orders, "maj")
        cost = np.cumsum(np.array([sample.cost_s for sample in samples])[orders], axis=1)
        stop = stopping_points(samples, orders, error, least_votes)
        values.append(value)
        costs.append(np.concatenate([np.zeros((num_orders, 1)), cost], axis=1))
        stops.append(stop)
        differs.append(np.abs(value[np.arange(num_orders), stop] - value[:, -1]))
    return Replay(values, costs, np.array(stops), np.array(differs))


def _interval(draws: Floats, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def savings(
    found: Replay, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return what stopping alone saves, and what it costs in accuracy.

    Args:
        found: of `replay`.
        level: of the paired bootstrap intervals over problems.
        draws: resamples.
        seed: of the draws.

    Returns:
        ``samples_saved`` and ``seconds_saved`` (shares of all), ``accuracy_all``,
        ``accuracy_stopped``, ``accuracy_change`` and ``changed_votes`` (mean distance of the
        stopped vote from that of all samples), each with ``value``, ``low`` and ``high``.
    """
    rows = np.arange(found.stops.shape[1])
    num_samples = np.array([value.shape[1] - 1 for value in found.values], dtype=np.float64)
    columns = {
        "samples": found.stops.mean(axis=1),
        "all_samples": num_samples,
        "seconds": _at_stop(found.costs, found.stops, rows),
        "all_seconds": np.array([cost[:, -1].mean() for cost in found.costs]),
        "stopped": _at_stop(found.values, found.stops, rows),
        "all": np.array([value[:, -1].mean() for value in found.values]),
        "differs": found.differs.mean(axis=1),
    }
    count = len(num_samples)
    counts = np.concatenate([np.ones((1, count)), resample_counts(count, draws, seed)])
    mean = {name: counts @ values / count for name, values in columns.items()}
    results = {
        "samples_saved": 1 - mean["samples"] / mean["all_samples"],
        "seconds_saved": 1 - mean["seconds"] / mean["all_seconds"],
        "accuracy_all": mean["all"],
        "accuracy_stopped": mean["stopped"],
        "accuracy_change": mean["stopped"] - mean["all"],
        "changed_votes": mean["differs"],
    }
    described = {}
    for name, numbers in results.items():
        low, high = _interval(numbers[1:], level)
        described[name] = {"value": float(numbers[0]), "low": low, "high": high}
    return described


def _at_stop(tables: Sequence[Floats], stops: Ints, rows: Ints) -> Floats:
    """Return the mean over orders of what stands at each order's stop, (P,)."""
    return np.array([table[rows, stop].mean() for table, stop in zip(tables, stops, strict=True)])


def reallocation(
    found: Replay, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compare both policies at equal time: what is saved goes to the problems still open.

    A budget is seconds per problem, of all problems together. The policies work in rounds, one
    sample for every problem that still gets one; a round that does not fit is not begun. In every
    bootstrap draw the budget is shared among the problems of that draw.

    Returns:
        ``x`` (budgets) and for ``uniform`` and ``adaptive`` the curves ``y``, ``low``, ``high``;
        ``targets``: for the uniform policy's accuracy at a quarter, half, three quarters and
        all of its time the seconds of both and the share saved, with intervals and the share of
        draws in which the adaptive policy does not reach it.
    """
    num_problems, num_orders = found.stops.shape
    longest = max(value.shape[1] for value in found.values)
    counts = np.concatenate(
        [np.ones((1, num_problems)), resample_counts(num_problems, draws, seed)]
    )
    ends = np.array([value.shape[1] - 1 for value in found.values])
    highest = float(np.mean([cost[:, -1].mean() for cost in found.costs]))
    first = min(float(cost[:, 1].min()) for cost in found.costs)
    # Of one round only, the first sample is all there is.
    lowest = min(max(first, highest * 1e-4), highest / 2)
    grid = log_grid(lowest, highest, _GRID_POINTS)
    rounds = np.arange(longest)
    curves = {name: np.zeros((draws + 1, len(grid))) for name in ("uniform", "adaptive")}
    for order in range(num_orders):
        for name, curve in curves.items():
            last = ends if name == "uniform" else found.stops[:, order]
            at = np.minimum(rounds, last[:, None])  # (P, rounds)
            pick = np.arange(num_problems)
            spent = np.stack([found.costs[i][order][at[i]] for i in pick])
            worth = np.stack([found.values[i][order][at[i]] for i in pick])
            spent, worth = counts @ spent / num_problems, counts @ worth / num_problems
            for draw in range(draws + 1):
                # The last round is the budget itself, up to rounding.
                done = np.searchsorted(spent[draw], grid * (1 + 1e-9), side="right") - 1
                curve[draw] += worth[draw][done] / num_orders
    tail = (1 - level) / 2
    described: dict[str, Any] = {"x": grid.tolist()}
    for name, curve in curves.items():
        low, high = np.quantile(curve[1:], [tail, 1 - tail], axis=0)
        described[name] = {"y": curve[0].tolist(), "low": low.tolist(), "high": high.tolist()}
    described["targets"] = [_saved_at(curves, grid, part, level) for part in (0.25, 0.5, 0.75, 1.0)]
    return described


def _saved_at(curves: dict[str, Floats], grid: Floats, part: float, level: float) -> dict[str, Any]:
    """Return the seconds both policies need for what the uniform one has at part of its time."""
    position = int(np.searchsorted(grid, part * grid[-1] * (1 - 1e-12)))
    targets = curves["uniform"][:, position]
    uniform = first_reached(curves["uniform"], grid, targets)
    adaptive = first_reached(curves["adaptive"], grid, targets)
    saved = 1 - adaptive / uniform  # minus infinity where it is not reached
    low, high = _interval(saved[1:], level)
    return {
        "accuracy": float(targets[0]),
        "uniform_s": float(uniform[0]),
        "adaptive_s": float(adaptive[0]) if math.isfinite(adaptive[0]) else None,
        "saved": float(saved[0]) if math.isfinite(saved[0]) else None,
        "low": low if math.isfinite(low) else None,
        "high": high if math.isfinite(high) else None,
        "share_not_reached": float(np.isinf(adaptive[1:]).mean()),
    }
