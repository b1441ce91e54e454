"""maj@k, bon@k and weighted_bon@k against brute force over all subsets, and their invariants."""

import itertools
import math
import random
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_tasks import estimators
from lm_eval_tasks.estimators import (
    best_of_n_at_k,
    bootstrap,
    majority_at_k,
    paired_difference,
    pass_at_k,
    resample_counts,
    weighted_bon_at_k,
)
from lm_eval_tasks.voting import vote

Classes = list[int | None]
Scores = list[float | None]


def _best(classes: Classes, right: list[bool], scores: Scores) -> float:
    rated = [
        (score, correct)
        for number, correct, score in zip(classes, right, scores, strict=True)
        if number is not None and score is not None
    ]
    if not rated:
        return 0.0
    highest = max(score for score, _ in rated)
    return statistics.fmean(correct for score, correct in rated if score == highest)


def _over_subsets(kind: str, classes: Classes, right: list[bool], scores: Scores, k: int) -> float:
    values = []
    for subset in itertools.combinations(range(len(classes)), k):
        some = [classes[i] for i in subset], [right[i] for i in subset]
        weights = [scores[i] for i in subset]
        if kind == "maj":
            values.append(vote(*some))
        elif kind == "weighted":
            values.append(vote(*some, weights))
        else:
            values.append(_best(*some, weights))
    return math.fsum(values) / len(values)


#: Answer classes, verdicts (class 0 is right, class 1 has right and wrong spellings) and scores.
@st.composite
def problems(draw: st.DrawFn, largest: int = 8) -> tuple[Classes, list[bool], Scores]:
    classes = draw(st.lists(st.sampled_from([None, 0, 0, 1, 2, 3]), min_size=1, max_size=largest))
    right = [c == 0 or (c == 1 and draw(st.booleans())) for c in classes]
    scores = [draw(st.sampled_from([None, 0.0, 0.25, 0.5, 0.9, 0.9])) for _ in classes]
    return classes, right, scores


@settings(max_examples=150, deadline=None)
@given(problems())
def test_all_estimators_equal_brute_force(problem: tuple[Classes, list[bool], Scores]) -> None:
    classes, right, scores = problem
    ks = list(range(1, len(classes) + 1))
    majority = majority_at_k(classes, right, ks)
    weighted = weighted_bon_at_k(classes, right, scores, ks)
    best = best_of_n_at_k(classes, right, scores, ks)
    assert not majority.errors.any()
    assert not weighted.errors.any(), "all subsets of 8 are enumerated"
    for i, k in enumerate(ks):
        expected = [_over_subsets(kind, *problem, k) for kind in ("maj", "weighted", "bon")]
        found = [majority.values[i], weighted.values[i], best[i]]
        assert found == pytest.approx(expected, abs=1e-12), k


@settings(max_examples=60, deadline=None)
@given(problems(largest=40), st.randoms(use_true_random=False))
def test_invariants(problem: tuple[Classes, list[bool], Scores], chance: random.Random) -> None:
    classes, right, scores = problem
    n = len(classes)
    ks = list(range(1, n + 1))
    share = sum(right) / n
    coverage = np.array([pass_at_k(n, sum(right), k) for k in ks])
    majority = majority_at_k(classes, right, ks).values
    best = best_of_n_at_k(classes, right, scores, ks)
    assert majority[0] == pytest.approx(share)
    for values in (majority, best):
        assert (values >= -1e-12).all()
        assert (values <= coverage + 1e-9).all(), "no choice beats having a right answer"
    assert majority[-1] == pytest.approx(vote(classes, right))
    equal = [0.5] * n
    answered = [0 if number is None else number for number in classes]
    assert best_of_n_at_k(answered, right, equal, ks) == pytest.approx([share] * n)
    assert weighted_bon_at_k(classes, right, equal, ks).values == pytest.approx(majority)
    if None not in classes and n > 1:
        assert majority[1] == pytest.approx(share), "two votes: the same, or a tie"
    order = list(range(n))
    chance.shuffle(order)
    mixed = ([classes[i] for i in order], [right[i] for i in order], [scores[i] for i in order])
    assert majority_at_k(mixed[0], mixed[1], ks).values == pytest.approx(majority, abs=1e-12)
    assert best_of_n_at_k(*mixed, ks) == pytest.approx(best, abs=1e-12)


