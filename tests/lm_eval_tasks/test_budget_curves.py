"""Seconds to a target, envelopes and fronts on curves small enough to check by hand."""

import math

import numpy as np
import pytest

from lm_eval_tasks.curves import (
    band,
    envelope,
    first_reached,
    log_grid,
    pareto_front,
    times_to_target,
)

TIMES = np.array([1.0, 2.0, 4.0, 8.0])


def curve(*values, num_problems=20):
    return np.tile(np.array(values), (num_problems, 1))


def test_log_grid_has_exact_ends():
    grid = log_grid(0.3, 7.7, 50)
    assert (grid[0], grid[-1]) == (0.3, 7.7)
    assert np.ptp(np.diff(np.log(grid))) < 1e-12
    with pytest.raises(ValueError, match="0 < low < high"):
        log_grid(1.0, 1.0, 5)


def test_first_reached_on_curves_that_fall_again_or_never_get_there():
    means = np.array([[0.1, 0.5, 0.4, 0.6], [0.1, 0.2, 0.3, math.nan]])
    assert first_reached(means, TIMES, np.array([0.5, 0.5])).tolist() == [2.0, math.inf]


def test_times_to_target_of_faster_and_weaker_models():
    slow, fast = curve(0.0, 0.2, 0.4, 0.6), curve(0.4, 0.6, 0.7, 0.7)
    weak = curve(0.3, 0.3, 0.3, math.nan)
    base, quick, never = times_to_target([slow, fast, weak], TIMES, 3)
    assert base.target == pytest.approx(0.6)
    assert (base.seconds, base.speedup) == (8.0, 1.0)
    assert (quick.seconds, quick.low_s, quick.high_s) == (2.0, 2.0, 2.0)
    assert (quick.speedup, quick.speedup_low, quick.share_not_reached) == (4.0, 4.0, 0.0)
    assert never.seconds is None
    assert never.low_s is None
    assert (never.speedup, never.share_not_reached, never.share_undefined) == (0.0, 1.0, 0.0)


def test_times_to_target_with_a_baseline_that_misses_a_fixed_target():
    slow, fast = curve(0.0, 0.2, 0.4, 0.6), curve(0.4, 0.6, 0.7, 0.7)
    base, quick = times_to_target([slow, fast], TIMES, 0.7)
    assert (base.seconds, base.speedup, base.share_undefined) == (None, None, 1.0)
    assert (quick.seconds, quick.speedup, quick.speedup_low) == (4.0, None, None)
    with pytest.raises(ValueError, match="curves of shapes"):
        times_to_target([slow, fast[:, :3]], TIMES, 0.5)


def test_times_to_target_intervals_are_paired():
    """One model's problems are the other's, twice as fast: every draw has the same ratio."""
    generator = np.random.default_rng(0)
    times = 2.0 ** np.arange(8)
    solved_at = generator.integers(1, 7, size=60)
    slow = (np.arange(8) >= solved_at[:, None]).astype(float)
    fast = (np.arange(8) >= solved_at[:, None] - 1).astype(float)
    _, quick = times_to_target([slow, fast], times, 4, draws=500)
    assert (quick.speedup, quick.speedup_low, quick.speedup_high) == (2.0, 2.0, 2.0)


def test_interval_of_a_target_covers_the_truth():
    """Over repeated samples of problems, close to 95 % of the intervals hold the true time."""
    generator = np.random.default_rng(3)
    times = np.arange(1.0, 101.0)
    hits, trials = 0, 120
    for _ in range(trials):
        solved_at = generator.uniform(0, 100, size=80)
        values = (times >= solved_at[:, None]).astype(float)
        (found,) = times_to_target([values], times, 0.5, draws=200)
        hits += found.low_s <= 50 <= found.high_s
    assert hits / trials > 0.88


def test_envelope_is_not_optimistic():
    """Two curves that are equal in truth: choosing and judging on the same problems gains."""
    generator = np.random.default_rng(1)
    values = [(generator.random((40, 30)) < 0.5).astype(float) for _ in range(2)]
    honest = envelope(values)
    greedy = np.maximum(values[0].mean(axis=0), values[1].mean(axis=0))
    truth = 0.5
    assert greedy.mean() - truth > 0.03
    assert abs(honest.values.mean() - truth) < 0.02
    best = envelope([curve(0.1, 0.1), curve(0.0, 0.5)])
    assert best.values == pytest.approx([0.1, 0.5])
    assert best.chosen.tolist() == [0, 1]
    assert best.share_chosen.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="two problems"):
        envelope([np.zeros((1, 3))])


def test_pareto_front_keeps_what_nothing_beats():
    front = pareto_front(
        [
            ("slow", np.array([2.0, 4.0]), np.array([0.3, 0.9])),
            ("fast", np.array([1.0, 2.0, 4.0]), np.array([0.2, 0.5, 0.6])),
        ]
    )
    points = [(point.name, point.seconds, point.value) for point in front]
    assert points == [("fast", 1.0, 0.2), ("fast", 2.0, 0.5), ("slow", 4.0, 0.9)]


def test_band_is_wider_for_fewer_problems():
    generator = np.random.default_rng(2)
    widths = []
    for count in (20, 200):
        values = (generator.random((count, 4)) < 0.5).astype(float)
        mean, low, high = band(values)
        assert (low <= mean).all()
        assert (mean <= high).all()
        widths.append((high - low).mean())
    assert widths[0] > 2 * widths[1]
