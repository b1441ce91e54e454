"""pass@k against brute force over all subsets, its invariants, and the standard error."""

import itertools
import math
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_tasks.estimators import (
    mean_and_stderr,
    pass_at_k,
    pass_at_k_over_problems,
    reported_ks,
)

COUNTS = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_equals_brute_force(n: int) -> None:
    for correct in range(n + 1):
        is_correct = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(is_correct, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("n", "c", "k"), [(10_000, 1, 1), (10_000, 3, 777), (10_000, 5000, 2)])
def test_pass_at_k_equals_exact_integers(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)


@given(COUNTS, st.integers(1, 10_000))
def test_pass_at_k_bounds(counts: tuple[int, int], k: int) -> None:
    n, c = counts
    value = pass_at_k(n, c, k)
    if n < k:
        assert math.isnan(value)
        return
    assert 0.0 <= value <= 1.0
    assert (value == 0.0) == (c == 0)
    assert (value == 1.0) or n - c >= k
    assert value >= c / n - 1e-12, "more samples never hurt"


@given(COUNTS)
def test_pass_at_1_is_the_share_of_correct_samples(counts: tuple[int, int]) -> None:
    n, c = counts
    assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=1e-13)
    assert pass_at_k(n, c, n) == (1.0 if c else 0.0)


@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_is_monotone(counts: tuple[int, int]) -> None:
    n, c = counts
    curve = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert all(a <= b + 1e-14 for a, b in itertools.pairwise(curve))
    if c < n:
        assert pass_at_k(n, c + 1, 2) >= pass_at_k(n, c, 2)


@pytest.mark.parametrize("counts", [(5, 6, 1), (5, -1, 1), (-1, 0, 1), (5, 1, 0), (5, 1, -2)])
def test_pass_at_k_refuses_impossible_counts(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"need 0 <=|k must be"):
        pass_at_k(*counts)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_mean_and_stderr(values: list[float]) -> None:
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(statistics.fmean(values))
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert stderr == pytest.approx(expected, abs=1e-12)


def test_mean_and_stderr_of_one_problem_and_of_none() -> None:
    assert mean_and_stderr([0.25]).mean == 0.25
    assert math.isnan(mean_and_stderr([0.25]).stderr)
    with pytest.raises(ValueError, match="at least one problem"):
        mean_and_stderr([])


def test_pass_at_k_over_problems() -> None:
    estimate = pass_at_k_over_problems([(4, 0), (4, 4), (4, 1)], k=2)
    assert estimate.mean == pytest.approx((0 + 1 + 0.5) / 3)
    assert estimate.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert math.isnan(pass_at_k_over_problems([(4, 1), (1, 1)], k=2).mean)


@pytest.mark.parametrize(
    ("n", "ks"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (12, [1, 2, 4, 8, 12])],
)
def test_reported_ks(n: int, ks: list[int]) -> None:
    assert reported_ks(n) == ks
