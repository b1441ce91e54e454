"""Unbiased estimates over all subsets of k of the N recorded samples, and their errors.

Every estimator is the expectation, over a subset of k samples drawn without replacement from the N
recorded ones, of what a method makes of that subset. Unlike a value from the first k samples it
uses all N and does not depend on their order; unlike a plug-in formula such as ``1 - (1 - c/N)^k``
it is unbiased for k independent samples.

pass@k       the subset holds a right answer: ``1 - C(N-c, k) / C(N, k)`` (Chen et al. 2021,
             arXiv 2107.03374, section 2.1)
maj@k        the vote of the subset is right (`lm_eval_tasks.voting.vote`): exact up to
             `MAX_EXACT_SAMPLES`, by the generating function of the multivariate hypergeometric
             distribution
bon@k        the sample of the subset with the highest score is right: closed form over ranks
weighted_bon@k  the vote of the subset weighted by scores is right: exact where all scores are
             equal, k is 1 or N, or the subsets are few; else Monte Carlo with a standard error

With fewer than k samples the value is NaN. The problems are the sampled unit, so standard errors
and bootstrap intervals are taken over problems. docs/metrics.md has every definition.
"""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lm_eval_tasks.voting import comparable, vote, weight_scale, whole_weight

Floats = npt.NDArray[np.float64]

#: Above it C(N, k) leaves the range of floats, and maj@k is estimated by Monte Carlo.
MAX_EXACT_SAMPLES = 1000
#: Random subsets of a problem for each k. The error of one problem is below 0.5 / sqrt(1024) = 1.6
#: points, that of a mean over 500 problems below 0.07 points.
NUM_SUBSETS = 1024
#: Subsets are enumerated up to this number of them.
_MAX_ENUMERATED = 1024
_DRAWS = 2000


class Estimate(NamedTuple):
    """A mean over problems and its standard error (NaN for fewer than two problems)."""

    mean: float
    stderr: float


