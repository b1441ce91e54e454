"""Estimators of seconds against brute force, against a known truth, and their properties."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_tasks.budget import (
    METHODS,
    largest_budget,
    latency_curve,
    prefix_values,
    saturated_curve,
)
from lm_eval_tasks.estimators import best_of_n_at_k, majority_at_k, pass_at_k, weighted_bon_at_k
from lm_eval_tasks.scored import ScoredSample
from lm_eval_tasks.voting import vote


def sample(finish_s=1.0, cost_s=1.0, answer=0, correct=False, score=0.5, reward_s=0.1):
    return ScoredSample(
        finish_s=finish_s,
        cost_s=cost_s,
        answer_class=answer,
        correct=correct,
        score=score,
        num_tokens=10,
        is_truncated=False,
        reward_s=reward_s,
    )


def random_problem(generator, count, num_classes=3, silent=0.2, unscored=0.1):
    """Class 0 is right; times and costs have ties."""
    problem = []
    for _ in range(count):
        answer = int(generator.integers(num_classes))
        has_answer = generator.random() >= silent
        problem.append(
            sample(
                finish_s=float(generator.integers(1, 6)),
                cost_s=float(generator.integers(1, 5)) / 2,
                answer=answer if has_answer else None,
                correct=has_answer and answer == 0,
                score=None if generator.random() < unscored else generator.integers(4) / 4,
                reward_s=float(generator.integers(3)) / 4,
            )
        )
    return problem


def outcome(samples, method):
    """What a method makes of the samples that are there, written out with the vote of voting.py."""
    if method == "coverage":
        return float(any(s.correct for s in samples))
    classes, correct = [s.answer_class for s in samples], [s.correct for s in samples]
    if method == "maj":
        return vote(classes, correct)
    if method == "weighted_bon":
        return vote(classes, correct, [s.score for s in samples])
    candidates = [s for s in samples if s.answer_class is not None and s.score is not None]
    if not candidates:
        return 0.0
    best = max(s.score for s in candidates)
    tied = [s.correct for s in candidates if s.score == best]
    return sum(tied) / len(tied)


def brute_latency(problem, t, method, k, with_reward):
    values = []
    for subset in itertools.combinations(problem, k):
        there, spent = [], 0.0
        for s in sorted(subset, key=lambda s: s.finish_s):
            spent += s.reward_s if with_reward else 0.0
            if s.finish_s + spent <= t:
                there.append(s)
        values.append(outcome(there, method))
    return sum(values) / len(values)


def brute_saturated(problem, budget, method, with_reward):
    values = []
    for order in itertools.permutations(problem):
        there, spent = [], 0.0
        for s in order:
            spent += s.cost_s + (s.reward_s if with_reward else 0.0)
            if spent > budget:
                break
            there.append(s)
        values.append(outcome(there, method))
    return sum(values) / len(values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("with_reward", [False, True])
def test_latency_curve_equals_all_subsets(method, k, with_reward):
    with_reward = with_reward and method in ("bon", "weighted_bon")
    generator = np.random.default_rng(k)
    problems = [random_problem(generator, 5) for _ in range(6)]
    times = [0.0, 0.99, 1, 2, 2.4, 3, 4.5, 5, 9]
    curve = latency_curve(problems, times, method, k, with_reward_time=with_reward)
    expected = [
        [brute_latency(problem, t, method, k, with_reward) for t in times] for problem in problems
    ]
    np.testing.assert_allclose(curve.values, expected, atol=1e-12)
    assert curve.mc_errors.tolist() == [0.0] * len(times)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_reward", [False, True])
def test_saturated_curve_equals_all_orders(method, with_reward):
    with_reward = with_reward and method in ("bon", "weighted_bon")
    generator = np.random.default_rng(7)
    problems = [random_problem(generator, 5) for _ in range(6)]
    limit = largest_budget(problems, with_reward_time=with_reward)
    budgets = np.linspace(0.0, limit, 9)
    curve = saturated_curve(problems, budgets, method, with_reward_time=with_reward)
    expected = [
        [brute_saturated(problem, t, method, with_reward) for t in budgets] for problem in problems
    ]
    np.testing.assert_allclose(curve.values, expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_random_orders_agree_with_all_orders_within_their_error(method):
    generator = np.random.default_rng(3)
    problems = [random_problem(generator, 6) for _ in range(40)]
    budgets = np.linspace(0.5, largest_budget(problems), 7)
    exact = saturated_curve(problems, budgets, method, num_orders=720)
    drawn = saturated_curve(problems, budgets, method, num_orders=128)
    assert (exact.mc_errors == 0).all()
    assert drawn.mc_errors.max() > 0
    difference = np.abs(drawn.mean - exact.mean)
    assert (difference <= 5 * drawn.mc_errors + 1e-12).all()


def test_every_prefix_votes_like_voting():
    generator = np.random.default_rng(11)
    for _ in range(20):
        problem = random_problem(generator, 7, num_classes=4)
        orders = np.array([generator.permutation(7) for _ in range(5)])
        for method in METHODS:
            values = prefix_values(problem, orders, method)
            expected = [
                [outcome([problem[i] for i in order[:n]], method) for n in range(8)]
                for order in orders
            ]
            np.testing.assert_allclose(values, expected, atol=1e-12)


@pytest.mark.parametrize("method", ["bon", "weighted_bon"])
def test_small_scores_count(method):
    """Products of 31 step scores: six right ones at 0.5 each, two wrong ones at 0.3."""
    samples = [sample(answer=0, correct=True, score=0.5**31) for _ in range(6)]
    samples += [sample(answer=i, score=0.3**31) for i in (1, 2)]
    orders = np.array([[6, 7, 0, 1, 2, 3, 4, 5], [0, 6, 1, 7, 2, 3, 4, 5]])
    found = prefix_values(samples, orders, method)
    assert found.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]]


def test_all_weights_zero_ties_all_classes():
    problem = [sample(answer=0, correct=True, score=0.0)]
    problem += [sample(answer=1, score=0.0), sample(answer=1, score=0.0)]
    values = prefix_values(problem, np.array([[1, 2, 0]]), "weighted_bon")
    assert values.tolist() == [[0.0, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("method", METHODS)
def test_long_times_give_the_estimates_over_k(method):
    generator = np.random.default_rng(5)
    problems = [random_problem(generator, 8) for _ in range(10)]
    curve = latency_curve(problems, [100.0], method, 4)  # C(8, 4) = 70 subsets: exact
    for problem, value in zip(problems, curve.values[:, 0], strict=True):
        classes, correct = [s.answer_class for s in problem], [s.correct for s in problem]
        scores = [s.score for s in problem]
        expected = {
            "coverage": lambda c=correct: pass_at_k(8, sum(c), 4),
            "maj": lambda a=classes, c=correct: majority_at_k(a, c, [4]).values[0],
            "bon": lambda a=classes, c=correct, s=scores: best_of_n_at_k(a, c, s, [4])[0],
            "weighted_bon": lambda a=classes, c=correct, s=scores: weighted_bon_at_k(
                a, c, s, [4]
            ).values[0],
        }[method]()
        assert value == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_properties(seed, count):
    """Coverage never falls; nothing exceeds it; values stay in [0, 1]; order does not matter."""
    generator = np.random.default_rng(seed)
    problems = [random_problem(generator, count) for _ in range(3)]
    times = np.linspace(0, 6, 13)
    k = int(generator.integers(1, count + 1))
    coverage = latency_curve(problems, times, "coverage", k).values
    assert (np.diff(coverage, axis=1) >= -1e-12).all()
    if any(s.score is not None for problem in problems for s in problem):
        for method in METHODS[1:]:
            values = latency_curve(problems, times, method, k).values
            assert (values >= 0).all()
            assert (values <= coverage + 1e-12).all()
    shuffled = [[problem[i] for i in generator.permutation(count)] for problem in problems]
    np.testing.assert_allclose(
        latency_curve(shuffled, times, "maj", k).values,
        latency_curve(problems, times, "maj", k).values,
        atol=1e-12,
    )
    budgets = np.linspace(0, largest_budget(problems), 7)
    spent = saturated_curve(problems, budgets, "coverage", num_orders=16).values
    assert (np.diff(spent, axis=1) >= -1e-12).all()


def draw(generator, count):
    """One problem of a known law: 30 % right and short, two wrong answers, 10 % silent."""
    kinds = generator.choice(4, p=[0.3, 0.35, 0.25, 0.1], size=count)
    is_right = kinds == 0
    mean = np.where(is_right, 0.6, 1.0)
    finish, extra = generator.exponential(mean), generator.exponential(mean)
    score = np.clip(generator.normal(np.where(is_right, 0.6, 0.45), 0.2), 0, 1)
    return [
        sample(
            finish_s=float(finish[i]),
            cost_s=0.5 + float(extra[i]),
            answer=None if kinds[i] == 3 else int(kinds[i]),
            correct=bool(is_right[i]),
            score=float(score[i]),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def law():
    """Fresh draws for the truth, and recorded problems for the estimate."""
    generator = np.random.default_rng(1)
    # Nine samples cost at least 4.5 seconds, so a budget of 4 cannot exhaust them.
    return [draw(generator, 9) for _ in range(3000)], [draw(generator, 9) for _ in range(300)]


def assert_unbiased(curve, truth):
    error = math.hypot(
        np.std(truth, ddof=1) / math.sqrt(len(truth)),
        curve.values.std(ddof=1) / math.sqrt(len(curve.values)),
    )
    assert error < 0.02
    assert abs(curve.mean[0] - np.mean(truth)) < 3.5 * error


@pytest.mark.parametrize("method", METHODS)
def test_saturated_curve_is_unbiased(law, method):
    """Against the policy itself on fresh draws."""
    fresh, recorded = law
    truth = []
    for problem in fresh:
        there, spent = [], 0.0
        for s in problem:
            spent += s.cost_s
            if spent > 4.0:
                break
            there.append(s)
        truth.append(outcome(there, method))
    curve = saturated_curve(recorded, [4.0], method, num_orders=32)
    assert curve.exhausted.tolist() == [0.0]
    assert_unbiased(curve, truth)


@pytest.mark.parametrize("method", METHODS)
def test_latency_curve_is_unbiased(law, method):
    """k samples of N that ran together are worth as much as k fresh samples of the same law."""
    fresh, recorded = law
    truth = [outcome([s for s in p[:3] if s.finish_s <= 0.8], method) for p in fresh]
    assert_unbiased(latency_curve(recorded, [0.8], method, 3), truth)


def test_area_is_the_integral_over_log_time():
    problems = [
        [sample(finish_s=2.0, correct=True), sample(finish_s=5.0)],
        [sample(finish_s=20.0, correct=True), sample(finish_s=1.0)],
    ]
    curve = latency_curve(problems, [10.0], "coverage", 2, window=(1.0, 10.0))
    assert curve.areas == pytest.approx([math.log(5) / math.log(10), 0.0])
    problems = [[sample(cost_s=1.0, correct=True), sample(cost_s=4.0)]]
    curve = saturated_curve(problems, [4.5], "coverage", window=(1.0, 4.5))
    # Right sample first: from 1 s on. Wrong one first: not before 5 s.
    assert curve.areas == pytest.approx([0.5])


def test_budget_beyond_the_samples_is_refused():
    problems = [[sample(cost_s=1.0)] * 4] * 9 + [[sample(cost_s=0.5)] * 4]
    assert largest_budget(problems) == pytest.approx(4.0)
    assert largest_budget(problems) < 4.0
    assert saturated_curve(problems, [1.9, 2.0], "maj").exhausted.tolist() == [0.0, 0.1]
    with pytest.raises(ValueError, match=r"budget 4: .* 10% .* draw more samples"):
        saturated_curve(problems, [4.0], "maj")
    with pytest.raises(ValueError, match="budget 9"):
        saturated_curve(problems, [2.0], "maj", window=(1.0, 9.0))
    assert largest_budget(problems, max_exhausted=0.0) < 2.0


def test_wrong_values_are_refused():
    problems = [[sample(score=None, reward_s=None)] * 2]
    for arguments, text in (
        (([1.0], "pass", 1), "method is 'pass'"),
        (([2.0, 1.0], "maj", 1), "ascending"),
        (([-1.0], "maj", 1), "0 or more"),
        (([1.0], "maj", 3), "k is 3; need 1 to 2"),
        (([1.0], "maj", 0), "k is 0"),
        (([1.0], "bon", 1), "bon needs rewards"),
    ):
        with pytest.raises(ValueError, match=text):
            latency_curve(problems, *arguments)
    with pytest.raises(ValueError, match="at least one problem"):
        latency_curve([[]], [1.0], "maj", 1)
    with pytest.raises(ValueError, match="uses no reward model"):
        latency_curve(problems, [1.0], "maj", 1, with_reward_time=True)
    with pytest.raises(ValueError, match="window"):
        latency_curve(problems, [1.0], "maj", 1, window=(0.0, 1.0))
