"""When the vote on a problem is decided: the rule of early stops, for replays and for sampling.

The rule is that of Adaptive-Consistency (Aggarwal, Madaan, Yang and Mausam 2023, "Let's Sample Step
by Step", arXiv 2305.11860, the Beta variant): with v1 votes for the leading answer and v2 for the
second, and a uniform prior on the leader's share p of their votes, stop when
``P(p < 1/2 | v1, v2) = I_{1/2}(v1 + 1, v2 + 1)`` is at most the stated error level. Besides, a vote
that the remaining samples cannot change is decided at any level.

``thinkfast-eval sample --stop-error`` looks after every few samples of a problem, at its *borders*.
What it decides follows from the stored samples alone: samples beyond a border exist only because
the problem was open there, so the answers of all stored samples, on the last border, say it all.
"""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: Fields of config.json of a run with early stops; other runs have none of them.
STOP_FIELDS = ("stop_error", "stop_every")
DEFAULT_EVERY = 8
HIGHEST_ERROR = 0.5

#: How the sampling of a problem ended: "level", the error level decides; "certain", the remaining
#: samples cannot change the vote; "cap", all samples are drawn and the level does not decide.
End = Literal["level", "certain", "cap"]


def doubt(leader: int, second: int) -> float:
    """Return the posterior probability that the second answer would overtake the leader.

    Args:
        leader: v1, votes of the leading answer.
        second: v2 <= v1, votes of the next one.

    Returns:
        I_{1/2}(v1 + 1, v2 + 1), which is the chance of at most v2 heads in v1 + v2 + 1 fair
        throws less those of the other tail: sum over j > v1 of C(v1 + v2 + 1, j) / 2^(v1+v2+1).
    """
    if not 0 <= second <= leader:
        raise ValueError(f"need 0 <= second <= leader, got {second} and {leader}")
    throws = leader + second + 1
    tail = sum(math.comb(throws, j) for j in range(leader + 1, throws + 1))
    return tail / int(1 << throws)


@lru_cache
def least_lead(num_samples: int, error: float) -> NDArray[np.int64]:
    """Return the fewest votes of a leader that decide against 0, 1, 2, ... votes of the second.

    Args:
        num_samples: N; entries above it mean that N votes do not decide.
        error: the stated level, 0 or more and below 1/2.

    Raises:
        ValueError: the level is out of range.
    """
    if not 0 <= error < HIGHEST_ERROR:
        raise ValueError(f"error level is {error}; need 0 or more and below 0.5")
    needed = np.full(num_samples + 1, num_samples + 1, dtype=np.int64)
    leader = 1
    for second in range(num_samples + 1):
        leader = max(leader, second)
        while leader <= num_samples and doubt(leader, second) > error:
            leader += 1
        needed[second] = leader
    needed.flags.writeable = False  # shared between calls
    return needed


@dataclass(frozen=True)
class StopRule:
    """The early stops of a run."""

    error: float
    """The stated level, 0 or more and below 1/2; 0: only when the vote cannot change."""
    every: int
    """Samples of a problem between two looks."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "StopRule | None":
        """Return the rule of a run by its config.json; None where it draws N of every problem."""
        if config.get("stop_error") is None:
            return None
        return cls(config["stop_error"], config["stop_every"])

    def border(self, indices: Set[int], cap: int) -> int:
        """Return how many samples the problem has after its present wave.

        Args:
            indices: of its stored samples; an interrupted wave may have gaps.
            cap: most samples of a problem.
        """
        started = max(1, max(indices, default=0) + 1)
        return min(cap, -(-started // self.every) * self.every)

    def is_at_border(self, indices: Set[int], cap: int) -> bool:
        """Whether the present wave is complete, so that the vote can be looked at."""
        return all(index in indices for index in range(self.border(indices, cap)))

    def end(self, votes: Iterable[int], num_drawn: int, cap: int) -> End | None:
        """Return why a problem gets no further sample; None: it does.

        Args:
            votes: of each answer class.
            num_drawn: its samples, silent ones included; they end at a border.
            cap: most samples of a problem.
        """
        leader, second = sorted([*votes, 0, 0], reverse=True)[:2]
        if leader >= least_lead(max(cap, num_drawn), self.error)[second]:
            return "level"
        if num_drawn >= cap:
            return "cap"
        return "certain" if leader - second > cap - num_drawn else None
