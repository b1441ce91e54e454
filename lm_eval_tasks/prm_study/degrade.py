"""Make reward scores worse in ways that can be named and measured.

All functions work on the solution scores of one problem and leave samples without a score alone.

========= =====================================================================================
clean     the scores as they are; rewards and aggregations are compared in this family
noise     Gaussian noise on the log-odds; level 1 is as wide as the scores of the run themselves
flip      a share of the samples gets the score at the mirrored rank of its problem: the best the
          worst, and so on; the scores of a problem keep about their distribution
label     a share of the samples gets 1 - score: what a reward trained on flipped labels would say
shuffle   a share of the samples exchanges scores at random; at 1 the reward knows nothing
oracle    no reward at all: 1 for a right solution, 0 for a wrong one, and the other way round with
          the error rate that the level says; at 0.5 it knows nothing
========= =====================================================================================
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Family -> default levels. ``clean`` has none.
LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.5, 1.0, 2.0, 4.0),
    "flip": (0.1, 0.25, 0.5, 1.0),
    "label": (0.1, 0.25, 0.5, 1.0),
    "shuffle": (0.25, 0.5, 0.75, 1.0),
    "oracle": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
}
#: Scores of exactly 0 and 1 count as this far from there when they become log-odds, or as half as
#: far as the score next to them. All others stay as they are: products of many steps are small.
_EDGE = 1e-6


def is_random(family: str, level: float) -> bool:
    """Return whether another seed gives other scores."""
    if family in ("flip", "label", "oracle"):
        return 0 < level < 1
    return family != "clean" and level > 0


def log_odds_spread(scores: Sequence[Sequence[float | None]]) -> float:
    """Return the standard deviation of the log-odds of all scores of a run; 0 for none.

    Args:
        scores: per problem the solution scores.
    """
    given = np.array([one for problem in scores for one in problem if one is not None])
    return float(_log_odds(given).std()) if given.size else 0.0


def degrade(
    family: str,
    level: float,
    scores: Sequence[float | None],
    is_correct: Sequence[bool],
    spread: float,
    generator: np.random.Generator,
) -> list[float | None]:
    """Return the worse scores of one problem.

    Args:
        family: see the module.
        level: see the module; a share or an error rate is between 0 and 1.
        scores: of the solutions, in [0, 1]; None where there is none.
        is_correct: verdict on each; only ``oracle`` looks at it.
        spread: of the run, from `log_odds_spread`; only ``noise`` looks at it.
        generator: where the randomness comes from.

    Raises:
        ValueError: no such family, or a level outside its range.
    """
    if family != "clean" and family not in LEVELS:
        raise ValueError(f"family {family!r} is not known; accepted: clean, {', '.join(LEVELS)}")
    if not 0 <= level < math.inf or (family != "noise" and level > 1):
        raise ValueError(
            f"level {level:g} of {family}: need a share from 0 to 1 (noise: 0 or more)"
        )
    if family == "oracle":
        wrong = generator.random(len(is_correct)) < level
        return [float(right != flip) for right, flip in zip(is_correct, wrong, strict=True)]
    where = [i for i, score in enumerate(scores) if score is not None]
    given = np.array([scores[i] for i in where], dtype=np.float64)
    worse: list[float | None] = [None] * len(scores)
    for i, score in zip(
        where, _degrade_given(family, level, given, spread, generator), strict=True
    ):
        worse[i] = float(score)
    return worse


def _degrade_given(
    family: str, level: float, given: Floats, spread: float, generator: np.random.Generator
) -> Floats:
    count = len(given)
    if family == "noise":
        noise = generator.standard_normal(count)
        result: Floats = np.exp(-np.logaddexp(0, -(_log_odds(given) + level * spread * noise)))
        return result
    worse = given.copy()
    chosen = generator.random(count) < level
    if family == "flip":
        # Equal scores get ranks in random order, else the order of drawing would decide.
        ranks = np.empty(count, dtype=np.int64)
        ranks[np.lexsort((generator.random(count), given))] = np.arange(count)
        worse[chosen] = np.sort(given)[count - 1 - ranks[chosen]]
    elif family == "label":
        worse[chosen] = 1 - given[chosen]
    elif family == "shuffle":
        worse[chosen] = generator.permutation(given[chosen])
    return worse


def _log_odds(probabilities: Floats) -> Floats:
    between = probabilities[(probabilities > 0) & (probabilities < 1)]
    low = min(_EDGE, between.min(initial=1.0) / 2)
    high = min(_EDGE, (1 - between.max(initial=0.0)) / 2)
    above = np.where(probabilities > 0, probabilities, low)
    below = np.where(probabilities < 1, 1 - probabilities, high)
    result: Floats = np.log(above) - np.log(below)
    return result


def discrimination(scores: Sequence[float | None], is_correct: Sequence[bool]) -> float:
    """Return how well the scores tell right from wrong solutions of one problem (AUROC).

    The probability that a random right solution scores above a random wrong one, ties counting
    one half; samples without a score are left out. Selection happens within a problem, so a reward
    that only knows which problems are hard has 0.5 here.

    Args:
        scores: of the solutions.
        is_correct: verdict on each.

    Returns:
        A number in [0, 1]; NaN where all scored solutions are right, or all wrong.
    """
    pairs = [(s, c) for s, c in zip(scores, is_correct, strict=True) if s is not None]
    right = np.array([score for score, correct in pairs if correct])
    wrong = np.array([score for score, correct in pairs if not correct])
    if not right.size or not wrong.size:
        return math.nan
    difference = right[:, None] - wrong[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)
