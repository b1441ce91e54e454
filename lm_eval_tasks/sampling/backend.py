"""What the runner asks of an engine: take one sample's request, say when it has finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval_tasks.samples import sample_seed
from lm_eval_tasks.sampling.problems import Problem


@dataclass(frozen=True)
class SamplingSettings:
    """How every sample of a run is drawn."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    """Of the run; each sample has its own, see `seed_of`. None draws without seeds."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample besides the model's end-of-sequence token."""
    run_key: str = ""
    """What tells the run from others with its seed; see `lm_eval_tasks.samples.run_key`."""

    def seed_of(self, problem_id: str, index: int) -> int | None:
        """Return the seed of one sample; None where the run has none."""
        if self.seed is None:
            return None
        return sample_seed(self.seed, problem_id, index, self.run_key)


@dataclass(frozen=True)
class DrawRequest:
    """One sample to draw."""

    problem: Problem
    sample_index: int
    seed: int | None


@dataclass(frozen=True)
class Drawn:
    """One finished sample; the times are those of `time.monotonic`."""

    request: DrawRequest
    text: str
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int | None
    finish_reason: str
    submitted_at: float
    first_token_at: float | None
    finished_at: float


class BackendError(Exception):
    """The engine or server gave up; the text says what happened and what mends it."""


class Backend(Protocol):
    """An engine that is loaded and ready."""

    max_in_flight: int
    """Submitted and unfinished samples that keep the engine busy under saturation."""
    num_places: int
    """Samples that can be generated at once; what is submitted beyond them waits."""

    def prepare(self, problems: Sequence[Problem], settings: SamplingSettings) -> None:
        """Tokenise the prompts, once each, and check that they fit.

        Raises:
            InputError: a prompt does not, or a sampling setting is refused.
        """

    def warm_up(self, num_samples: int) -> None:
        """Run throw-away requests at the batch sizes to come, and leave no cache behind.

        Raises:
            BackendError: the engine cannot go on.
        """

    def submit(self, request: DrawRequest) -> None:
        """Hand one request to the engine and return at once."""

    def wait(self) -> list[Drawn]:
        """Return what has finished since the last call; may be nothing, within a second or so.

        Raises:
            BackendError: the engine cannot go on, and everything finished was returned before.
        """

    def facts(self) -> dict[str, Any]:
        """Return what the engine resolved and counted since the warm-up, for sessions.jsonl."""

    def close(self) -> None:
        """Give up unfinished requests and free the engine."""