def _large(n: int, seed: int) -> tuple[Classes, list[bool], list[float]]:
    chance = random.Random(seed)
    classes: Classes = [
        None if chance.random() < 0.1 else min(int(chance.expovariate(0.3)), 9) for _ in range(n)
    ]
    right = [number == 1 for number in classes]
    scores = [chance.betavariate(3 if correct else 2, 2) for correct in right]
    return classes, right, scores


def _direct(
    classes: Sequence[int | None], right: list[bool], weights: list[float], k: int, draws: int
) -> tuple[float, float]:
    """A second Monte Carlo that shares no code with the first but the vote."""
    chance = random.Random(5)
    values = []
    for _ in range(draws):
        some = chance.sample(range(len(classes)), k)
        parts = [classes[i] for i in some], [right[i] for i in some], [weights[i] for i in some]
        values.append(vote(*parts))
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(draws)


def test_large_problems_agree_with_direct_sampling() -> None:
    classes, right, scores = _large(200, 3)
    ks = [8, 50]
    majority = majority_at_k(classes, right, ks)
    weighted = weighted_bon_at_k(classes, right, scores, ks)
    assert not majority.errors.any(), "exact"
    assert (weighted.errors > 0).all()
    for i, k in enumerate(ks):
        value, error = _direct(classes, right, [1.0] * 200, k, 1500)
        assert abs(majority.values[i] - value) < 4 * error
        value, error = _direct(classes, right, scores, k, 1500)
        assert abs(weighted.values[i] - value) < 4 * math.hypot(error, weighted.errors[i])


def test_monte_carlo_error_is_the_spread_of_its_repetitions() -> None:
    classes, right, scores = _large(60, 4)
    runs = [weighted_bon_at_k(classes, right, scores, [7], 200, seed) for seed in range(60)]
    values = [float(run.values[0]) for run in runs]
    reported = statistics.fmean(float(run.errors[0]) for run in runs)
    assert statistics.stdev(values) == pytest.approx(reported, rel=0.35)
    again = weighted_bon_at_k(classes, right, scores, [7], 200, 0)
    assert again.values[0] == values[0], "reproducible"


def test_monte_carlo_of_a_majority_beyond_the_exact_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classes, right, _ = _large(300, 6)
    exact = majority_at_k(classes, right, [5, 20, 300])
    monkeypatch.setattr(estimators, "MAX_EXACT_SAMPLES", 299)
    random_subsets = majority_at_k(classes, right, [5, 20, 300], 2000)
    assert (random_subsets.errors[:2] > 0).all()
    assert random_subsets.errors[2] == 0, "one subset only"
    assert random_subsets.values[2] == pytest.approx(exact.values[2])
    z = (random_subsets.values[:2] - exact.values[:2]) / random_subsets.errors[:2]
    assert (abs(z) < 4).all()
    wrong = majority_at_k(classes, [False] * 300, [5])
    assert (wrong.values[0], wrong.errors[0]) == (0.0, 0.0)


def test_majority_is_exact_at_the_edge_of_floats() -> None:
    """All right against all wrong, 1000 samples: P(majority) is a hypergeometric tail."""
    classes: Classes = [0] * 490 + [1] * 510
    right = [True] * 490 + [False] * 510
    (value,) = majority_at_k(classes, right, [500]).values
    total = math.comb(1000, 500)
    wins = sum(math.comb(490, s) * math.comb(510, 500 - s) for s in range(251, 491))
    ties = math.comb(490, 250) * math.comb(510, 250)
    assert value == pytest.approx((2 * wins + ties) / (2 * total), rel=1e-10)


def test_all_singletons() -> None:
    """Every sample another answer: each of the k voters wins with 1/k."""
    found = majority_at_k(list(range(64)), [True] + [False] * 63, [1, 2, 16, 64]).values
    assert found == pytest.approx([1 / 64] * 4)


