"""What a backend gives: the scores of steps, from token ids and positions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lm_eval_tasks.rewards.protocols import ScoringInput


def sigmoid(log_odds: float) -> float:
    """Return the probability with these log-odds; the softmax over two numbers, their difference.

    Raises:
        ValueError: the number is NaN: the model is broken or overflows in its dtype.
    """
    if math.isnan(log_odds):
        raise ValueError(
            "the reward model returned NaN; try another dtype, for example dtype=float32"
        )
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1 + odds)


class Backend(ABC):
    """A loaded reward model."""

    max_tokens: int
    """Longest input that the model takes."""

    @abstractmethod
    def score(self, inputs: Sequence[ScoringInput]) -> list[list[float]]:
        """Return a probability for every position of every input.

        Args:
            inputs: none longer than ``max_tokens``; all with the readout of the same protocol.

        Raises:
            ValueError: the model or the server cannot go on, or what they return does not fit.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what was resolved: dtype, device, versions of what computes."""

    @abstractmethod
    def close(self) -> None:
        """Free the model."""
