"""Coverage and accuracy within a time budget, from recorded finish times.

Two regimes, never mixed (definitions and proofs: docs/metrics.md):

latency: one problem owns the server and its samples run together. A budget of t seconds leaves the
    samples that finished by t; the value is the expectation over random subsets of k of the N.
saturated: all problems share the server. Samples are drawn one after another until their attributed
    costs exceed t seconds per problem; the one that straddles the limit is lost. The value is the
    mean over random orders of the N recorded samples.

Coverage follows Chen et al. 2021 (section 2.1) with the number of correct samples finished by t in
place of the number of correct samples. Ties, silent samples and weights are those of
`lm_eval_tasks.voting`; nothing finished is a wrong result.

Shapes: P problems, N samples of a problem, R orders, T times, D bootstrap draws.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_tasks.estimators import pass_at_k
from lm_eval_tasks.scored import ScoredSample
from lm_eval_tasks.voting import comparable, weight_scale, whole_weight

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: What is made of the samples that are there: is one correct, majority, best score, weighted vote.
METHODS = ("coverage", "maj", "bon", "weighted_bon")
#: Methods that need rewards, and whose time can include the reward model's.
REWARD_METHODS = ("bon", "weighted_bon")
NUM_ORDERS = 256
#: Largest share of problems that may run out of recorded samples within a budget.
MAX_EXHAUSTED = 0.10


@dataclass(frozen=True)
class BudgetCurve:
    """A value against time, problem by problem."""

    method: str
    times: Floats
    """(T,) seconds (or another cost), ascending."""
    values: Floats
    """(P, T) expected value of each problem."""
    mc_errors: Floats
    """(T,) standard error of the mean over problems from drawing orders; 0 where exact."""
    areas: Floats | None
    """(P,) mean value over the logarithm of time in the window; None without a window."""
    exhausted: Floats
    """(T,) share of problems with all N samples inside the budget; 0 in the latency regime."""

    @property
    def mean(self) -> Floats:
        """(T,) mean over problems."""
        mean: Floats = self.values.mean(axis=0)
        return mean


# -- one problem ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """The samples of a problem as arrays of length N."""

    finish_s: Floats
    cost_s: Floats
    reward_s: Floats
    """NaN where the reward model did not read the sample."""
    column: Ints
    """Number of the answer class, -1 without an answer."""
    correct: Floats
    weight: Floats
    """Score as a whole number, so that sums are exact; NaN without a score."""
    score: Floats
    """Score, for comparing; NaN without."""

    @classmethod
    def of(cls, samples: Sequence[ScoredSample]) -> "_Problem":
        numbers: dict[int | None, int] = {None: -1}
        for sample in samples:
            numbers.setdefault(sample.answer_class, len(numbers) - 1)
        scores = [sample.score for sample in samples]
        scale = weight_scale(scores)
        rewards = [sample.reward_s for sample in samples]
        return cls(
            finish_s=np.array([sample.finish_s for sample in samples]),
            cost_s=np.array([sample.cost_s for sample in samples]),
            reward_s=np.array([math.nan if r is None else r for r in rewards]),
            column=np.array([numbers[sample.answer_class] for sample in samples], dtype=np.int64),
            correct=np.array([float(sample.correct) for sample in samples]),
            weight=np.array(
                [math.nan if s is None else float(whole_weight(s, scale)) for s in scores]
            ),
            score=np.array([math.nan if s is None else comparable(s) for s in scores]),
        )

    def __len__(self) -> int:
        return len(self.column)

    def generator(self, seed: int) -> np.random.Generator:
        """Return a generator of its own: problems draw independently, runs reproducibly.

        Of the times only the costs count: with tokens as costs nothing depends on the clock.
        """
        parts = (self.cost_s, self.column, self.correct)
        text = repr((seed, [part.tolist() for part in parts])).encode()
        digest = hashlib.blake2b(text, digest_size=16).digest()
        return np.random.default_rng(int.from_bytes(digest, "big"))


def prefix_values(samples: Sequence[ScoredSample], orders: Ints, method: str) -> Floats:
    """Return what a method makes of the first 0, 1, 2, ... samples of given orders.

    Args:
        samples: the N samples of a problem.
        orders: (R, n) positions in ``samples``, each row without repetition.
        method: one of `METHODS`.

    Returns:
        (R, n + 1) values in [0, 1].
    """
    return _prefix_values(_Problem.of(samples), orders, method)


def _prefix_values(problem: _Problem, orders: Ints, method: str) -> Floats:
    if method == "coverage":
        seen = np.maximum.accumulate(problem.correct[orders], axis=1)
        return np.concatenate([np.zeros((len(orders), 1)), seen], axis=1)
    if method == "bon":
        return _best_of_prefix(problem, orders)
    weight = np.ones(len(problem)) if method == "maj" else problem.weight
    return _vote_of_prefix(problem, orders, weight)


def _best_of_prefix(problem: _Problem, orders: Ints) -> Floats:
    """The sample with the best score so far; equal scores are equally likely to be chosen."""
    score = np.where(problem.column >= 0, problem.score, math.nan)
    best = np.full(len(orders), -1.0)
    tied, right = np.zeros(len(orders)), np.zeros(len(orders))
    values = np.zeros((len(orders), orders.shape[1] + 1))
    for j in range(orders.shape[1]):
        new, correct = score[orders[:, j]], problem.correct[orders[:, j]]
        is_better, is_equal = new > best, new == best
        best = np.where(is_better, new, best)
        tied = np.where(is_better, 1.0, tied + is_equal)
        right = np.where(is_better, correct, right + is_equal * correct)
        values[:, j + 1] = right / np.maximum(tied, 1.0)
    return values


def _vote_of_prefix(problem: _Problem, orders: Ints, weight: Floats) -> Floats:
    """The class with the largest sum of weights so far; see `lm_eval_tasks.voting.vote`."""
    num_rows, num_positions = orders.shape
    values = np.zeros((num_rows, num_positions + 1))
    is_voter = (problem.column >= 0) & ~np.isnan(weight)
    if not problem.correct[is_voter].any():
        return values
    width = int(problem.column.max()) + 1
    totals = np.full((num_rows, width), -1.0)  # below zero: no vote yet, a weight of zero is one
    votes, rights = np.zeros((num_rows, width)), np.zeros((num_rows, width))
    rows = np.arange(num_rows)
    for j in range(num_positions):
        chosen = orders[:, j]
        casts = is_voter[chosen]
        row, sample = rows[casts], chosen[casts]
        cell = (row, problem.column[sample])
        totals[cell] = np.maximum(totals[cell], 0.0) + weight[sample]
        votes[cell] += 1
        rights[cell] += problem.correct[sample]
        is_best = totals == totals.max(axis=1, keepdims=True)
        worth = np.where(is_best, rights / np.maximum(votes, 1.0), 0.0).sum(axis=1)
        # Before the first vote every class is tied with a worth of zero.
        values[:, j + 1] = worth / is_best.sum(axis=1)
    return values


@dataclass(frozen=True)
class _Steps:
    """Step functions of time: a row per order."""

    arrivals: Floats
    """(R, n) ascending times at which the 1st, 2nd, ... sample is there."""
    values: Floats
    """(R, n + 1) value with 0, 1, 2, ... samples."""
    is_random: bool
    """Whether the rows are random draws, which have an error."""

    def at(self, times: Floats) -> tuple[Floats, Floats]:
        """Return the mean over rows at the times, and its variance from drawing rows."""
        drawn = np.stack(
            [
                value[np.searchsorted(arrival, times, side="right")]
                for arrival, value in zip(self.arrivals, self.values, strict=True)
            ]
        )
        if not self.is_random:
            return drawn.mean(axis=0), np.zeros(len(times))
        return drawn.mean(axis=0), drawn.var(axis=0, ddof=1) / len(drawn)

    def area(self, window: tuple[float, float]) -> float:
        """Return the mean of the value over log time in the window, exactly."""
        low, high = np.log(window)
        with np.errstate(divide="ignore"):
            edges = np.clip(np.log(self.arrivals), low, high)
        ends = np.full((len(edges), 1), high)
        widths = np.diff(np.concatenate([ends * 0 + low, edges, ends], axis=1), axis=1)
        return float((widths * self.values).sum(axis=1).mean() / (high - low))


# -- curves ---------------------------------------------------------------------------------------


def latency_curve(
    problems: Sequence[Sequence[ScoredSample]],
    times: Sequence[float] | Floats,
    method: str,
    k: int,
    *,
    with_reward_time: bool = False,
    window: tuple[float, float] | None = None,
    num_orders: int = NUM_ORDERS,
    seed: int = 0,
) -> BudgetCurve:
    """Return the value within t seconds of a problem's own clock, for k samples out of N.

    Args:
        problems: samples of each problem; all N of a problem ran together.
        times: budgets in seconds, ascending.
        method: one of `METHODS`. Coverage is exact; the others are for k = N or few subsets.
        k: samples that are looked at. The times are those under the load of all N.
        with_reward_time: the reward model reads the finished samples one after the other before
            the answer is given (methods with rewards only).
        window: (t_min, t_max) of the area.
        num_orders: random subsets, where there are more.
        seed: of the subsets.

    Raises:
        ValueError: a problem has fewer than k samples, or a value is out of range.
    """
    at, arrays = _checked(problems, times, method, with_reward_time, window)
    fewest = min(len(problem) for problem in arrays)
    if not 1 <= k <= fewest:
        raise ValueError(f"k is {k}; need 1 to {fewest}, the fewest samples of a problem")

    def steps(problem: _Problem) -> _Steps:
        by_time = np.argsort(problem.finish_s, kind="stable")
        if method == "coverage":
            counts = np.concatenate(([0.0], np.cumsum(problem.correct[by_time])))
            exact = [pass_at_k(len(problem), int(count), k) for count in counts]
            return _Steps(problem.finish_s[by_time][None], np.array([exact]), is_random=False)
        ranks, is_random = _subsets(len(problem), k, num_orders, problem.generator(seed))
        orders = by_time[np.sort(ranks, axis=1)]
        arrivals = problem.finish_s[orders]
        if with_reward_time:
            arrivals = arrivals + np.cumsum(np.nan_to_num(problem.reward_s[orders]), axis=1)
        return _Steps(arrivals, _prefix_values(problem, orders, method), is_random)

    return _curve(arrays, at, method, window, steps, np.zeros(len(at)))


def saturated_curve(
    problems: Sequence[Sequence[ScoredSample]],
    budgets: Sequence[float] | Floats,
    method: str,
    *,
    with_reward_time: bool = False,
    window: tuple[float, float] | None = None,
    num_orders: int = NUM_ORDERS,
    seed: int = 0,
    max_exhausted: float = MAX_EXHAUSTED,
) -> BudgetCurve:
    """Return the value of drawing samples until t seconds of cost per problem are spent.

    Args:
        problems: samples of each problem with their costs.
        budgets: cost per problem, ascending.
        method: one of `METHODS`.
        with_reward_time: adds the reward model's time to each sample's cost (methods with rewards
            only).
        window: (t_min, t_max) of the area.
        num_orders: random orders, unless all orders are fewer.
        seed: of the orders.
        max_exhausted: largest share of problems that may run out of recorded samples.

    Raises:
        ValueError: a budget (or the window) is beyond `largest_budget`, or out of range.
    """
    at, arrays = _checked(problems, budgets, method, with_reward_time, window)
    limit = _largest_budget(arrays, with_reward_time, max_exhausted)
    highest = max(at[-1], window[1] if window else 0.0)
    if highest > limit:
        raise ValueError(
            f"budget {highest:.6g}: {limit:.6g} is the largest at which at most "
            f"{max_exhausted:.0%} of the problems run out of recorded samples; draw more samples"
        )

    def steps(problem: _Problem) -> _Steps:
        orders, is_random = _orders(len(problem), num_orders, problem.generator(seed))
        arrivals = np.cumsum(_costs(problem, with_reward_time)[orders], axis=1)
        return _Steps(arrivals, _prefix_values(problem, orders, method), is_random)

    totals = np.array([_total(problem, with_reward_time) for problem in arrays])
    exhausted = (totals[:, None] <= at).mean(axis=0)
    return _curve(arrays, at, method, window, steps, exhausted)


def largest_budget(
    problems: Sequence[Sequence[ScoredSample]],
    *,
    with_reward_time: bool = False,
    max_exhausted: float = MAX_EXHAUSTED,
) -> float:
    """Return the largest budget per problem that `saturated_curve` accepts."""
    arrays = [_Problem.of(samples) for samples in problems]
    return _largest_budget(arrays, with_reward_time, max_exhausted)


def _largest_budget(arrays: Sequence[_Problem], with_reward: bool, max_exhausted: float) -> float:
    if not 0 <= max_exhausted < 1:
        raise ValueError(f"max_exhausted is {max_exhausted}; need 0 or more and below 1")
    totals = sorted(_total(problem, with_reward) for problem in arrays)
    # At this problem's total the share would exceed the limit. (1e-9: 0.1 * 10 is no exact 1.)
    return math.nextafter(totals[math.floor(max_exhausted * len(totals) + 1e-9)], 0.0)


def _costs(problem: _Problem, with_reward: bool) -> Floats:
    return problem.cost_s + np.nan_to_num(problem.reward_s) if with_reward else problem.cost_s


def _total(problem: _Problem, with_reward: bool) -> float:
    return math.fsum(_costs(problem, with_reward).tolist())


def _checked(
    problems: Sequence[Sequence[ScoredSample]],
    times: Sequence[float] | Floats,
    method: str,
    with_reward_time: bool,
    window: tuple[float, float] | None,
) -> tuple[Floats, list[_Problem]]:
    at = np.asarray(times, dtype=np.float64)
    if at.ndim != 1 or not len(at) or at[0] < 0 or not (np.diff(at) >= 0).all():
        raise ValueError("times must be a list of ascending numbers, 0 or more")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; accepted are {', '.join(METHODS)}")
    if not problems or not all(problems):
        raise ValueError("need at least one problem, and at least one sample of each")
    if window is not None and not 0 < window[0] < window[1]:
        raise ValueError(f"window is {window}; need 0 < t_min < t_max")
    arrays = [_Problem.of(samples) for samples in problems]
    needs_reward = method in REWARD_METHODS
    if needs_reward and all(np.isnan(problem.weight).all() for problem in arrays):
        raise ValueError(f"{method} needs rewards, and no sample has one")
    if with_reward_time and not needs_reward:
        raise ValueError(f"{method} uses no reward model; with_reward_time is for {REWARD_METHODS}")
    if with_reward_time and all(np.isnan(problem.reward_s).all() for problem in arrays):
        raise ValueError("with_reward_time needs the reward model's seconds, and no sample has any")
    return at, arrays


def _subsets(
    count: int, k: int, num_orders: int, generator: np.random.Generator
) -> tuple[Ints, bool]:
    """Return (R, k) subsets of range(count): all of them where they are few, else random ones."""
    if math.comb(count, k) <= num_orders:
        return np.array(list(itertools.combinations(range(count), k)), dtype=np.int64), False
    return np.argsort(generator.random((num_orders, count)), axis=1)[:, :k], True


def _orders(count: int, num_orders: int, generator: np.random.Generator) -> tuple[Ints, bool]:
    """Return (R, count) orders: all of them where they are few, else random ones."""
    if count <= 12 and math.factorial(count) <= num_orders:
        return np.array(list(itertools.permutations(range(count))), dtype=np.int64), False
    return np.argsort(generator.random((num_orders, count)), axis=1), True


def _curve(
    arrays: Sequence[_Problem],
    times: Floats,
    method: str,
    window: tuple[float, float] | None,
    steps_of: Callable[[_Problem], _Steps],
    exhausted: Floats,
) -> BudgetCurve:
    values, variances, areas = [], [], []
    for problem in arrays:
        steps = steps_of(problem)
        value, variance = steps.at(times)
        values.append(value)
        variances.append(variance)
        if window is not None:
            areas.append(steps.area(window))
    errors = np.sqrt(np.sum(variances, axis=0)) / len(arrays)
    found = np.array(areas) if window is not None else None
    return BudgetCurve(method, times, np.array(values), errors, found, exhausted)