@pytest.mark.parametrize("k", [5, 6, 1000])
def test_nan_when_fewer_than_k_samples_exist(k: int) -> None:
    classes: Classes = [0, 0, 1, 1]
    right, scores = [True, True, False, False], [0.1, 0.2, 0.3, 0.4]
    for found in (
        majority_at_k(classes, right, [2, k]),
        weighted_bon_at_k(classes, right, scores, [2, k]),
    ):
        assert not np.isnan(found.values[0])
        assert np.isnan([found.values[1], found.errors[1]]).all()
    assert np.isnan(best_of_n_at_k(classes, right, scores, [2, k])).tolist() == [False, True]
    assert np.isnan(majority_at_k([], [], [1]).values).all()
    assert np.isnan(best_of_n_at_k([], [], [], [1])).all()


def test_impossible_input() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        majority_at_k([0], [True], [0])
    with pytest.raises(ValueError, match="lists of 1 and"):
        best_of_n_at_k([0], [True, False], [0.1], [1])
    with pytest.raises(ValueError, match="finite number"):
        weighted_bon_at_k([0, 1], [True, False], [0.5, -1.0], [1])


def test_samples_without_answer_take_a_place_but_do_not_compete() -> None:
    classes: Classes = [0, None]
    right, scores = [True, False], [0.1, 0.9]
    assert best_of_n_at_k(classes, right, scores, [1, 2]).tolist() == [0.5, 1.0]
    assert majority_at_k(classes, right, [1, 2]).values.tolist() == [0.5, 1.0]
    assert majority_at_k([None, None], [False, False], [1, 2]).values.tolist() == [0.0, 0.0]
    assert best_of_n_at_k([None], [False], [0.5], [1]).tolist() == [0.0]


def test_bootstrap_interval_covers_as_it_says() -> None:
    """Of 200 samples of 60 problems with mean 0.3, about 95 in 100 intervals hold 0.3."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        (interval,) = bootstrap((generator.random(60) < 0.3).astype(float), draws=400, seed=seed)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99


def test_bootstrap() -> None:
    values = np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 1.0]])
    first, second = bootstrap(values, seed=1)
    assert first.value == pytest.approx(0.5)
    assert first.low < 0.5 < first.high
    assert (second.low, second.value, second.high) == (1.0, 1.0, 1.0)
    assert bootstrap(values, seed=1) == [first, second], "seeded"
    (area,) = bootstrap(values, statistic=lambda means: means.sum(axis=1, keepdims=True))
    assert area.value == pytest.approx(1.5)
    narrow = bootstrap(values[:, 0], level=0.5)[0]
    assert first.low <= narrow.low <= narrow.high <= first.high
    assert math.isnan(bootstrap([0.1, math.nan])[0].value)
    counts = resample_counts(3, 50, 2)
    assert counts.shape == (50, 3)
    assert (counts.sum(axis=1) == 3).all()
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            bootstrap([0.5], level)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap([])


def test_small_scores_decide() -> None:
    """Products of 31 step scores of 0.5 and 0.3, both below what weights were rounded to."""
    assert best_of_n_at_k([0, 1], [True, False], [4e-10, 6e-17], [2]).tolist() == [1.0]
    classes, right = [0] * 6 + [1, 2], [True] * 6 + [False] * 2
    scores = [0.5**31] * 6 + [0.3**31] * 2
    assert best_of_n_at_k(classes, right, scores, [8]).tolist() == [1.0]
    assert weighted_bon_at_k(classes, right, scores, [8]).values.tolist() == [1.0]
    # Many subsets: all have a right sample, which outweighs the wrong ones.
    many = weighted_bon_at_k(classes * 4, right * 4, scores * 4, [12])
    assert many.values.tolist() == [1.0]
    assert many.errors.tolist() == [0.0]


def test_paired_difference() -> None:
    hard = [0.1, 0.2, 0.6, 0.9, 0.3]
    interval, stderr = paired_difference([value + 0.05 for value in hard], hard)
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.05, 0.05, 0.05))
    assert stderr == pytest.approx(0, abs=1e-12), "the problems' difficulty cancels"
    with pytest.raises(ValueError, match="5 and 4 problems"):
        paired_difference(hard, hard[1:])
