"""One score for a solution from the scores of its steps.

Step scores are stored; which number stands for the solution is decided when they are read, so that
the variants can be compared without the model. RLHFlow's own evaluation uses ``mean``
(`RLHFlow/RLHF-Reward-Modeling`, ``math-rm/README.md``), search-and-learn ``last`` for the same
models, "Let's Verify Step by Step" (arXiv 2305.20050) ``prod``, Math-Shepherd (arXiv 2312.08935)
``min``. ``prod`` and ``min`` can only fall with the number of steps, so they favour short
solutions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Aggregation = Literal["min", "prod", "last", "mean"]

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

_AGGREGATE: dict[Aggregation, Callable[[Sequence[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "last": lambda scores: scores[-1],
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


def aggregate(step_scores: Sequence[float], aggregation: str) -> float | None:
    """Return the score of a solution.

    Args:
        step_scores: probabilities in [0, 1] in the order of the steps.
        aggregation: one of `AGGREGATIONS`.

    Returns:
        A number in [0, 1], or None for a solution without scored steps: it has no score, which is
        not the same as a score of zero.

    Raises:
        ValueError: no such aggregation.
    """
    if aggregation not in _AGGREGATE:
        raise ValueError(
            f"aggregation {aggregation!r} is not known; accepted: {', '.join(AGGREGATIONS)}"
        )
    return _AGGREGATE[aggregation](step_scores) if step_scores else None
