"""What curves against time say: intervals, seconds to a target, any-time envelope.

All functions take per-problem values of shape (P, T): P problems in the same order for every model,
T times on one common grid. The problem is the unit of the bootstrap, and all models and times share
a resample, so differences and ratios are paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_tasks.estimators import resample_counts

Floats = NDArray[np.float64]

LEVEL = 0.95
DRAWS = 2000


def log_grid(low: float, high: float, num_points: int) -> Floats:
    """Return times from low to high, evenly spaced on a log axis.

    Raises:
        ValueError: not 0 < low < high, or fewer than two points.
    """
    if not 0 < low < high or num_points < 2:
        raise ValueError(f"need 0 < low < high and 2 points, got {low}, {high}, {num_points}")
    grid: Floats = np.geomspace(low, high, num_points)
    grid[0], grid[-1] = low, high  # not a rounding error beyond the limit
    return grid


def band(
    values: Floats, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Return mean, lower and upper end of the percentile bootstrap interval, each (T,)."""
    means = resample_counts(len(values), draws, seed) @ values / len(values)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return values.mean(axis=0), low, high


def first_reached(means: Floats, times: Floats, targets: Floats) -> Floats:
    """Return the first time of the grid at which each curve reaches its target.

    Args:
        means: (D, T) curves; they need not rise.
        times: (T,).
        targets: (D,).

    Returns:
        (D,) times, infinity where the target is not reached.
    """
    # Means of the same numbers can differ in the last digit from one sum to another.
    is_there = means >= targets[:, None] - 1e-12
    return np.where(is_there.any(axis=1), times[is_there.argmax(axis=1)], math.inf)


@dataclass(frozen=True)
class TargetTime:
    """Seconds until one model reaches a target, and the speed-up over the baseline."""

    target: float
    seconds: float | None
    """None: not reached within the curve, which is a result and not a gap."""
    low_s: float | None
    high_s: float | None
    """Ends of the bootstrap interval; None: not reached there."""
    share_not_reached: float
    """Of the bootstrap draws."""
    speedup: float | None
    """Seconds of the baseline over seconds of the model: 0 where only the model does not reach the
    target, None where neither does or only the baseline does not (no number then)."""
    speedup_low: float | None
    speedup_high: float | None
    share_undefined: float
    """Of the draws in which the speed-up has no number; the interval is over the others."""


def times_to_target(
    values: Sequence[Floats],
    times: Floats,
    target: float | int,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[TargetTime]:
    """Return when each model reaches a target, with paired bootstrap intervals.

    Args:
        values: (P, T) of each model; the first is the baseline. NaN beyond the times that a model's
            samples allow.
        times: (T,) the common grid; the answer is a time of the grid, so it is up to one grid step
            late.
        target: a fixed value; or, as an int, the position of the time at which the baseline's value
            is the target, which is then taken anew in each bootstrap draw.
        level: of the intervals.
        draws: resamples of the problems.
        seed: of the draws.

    Raises:
        ValueError: the curves differ in shape.
    """
    shape = values[0].shape
    if any(value.shape != shape for value in values) or shape[1] != len(times):
        raise ValueError(f"curves of shapes {[v.shape for v in values]} and {len(times)} times")
    counts = np.concatenate([np.ones((1, shape[0])), resample_counts(shape[0], draws, seed)])
    means = [counts @ value / shape[0] for value in values]  # row 0: all problems as they are
    targets = means[0][:, target] if isinstance(target, int) else np.full(draws + 1, target)
    reached = [first_reached(mean, times, targets) for mean in means]
    return [_target_time(float(targets[0]), reached[0], found, level) for found in reached]


def _target_time(target: float, baseline: Floats, found: Floats, level: float) -> TargetTime:
    with np.errstate(invalid="ignore"):
        speedups = np.where(np.isinf(baseline), math.nan, baseline / found)
    low, high = _interval(found[1:], level)
    defined = speedups[1:][~np.isnan(speedups[1:])]
    speedup_low, speedup_high = _interval(defined, level) if len(defined) else (None, None)
    return TargetTime(
        target=target,
        seconds=_finite(found[0]),
        low_s=low,
        high_s=high,
        share_not_reached=float(np.isinf(found[1:]).mean()),
        speedup=_finite(speedups[0]),
        speedup_low=speedup_low,
        speedup_high=speedup_high,
        share_undefined=1 - len(defined) / len(found[1:]),
    )


def _interval(draws: Floats, level: float) -> tuple[float | None, float | None]:
    """Return percentiles that are values of draws, since one cannot interpolate to infinity."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], method="inverted_cdf")
    return _finite(low), _finite(high)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Envelope:
    """The best that is known at each time, without the optimism of choosing and judging at once."""

    values: Floats
    """(T,) mean value of what was chosen on the other half of the problems."""
    chosen: NDArray[np.int64]
    """(T,) what is best on all problems: position in the list of curves."""
    share_chosen: Floats
    """(T,) how often the halves chose it."""


def envelope(values: Sequence[Floats], splits: int = 200, seed: int = 0) -> Envelope:
    """Return the any-time envelope over curves: models, or numbers of samples of one model.

    At each time the best curve is chosen on a random half of the problems and judged on the other
    half, both ways round; the mean over random splits is returned. Choosing and judging on the same
    problems would be optimistic.

    Args:
        values: (P, T) of each choice, at least two problems; without NaN.
        splits: random halves.
        seed: of the splits.

    Raises:
        ValueError: fewer than two problems, or the curves differ in shape.
    """
    table = np.stack(values)  # raises ValueError itself where shapes differ
    num_problems = table.shape[1]
    if num_problems < 2:
        raise ValueError("need at least two problems to choose on one half and judge on the other")
    best = table.mean(axis=1).argmax(axis=0)
    generator = np.random.default_rng(seed)
    total = np.zeros(table.shape[2])
    agreed = np.zeros(table.shape[2])
    columns = np.arange(table.shape[2])
    for _ in range(splits):
        order = generator.permutation(num_problems)
        halves = order[: num_problems // 2], order[num_problems // 2 :]
        for choose, judge in (halves, halves[::-1]):
            chosen = table[:, choose].mean(axis=1).argmax(axis=0)
            # Weighted by its size, so that every problem is judged once per split.
            total += table[:, judge].sum(axis=1)[chosen, columns] / num_problems
            agreed += chosen == best
    return Envelope(total / splits, best, agreed / (2 * splits))


@dataclass(frozen=True)
class FrontPoint:
    """A point that no other model beats in both seconds and value."""

    name: str
    seconds: float
    value: float


def pareto_front(curves: Sequence[tuple[str, Floats, Floats]]) -> list[FrontPoint]:
    """Return the points of the curves that no point at the same or a shorter time exceeds.

    Args:
        curves: name, (T,) times and (T,) mean values of each model; grids may differ.

    Returns:
        Points with rising seconds and strictly rising values.
    """
    points = [
        FrontPoint(name, float(second), float(value))
        for name, times, means in curves
        for second, value in zip(times, means, strict=True)
    ]
    points.sort(key=lambda point: (point.seconds, -point.value))
    front: list[FrontPoint] = []
    for point in points:
        if point.value > (front[-1].value if front else 0.0) + 1e-12:
            front.append(point)
    return front
