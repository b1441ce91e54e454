"""Unbiased pass@k and its standard error over problems.

pass@k is the probability that at least one of k samples drawn without replacement from the N
recorded ones is correct (Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
section 2.1): ``1 - C(N-c, k) / C(N, k)``. Unlike ``1 - (1 - c/N)^k`` it is unbiased for k
independent samples, and unlike "any of the first k" it uses all N. The problems are the sampled
unit, so the standard error is taken over problems.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over problems and its standard error (NaN for fewer than two problems)."""

    mean: float
    stderr: float


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


def mean_and_stderr(values: Sequence[float]) -> Estimate:
    """Return the mean over problems and the standard error of that mean, deviation / sqrt(P).

    Args:
        values: one value per problem; a NaN makes the result NaN.

    Raises:
        ValueError: there is no problem.
    """
    if not values:
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