class Subsets(NamedTuple):
    """An expectation over subsets for several k, of one problem."""

    values: Floats
    """One per k, NaN where fewer than k samples exist."""
    errors: Floats
    """Standard error of the Monte Carlo; 0 where the value is exact, NaN where it is NaN."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that k of the recorded samples contain a correct one.

    Args:
        num_samples: N, samples recorded for the problem.
        num_correct: c, how many of them are correct, 0 <= c <= N.
        k: subset size, at least 1.

    Returns:
        A probability; NaN when fewer than k samples exist, because no subset of that size was seen.

    Raises:
        ValueError: a count is negative, c exceeds N, or k is below 1.
    """
    if num_samples < 0 or not 0 <= num_correct <= num_samples:
        raise ValueError(f"need 0 <= num_correct <= num_samples, got {num_correct}, {num_samples}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if num_samples < k:
        return math.nan
    num_wrong = num_samples - num_correct
    if num_wrong < k:
        return 1.0
    # C(N-c, k) / C(N, k) = prod_{m=N-c+1..N} (1 - k/m); as a sum of log1p it neither overflows nor
    # loses the small differences that a product of numbers near one would.
    if num_correct == 0:
        return 0.0  # not the -0.0 of the formula below
    log_miss = math.fsum(math.log1p(-k / m) for m in range(num_wrong + 1, num_samples + 1))
    return -math.expm1(log_miss)


# -- votes ----------------------------------------------------------------------------------------


def majority_at_k(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    ks: Sequence[int],
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
) -> Subsets:
    """Return the probability that the majority vote of k samples is right, for each k.

    Args:
        classes: answer class of each of the N samples, None for a sample that does not vote.
        is_correct: verdict on each.
        ks: subset sizes, each at least 1.
        num_subsets: of the Monte Carlo, for N above `MAX_EXACT_SAMPLES`.
        seed: of the Monte Carlo; mixed with the samples, so that problems draw independently.

    Raises:
        ValueError: a k is below 1, or the two lists differ in length.
    """
    _check(ks, classes, is_correct)
    num_samples = len(classes)
    voters: dict[int, list[bool]] = defaultdict(list)
    for number, correct in zip(classes, is_correct, strict=True):
        if number is not None:
            voters[number].append(correct)
    shares = {number: sum(votes) / len(votes) for number, votes in voters.items()}
    if num_samples > MAX_EXACT_SAMPLES and len(set(shares.values()) | {0.0}) > 1:
        weights = [1.0] * num_samples
        return _monte_carlo(classes, is_correct, weights, ks, num_subsets, seed)
    values = np.full(len(ks), np.nan)
    possible = [i for i, k in enumerate(ks) if k <= num_samples]
    values[possible] = 0.0
    if num_samples > MAX_EXACT_SAMPLES:  # no right answer among the votes
        return Subsets(values, np.where(np.isnan(values), np.nan, 0.0))
    sizes = {number: len(votes) for number, votes in voters.items()}
    for number, share in shares.items():
        if share > 0 and possible:
            rest = [size for other, size in sizes.items() if other != number]
            chosen = [ks[i] for i in possible]
            values[possible] += share * _win_probability(
                sizes[number], rest, num_samples - sum(sizes.values()), chosen
            )
    values = np.minimum(values, 1.0)  # rounding of the last digit
    return Subsets(values, np.where(np.isnan(values), np.nan, 0.0))


def _win_probability(size: int, rivals: list[int], num_silent: int, ks: Sequence[int]) -> Floats:
    r"""Return the probability that a class wins the vote of k samples, ties split evenly.

    The class wins with s votes, tied with j others, with weight 1 / (j + 1) = integral of y^j over
    [0, 1]. The number of subsets with s votes for it, j rivals at s and all others below is the
    coefficient of x^(k-s) y^j in

        C(size, s) (1 + x)^m  prod over rivals of at least s: sum_{v<s} C(n, v) x^v + y C(n, s) x^s

    where m counts the silent samples and those of rivals too small to reach s. Gauss-Legendre
    quadrature integrates the polynomial in y exactly. All terms are positive, so nothing cancels.

    Args:
        size: samples of the class.
        rivals: samples of each other class.
        num_silent: samples that do not vote.
        ks: subset sizes, none above the number of samples.
    """
    total = size + sum(rivals) + num_silent
    largest = max(ks)
    wins = np.zeros(largest + 1)
    for s in range(1, min(size, largest) + 1):
        able = [n for n in rivals if n >= s]
        silent = _binomials(total - size - sum(able))[: largest - s + 1]
        if s == 1:
            # The rivals' product is sum over t of e_t(able) x^t y^t, so y needs no quadrature.
            symmetric: Any = np.ones(1)
            for n in able:
                symmetric = np.convolve(symmetric, (1.0, n))[:largest]
            parts = np.convolve(symmetric / np.arange(1, len(symmetric) + 1), silent)[:largest]
        else:
            most_ties = min(len(able), (largest - s) // s)
            nodes, node_weights = _unit_nodes(most_ties // 2 + 1)
            product = np.tile(silent, (len(nodes), 1))
            for n in able:
                product = _multiply(product, _binomials(n)[: s + 1], nodes, largest - s + 1)
            parts = node_weights @ product
        wins[s : s + len(parts)] += math.comb(size, s) * parts
    return np.array([wins[k] / math.comb(total, k) for k in ks])


def _multiply(rows: Floats, factor: Floats, nodes: Floats, length: int) -> Floats:
    """Multiply polynomials by one of which the last coefficient differs from row to row.

    Args:
        rows: one polynomial per row.
        factor: the coefficients of the factor, the last one still to be multiplied by the node.
        nodes: one per row.
        length: number of coefficients to keep.
    """
    if len(factor) > len(rows):
        scaled = (np.append(factor[:-1], factor[-1] * node) for node in nodes)
        return np.stack([np.convolve(*pair)[:length] for pair in zip(rows, scaled, strict=True)])
    result = np.zeros((len(rows), min(rows.shape[1] + len(factor) - 1, length)))
    for v, coefficient in enumerate(factor):
        width = min(rows.shape[1], result.shape[1] - v)
        if width > 0:
            is_last = v == len(factor) - 1
            scale = (coefficient * nodes)[:, None] if is_last else coefficient
            result[:, v : v + width] += scale * rows[:, :width]
    return result


@lru_cache(maxsize=2 * MAX_EXACT_SAMPLES)
def _binomials(n: int) -> Floats:
    """Return C(n, v) for v from 0 to n; read only, since the arrays are shared."""
    row = np.array([float(math.comb(n, v)) for v in range(n + 1)])
    row.flags.writeable = False
    return row


@lru_cache(maxsize=MAX_EXACT_SAMPLES)
def _unit_nodes(count: int) -> tuple[Floats, Floats]:
    """Return the Gauss-Legendre nodes and weights on [0, 1], exact up to degree 2 count - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def weighted_bon_at_k(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    scores: Sequence[float | None],
    ks: Sequence[int],
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
) -> Subsets:
    """Return the probability that the vote of k samples weighted by their scores is right.

    Args:
        classes: answer class of each of the N samples, None for a sample that does not vote.
        is_correct: verdict on each.
        scores: reward of each, 0 or more; None: the sample does not vote.
        ks: subset sizes, each at least 1.
        num_subsets: of the Monte Carlo, which is used unless the value is known exactly: all
            scores equal and above 0, no right answer, k = 1, k = N, or few subsets.
        seed: of the Monte Carlo; mixed with the samples, so that problems draw independently.

    Raises:
        ValueError: a k is below 1, a score is negative or not finite, or the lists
            differ in length.
    """
    _check(ks, classes, is_correct, scores)
    votes = [n if s is not None else None for n, s in zip(classes, scores, strict=True)]
    scale = weight_scale(scores)
    weights = [whole_weight(score, scale) if score is not None else 0 for score in scores]
    cast = {weight for weight, number in zip(weights, votes, strict=True) if number is not None}
    if len(cast) <= 1 and 0 not in cast:
        return majority_at_k(votes, is_correct, ks, num_subsets, seed)
    given = [score if score is not None else 0.0 for score in scores]
    return _monte_carlo(votes, is_correct, given, ks, num_subsets, seed)


def _monte_carlo(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    weights: Sequence[float],
    ks: Sequence[int],
    num_subsets: int,
    seed: int,
) -> Subsets:
    """Return the expected weighted vote, from all subsets or, where they are many, random ones.

    One random order of the samples gives a subset for every k, its first k samples. The subsets of
    one k come from different orders and are independent.
    """
    count = len(classes)
    # One scale for the problem, so that its subsets count alike whether all or some are looked at.
    scale = weight_scale(weights)
    whole = [whole_weight(weight, scale) for weight in weights]
    values, errors = np.full(len(ks), np.nan), np.full(len(ks), np.nan)
    random_ks = []
    for i, k in enumerate(ks):
        if k > count:
            continue
        if math.comb(count, k) <= _MAX_ENUMERATED:
            subsets = itertools.combinations(range(count), k)
            votes = [
                vote([classes[j] for j in s], [is_correct[j] for j in s], [whole[j] for j in s])
                for s in subsets
            ]
            values[i], errors[i] = math.fsum(votes) / len(votes), 0.0
        else:
            random_ks.append((k, i))
    right = {c for number, c in zip(classes, is_correct, strict=True) if number is not None}
    if True not in right:
        for _, i in random_ks:
            values[i], errors[i] = 0.0, 0.0
    elif random_ks:
        random_ks.sort()
        draws = _random_votes(
            classes, is_correct, whole, [k for k, _ in random_ks], num_subsets, seed
        )
        for (_, i), votes_of_k in zip(random_ks, draws, strict=True):
            values[i] = votes_of_k.mean()
            errors[i] = votes_of_k.std(ddof=1) / math.sqrt(num_subsets)
    return Subsets(values, errors)


def _random_votes(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    weights: Sequence[int],
    ks: Sequence[int],
    num_subsets: int,
    seed: int,
) -> list[Floats]:
    """Return the vote of ``num_subsets`` random subsets for each of the ascending ks."""
    count = len(classes)
    numbers = {number: i for i, number in enumerate(dict.fromkeys(classes))}
    if None in numbers:  # silent samples get the last column, which is cut off again
        numbers = {n: i for i, n in enumerate([*(n for n in numbers if n is not None), None])}
    width, is_silent = len(numbers), None in numbers
    column = np.array([numbers[number] for number in classes])
    correct = np.array(is_correct, dtype=np.float64)
    weight = np.array(weights, dtype=np.float64)  # exact below 2**53
    seed_text = repr((seed, column.tolist(), correct.tolist(), weight.tolist())).encode()
    digest = hashlib.blake2b(seed_text, digest_size=16).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "big"))
    votes_of = np.bincount(column, minlength=width)
    share = np.bincount(column, weights=correct, minlength=width) / votes_of
    # Votes and right votes are counted only where the totals and the shares do not imply them.
    is_mixed = bool(((share > 0) & (share < 1))[: width - is_silent].any())
    need_votes = is_mixed or bool((weight[column < width - is_silent] == 0).any())
    shape = (num_subsets, width)
    totals, votes, rights = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    order = np.argsort(generator.random((num_subsets, count), dtype=np.float32), axis=1)
    row = np.arange(num_subsets)[:, None] * width
    spoken = slice(0, width - is_silent)
    results = []
    for first, k in itertools.pairwise([0, *ks]):
        drawn = order[:, first:k]
        cell = (row + column[drawn]).ravel()

        def add(table: Floats, amount: Floats | None, cell: Any = cell, drawn: Any = drawn) -> None:
            added = None if amount is None else amount[drawn].ravel()
            table += np.bincount(cell, weights=added, minlength=table.size).reshape(shape)

        add(totals, weight)
        if need_votes:
            add(votes, None)
        if is_mixed:
            add(rights, correct)
        has_voted = (votes if need_votes else totals)[:, spoken] > 0
        candidates = np.where(has_voted, totals[:, spoken], -1.0)
        is_best = has_voted & (candidates == candidates.max(axis=1, initial=-1.0, keepdims=True))
        if is_mixed:
            worth = (is_best * rights[:, spoken] / np.maximum(votes[:, spoken], 1)).sum(axis=1)
        else:
            worth = is_best @ share[spoken]
        results.append(worth / np.maximum(is_best.sum(axis=1), 1))
    return results


# -- best of n ------------------------------------------------------------------------------------


def best_of_n_at_k(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    scores: Sequence[float | None],
    ks: Sequence[int],
) -> Floats:
    """Return the probability that the sample with the highest score among k is right, for each k.

    With candidates sorted by falling score, those tied at positions s+1..e of N are best with
    probability ``(C(N-s, k) - C(N-e, k)) / C(N, k)``, and then each of them equally likely.

    Args:
        classes: answer class of each of the N samples; None: no answer, so it is no candidate. It
            still takes one of the k places.
        is_correct: verdict on each.
        scores: reward of each; None: no candidate.
        ks: subset sizes, each at least 1.

    Returns:
        One value per k, NaN where fewer than k samples exist.

    Raises:
        ValueError: a k is below 1, a score is not finite, or the lists differ in length.
    """
    _check(ks, classes, is_correct, scores)
    count = len(classes)
    groups: dict[float, list[bool]] = defaultdict(list)
    for number, correct, score in zip(classes, is_correct, scores, strict=True):
        if number is not None and score is not None:
            groups[comparable(score)].append(correct)
    ends = list(itertools.accumulate(len(groups[s]) for s in sorted(groups, reverse=True)))
    shares = np.array([sum(groups[s]) / len(groups[s]) for s in sorted(groups, reverse=True)])
    values = np.full(len(ks), np.nan)
    # Column e: probability that k samples miss the e best, C(N-e, k) / C(N, k).
    best = np.arange(1, count + 1)
    for i, k in enumerate(ks):
        if k <= count:
            steps = np.maximum(count - best + 1 - k, 0) / (count - best + 1)
            misses = np.concatenate(([1.0], np.cumprod(steps)))
            values[i] = float(np.dot(misses[[0, *ends[:-1]]] - misses[ends], shares)) if ends else 0
    return values


def _check(ks: Sequence[int], first: Sequence[Any], *others: Sequence[Any]) -> None:
    if any(k < 1 for k in ks):
        raise ValueError(f"k must be at least 1, got {min(ks)}")
    if any(len(other) != len(first) for other in others):
        raise ValueError(f"lists of {len(first)} and {[len(o) for o in others]} samples; need one")


# -- over problems --------------------------------------------------------------------------------


def mean_and_stderr(values: Sequence[float]) -> Estimate:
    """Return the mean over problems and the standard error of that mean, deviation / sqrt(P).

    Args:
        values: one value per problem; a NaN makes the result NaN.

    Raises:
        ValueError: there is no problem.
    """
    if not len(values):
        raise ValueError("need at least one problem, got none")
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def pass_at_k_over_problems(counts: Sequence[tuple[int, int]], k: int) -> Estimate:
    """Return pass@k over a benchmark.

    Args:
        counts: one (num_samples, num_correct) per problem.
        k: subset size; the result is NaN when any problem has fewer than k samples.
    """
    return mean_and_stderr([pass_at_k(n, c, k) for n, c in counts])


def reported_ks(num_samples: int) -> list[int]:
    """Return the k that are reported for N samples: the powers of two up to N, and N itself."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    ks = [2**power for power in range(num_samples.bit_length())]
    return ks if ks[-1] == num_samples else [*ks, num_samples]


@dataclass(frozen=True)
class Interval:
    """A value over problems and its percentile bootstrap interval."""

    value: float
    low: float
    high: float


def resample_counts(num_problems: int, draws: int = _DRAWS, seed: int = 0) -> Floats:
    """Return how often each bootstrap draw takes each problem.

    The same counts used for two models, or for every point of a curve, make the draws paired.

    Args:
        num_problems: P.
        draws: D.
        seed: of the draws.

    Returns:
        (D, P), each row adding up to P.

    Raises:
        ValueError: there is no problem or no draw.
    """
    if num_problems < 1 or draws < 1:
        raise ValueError(f"need at least one problem and one draw, got {num_problems}, {draws}")
    generator = np.random.default_rng(seed)
    shares = np.full(num_problems, 1 / num_problems)
    return generator.multinomial(num_problems, shares, size=draws).astype(np.float64)


def bootstrap(
    values: Sequence[float] | Floats,
    level: float = 0.95,
    draws: int = _DRAWS,
    seed: int = 0,
    statistic: Callable[[Floats], Floats] | None = None,
) -> list[Interval]:
    """Return percentile bootstrap intervals of means over problems.

    Args:
        values: (P,) or (P, K), one row per problem; a NaN makes its column NaN.
        level: of the interval.
        draws: resamples of the problems.
        seed: of the draws.
        statistic: turns the (D, K) means of the draws, and the (1, K) means of all problems, into
            (D, M) and (1, M) numbers, for example the area under a curve; by default the means.

    Returns:
        K intervals, or M; for (P,) values one.

    Raises:
        ValueError: no problem, no draw, or a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    counts = resample_counts(len(table), draws, seed)
    means = counts @ table / len(table)
    point = table.mean(axis=0, keepdims=True)
    if statistic is not None:
        means, point = statistic(means), statistic(point)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return [
        Interval(float(value), float(a), float(b))
        for value, a, b in zip(point[0], low, high, strict=True)
    ]


def paired_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    level: float = 0.95,
    draws: int = _DRAWS,
    seed: int = 0,
) -> tuple[Interval, float]:
    """Return the mean difference of two models on the same problems.

    Args:
        values: one per problem.
        baseline: one per problem, in the same order.
        level: of the bootstrap interval.
        draws: resamples of the problems, the same for both models.
        seed: of the draws.

    Returns:
        The difference with its interval, and its standard error from the paired differences.

    Raises:
        ValueError: the two have different numbers of problems, or none.
    """
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} and {len(baseline)} problems; need the same problems")
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    (interval,) = bootstrap(differences, level, draws, seed)
    return interval, mean_and_stderr(differences).stderr
