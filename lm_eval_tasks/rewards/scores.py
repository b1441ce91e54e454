"""Step scores of a run's samples: ``scores/<reward name>.jsonl`` in the run folder.

One line per scored sample, appended batch by batch. Beside it, ``<reward name>.json`` says which
model and protocol made the scores, with which versions, on which machine and by which command.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lm_eval_tasks.errors import stop
from lm_eval_tasks.jsonl import JsonLines
from lm_eval_tasks.rewards.aggregation import aggregate

#: Why a sample has no step scores: its text has no step, or its tokens exceed the model's length.
Unscored = Literal["empty", "too_long"]

_FIELDS = (
    "problem_id",
    "sample_index",
    "step_scores",
    "seconds",
    "reward_hash",
    "unscored",
    "num_tokens",
)


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """The step scores of one sample: a line of the file."""

    problem_id: str
    sample_index: int
    step_scores: list[float]
    """A probability per step; empty where ``unscored`` says why."""
    seconds: float
    """The reward model's time on this sample: its share, by tokens, of its batch's wall time."""
    reward_hash: str
    """Of everything that decides what the scores mean; see `RewardSpec.hash`."""
    unscored: Unscored | None = None
    num_tokens: int | None = None
    """Tokens that the reward model read; 0 without a score. None: of an earlier version."""

    @property
    def key(self) -> tuple[str, int]:
        """Problem and index: what makes a sample unique within a run."""
        return (self.problem_id, self.sample_index)

    def score(self, aggregation: str) -> float | None:
        """Return the score of the solution, None if it has none; see `aggregate`."""
        return aggregate(self.step_scores, aggregation)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of the line."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "ScoreRecord":
        """Read the JSON object of a line.

        Raises:
            ValueError: a field is missing, unknown, or has a wrong type or value.
        """
        if set(row) | {"num_tokens"} != set(_FIELDS):  # earlier versions did not write it
            raise ValueError(f"fields are {sorted(row)}; need {sorted(_FIELDS)}")
        row = {"num_tokens": None} | dict(row)
        scores, seconds = row["step_scores"], row["seconds"]
        if not isinstance(row["problem_id"], str) or not isinstance(row["reward_hash"], str):
            raise ValueError("problem_id and reward_hash must be strings")
        if not isinstance(row["sample_index"], int) or row["sample_index"] < 0:
            raise ValueError(f"sample_index is {row['sample_index']!r}; need 0 or more")
        if not isinstance(scores, list) or not all(_is_probability(score) for score in scores):
            raise ValueError(f"step_scores is {scores!r}; need a list of numbers from 0 to 1")
        if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise ValueError(f"seconds is {seconds!r}; need a finite number, 0 or more")
        tokens = row["num_tokens"]
        if tokens is not None and (not isinstance(tokens, int) or tokens < 0):
            raise ValueError(f"num_tokens is {tokens!r}; need a whole number, 0 or more, or null")
        if row["unscored"] not in (None, *get_args(Unscored)):
            raise ValueError(f"unscored is {row['unscored']!r}; need null or {get_args(Unscored)}")
        if bool(scores) == (row["unscored"] is not None):
            raise ValueError("need either step_scores or a reason in unscored, not both or none")
        return cls(**row)


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def score_path(folder: Path | str, reward: str) -> Path:
    """Return the path of a reward's score file in a run folder."""
    return Path(folder) / "scores" / f"{reward}.jsonl"


def reward_names(folder: Path | str) -> list[str]:
    """Return the names of the rewards whose scores a run folder holds."""
    return sorted(path.stem for path in (Path(folder) / "scores").glob("*.jsonl"))


def read_scores(folder: Path | str, reward: str) -> Iterator[ScoreRecord]:
    """Yield the scores of one reward; the caller relates them to the samples.

    Args:
        folder: the run folder.
        reward: the name of the reward, as in `reward_names`.

    Raises:
        InputError: there is no such file, a line is malformed, a sample is scored twice, or lines
            stem from different rewards; names file and line.
    """
    path = score_path(folder, reward)
    if not path.exists():
        known = ", ".join(reward_names(folder)) or "none"
        stop(
            f"{path} does not exist (scores there: {known}); make it with "
            f"thinkfast-eval reward {folder} --reward SPEC"
        )
    seen: set[tuple[str, int]] = set()
    hashes: set[str] = set()

    def parse(row: dict[str, Any]) -> ScoreRecord:
        record = ScoreRecord.from_dict(row)
        if record.key in seen:
            raise ValueError(f"sample {record.sample_index} of {record.problem_id} is scored twice")
        seen.add(record.key)
        hashes.add(record.reward_hash)
        if len(hashes) > 1:
            raise ValueError(f"scores of different rewards in one file (hashes {sorted(hashes)})")
        return record

    return JsonLines(path).read(parse)
