"""Samples: the text that lm-eval carries, the record of the store, and the store itself.

lm-eval hands `str` objects from the model class to the task and keeps nothing else. A subclass of
`str` travels through its filters, logs and caches unchanged, so token counts and finish reasons
reach the metrics (truncation rate, mean generated tokens) when the model class supplies them.

``thinkfast-eval sample`` keeps more: every finished sample is one JSON line of a run folder, with
its seed and its times. Scoring, voting and plotting read that folder and need neither the model nor
the data set. docs/evaluation.md describes the folder.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, TracebackType
from typing import IO, Any

from lm_eval_tasks.errors import stop
from lm_eval_tasks.jsonl import JsonLines, read_object, sync_path, write_atomically
from lm_eval_tasks.locks import acquire
from lm_eval_tasks.stopping import STOP_FIELDS


class SampledText(str):
    """One sampled text.

    Attributes:
        num_tokens: generated tokens, the end-of-sequence token included.
        finish_reason: "stop" for a natural end, "length" for a text cut at the token limit.
    """

    num_tokens: int
    finish_reason: str | None

    def __new__(cls, text: str, num_tokens: int, finish_reason: str | None) -> "SampledText":
        """Build the text with its two facts."""
        self = super().__new__(cls, text)
        self.num_tokens = num_tokens
        self.finish_reason = finish_reason
        return self

    def __getnewargs__(self) -> tuple[str, int, str | None]:  # type: ignore[override]
        """Return the constructor's arguments, so that lm-eval's caches can pickle a sample."""
        return (str(self), self.num_tokens, self.finish_reason)

    @property
    def is_truncated(self) -> bool:
        """Whether the text was cut at the token limit."""
        return self.finish_reason == "length"


#: Fields of config.json that tell runs of one run seed apart: they do not share seeds of samples.
#: All of them are known to an lm-eval run too, so that it draws what the store draws.
SEED_FIELDS = ("model_id", "temperature", "top_p", "max_tokens", "regime")


def run_key(config: Mapping[str, Any]) -> str:
    """Return what the seeds of a run's samples depend on besides run seed, problem and index.

    Args:
        config: config.json. ``seed_fields`` names the fields, so that a run goes on as it began;
            runs of earlier versions name none.
    """
    fields = config.get("seed_fields", ())
    return json.dumps([config[name] for name in fields]) if fields else ""


def sample_seed(run_seed: int, problem: str, index: int, run: str = "") -> int:
    """Return the seed of one sample: reproducible, and different for every sample of every run.

    Runs that differ in nothing but ``--stop-error`` and ``--stop-every`` share their seeds, so that
    they can be compared sample by sample; they are not to be pooled.

    Args:
        run_seed: the seed of the whole run.
        problem: a name of the problem that does not depend on which others are in the run.
        index: the sample's number within the problem.
        run: that of `run_key`.

    Returns:
        A non-negative integer below 2**63.
    """
    key = f"{run_seed}\x1f{problem}\x1f{index}".encode()
    if run:
        key += f"\x1f{run}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One finished sample: a line of ``samples.jsonl``.

    Times are seconds on a monotonic clock since the measured part of ``session`` began; start-up
    and warm-up come before it.
    """

    problem_id: str
    sample_index: int
    seed: int | None
    """None: drawn without one, from the engine's own random numbers."""
    text: str
    num_tokens: int
    """Generated tokens, the end-of-sequence token included."""
    num_prompt_tokens: int
    num_cached_tokens: int | None
    """Prompt tokens that came from the prefix cache; None where the engine does not say."""
    finish_reason: str
    """"stop" for a natural end, "length" for a text cut at the token limit."""
    session: int
    """Number of the (re)start that drew the sample."""
    submit_s: float
    first_token_s: float | None
    finish_s: float
    config_hash: str

    @property
    def key(self) -> tuple[str, int]:
        """Problem and index: what makes a sample unique within a run."""
        return (self.problem_id, self.sample_index)

    @property
    def is_truncated(self) -> bool:
        """Whether the text was cut at the token limit."""
        return self.finish_reason == "length"

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of the line."""
        return {field: getattr(self, field) for field in _SAMPLE_FIELDS}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "SampleRecord":
        """Read the JSON object of a line.

        Raises:
            ValueError: a field is missing, unknown, or has a wrong type or value.
        """
        _check_fields(row, _SAMPLE_FIELDS)
        if row["finish_reason"] not in FINISH_REASONS:
            raise ValueError(f"finish_reason is {row['finish_reason']!r}; need 'stop' or 'length'")
        for field in ("sample_index", "num_tokens", "num_prompt_tokens", "session"):
            if row[field] < 0:
                raise ValueError(f"{field} is {row[field]}; need 0 or more")
        first = row["submit_s"] if row["first_token_s"] is None else row["first_token_s"]
        if not row["submit_s"] <= first <= row["finish_s"] < math.inf:
            raise ValueError(
                f"times are out of order: submit_s {row['submit_s']}, first_token_s "
                f"{row['first_token_s']}, finish_s {row['finish_s']}"
            )
        return cls(**row)


@dataclass(frozen=True, slots=True)
class ProblemRecord:
    """One problem: a line of ``problems.jsonl``, all that scoring needs of the data set."""

    problem_id: str
    question: str
    gold: str
    prompt_sha256: str
    """Of the prompt's text as it was tokenised, chat template included."""

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "ProblemRecord":
        """Read the JSON object of a line.

        Raises:
            ValueError: a field is missing, unknown or of a wrong type.
        """
        _check_fields(row, _PROBLEM_FIELDS)
        if not row["gold"].strip():
            raise ValueError("gold is empty; without a gold answer nothing can be scored")
        return cls(**row)


_NUMBER = (int, float)
_SAMPLE_FIELDS: dict[str, tuple[type, ...]] = {
    "problem_id": (str,),
    "sample_index": (int,),
    "seed": (int, NoneType),
    "text": (str,),
    "num_tokens": (int,),
    "num_prompt_tokens": (int,),
    "num_cached_tokens": (int, NoneType),
    "finish_reason": (str,),
    "session": (int,),
    "submit_s": _NUMBER,
    "first_token_s": (*_NUMBER, NoneType),
    "finish_s": _NUMBER,
    "config_hash": (str,),
}
_PROBLEM_FIELDS: dict[str, tuple[type, ...]] = {
    "problem_id": (str,),
    "question": (str,),
    "gold": (str,),
    "prompt_sha256": (str,),
}


def _check_fields(row: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse missing and unknown fields and wrong types (a bool is no number here)."""
    if row.keys() != fields.keys():
        missing = sorted(fields.keys() - row.keys())
        unknown = sorted(row.keys() - fields.keys())
        raise ValueError(f"fields missing: {missing}, unknown: {unknown}")
    for field, kinds in fields.items():
        if not isinstance(row[field], kinds) or isinstance(row[field], bool):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{field} is {row[field]!r}; need {names}")


# -- the store ------------------------------------------------------------------------------------

#: Fields of config.json that decide what a sample means. Others (how many samples, of how many
#: problems, where, when) may differ between the sessions of one run.
HASHED_FIELDS = (
    "model_id",
    "task",
    "task_version",
    "data_sha256",
    "prompt",
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "regime",
    "engine",
)


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a short hash of `HASHED_FIELDS`; a missing one is a programming mistake.

    The settings of early stops count where there are any: other runs keep the hash they had.
    """
    fields = {name: config[name] for name in HASHED_FIELDS}
    fields |= {name: config[name] for name in STOP_FIELDS if config.get(name) is not None}
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class SampleStore:
    """A run folder: config.json, problems.jsonl, samples.jsonl, sessions.jsonl.

    Reading needs no lock and works beside a writer. To write, use ``with store.open(...)``.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._samples = JsonLines(self.folder / "samples.jsonl")
        self._sessions = JsonLines(self.folder / "sessions.jsonl")
        self._problems = JsonLines(self.folder / "problems.jsonl")
        self._lock: IO[str] | None = None
        self._have: dict[str, set[int]] = {}
        self.config_hash = ""
        """That of the settings it was opened with."""
        self.run_key = ""
        """That of the settings with which the run began; see `run_key`."""
        self.dropped_bytes = 0
        """Length of the torn line that `open` cut off."""

    # -- reading ----------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Return config.json.

        Raises:
            InputError: there is none, it is damaged, or its hash does not fit its fields.
        """
        path = self.folder / "config.json"
        config = read_object(path)
        missing = [name for name in (*HASHED_FIELDS, "config_hash") if name not in config]
        if missing:
            stop(f"{path}: fields missing: {missing}; it is written by thinkfast-eval sample")
        if config["config_hash"] != config_hash(config):
            stop(
                f"{path}: config_hash is {config['config_hash']}, its fields give "
                f"{config_hash(config)}; the file was edited, undo that"
            )
        return config

    def problems(self) -> list[ProblemRecord]:
        """Return the problems in data set order.

        Raises:
            InputError: a line is malformed, or a problem stands there twice.
        """
        seen: set[str] = set()

        def parse(row: dict[str, Any]) -> ProblemRecord:
            problem = ProblemRecord.from_dict(row)
            if problem.problem_id in seen:
                raise ValueError(f"problem {problem.problem_id} stands there twice")
            seen.add(problem.problem_id)
            return problem

        return list(self._problems.read(parse))

    def records(self) -> Iterator[SampleRecord]:
        """Yield the finished samples in the order in which they finished.

        Raises:
            InputError: a line is malformed, a sample stands there twice, belongs to another config
                or to a problem that is not in problems.jsonl; names file and line.
        """
        return (record for _, record in self.placed_records())

    def placed_records(self) -> Iterator[tuple[int, SampleRecord]]:
        """Yield what `records` does, each with its place for `records_at`."""
        expected = self.config()["config_hash"]
        known = {problem.problem_id for problem in self.problems()}
        seen: dict[str, set[int]] = {}

        def parse(row: dict[str, Any]) -> SampleRecord:
            record = SampleRecord.from_dict(row)
            if record.config_hash != expected:
                raise ValueError(
                    f"config_hash is {record.config_hash}, but that of config.json is {expected}: "
                    "the sample was drawn with other settings and belongs into another folder"
                )
            if record.problem_id not in known:
                raise ValueError(f"problem {record.problem_id} is not in problems.jsonl")
            indices = seen.setdefault(record.problem_id, set())
            if record.sample_index in indices:
                raise ValueError(
                    f"sample {record.sample_index} of {record.problem_id} stands there twice"
                )
            indices.add(record.sample_index)
            return record

        return self._samples.read_placed(parse)

    def records_at(self, places: Iterable[int]) -> Iterator[SampleRecord]:
        """Yield samples again by their places: who needs all in another order keeps no texts.

        Raises:
            InputError: the file was changed since `placed_records` read it.
        """
        return self._samples.read_at(places, SampleRecord.from_dict)

    def sync_samples(self) -> None:
        """Force the samples that are stored onto the disk, whichever process wrote them.

        Raises:
            InputError: the disk refuses.
        """
        try:
            sync_path(self._samples.path)
        except OSError as error:
            stop(f"{self._samples.path}: the last lines may not be on the disk ({error.strerror})")

    def sessions(self) -> list[dict[str, Any]]:
        """Return the lines of sessions.jsonl, one per (re)start, later facts merged into it."""
        merged: dict[int, dict[str, Any]] = {}
        for row in self._sessions.read(_session_row):
            merged.setdefault(row["session"], {}).update(row)
        return list(merged.values())

    def have(self) -> Mapping[str, Set[int]]:
        """Return the indices of the finished samples of each problem that has any."""
        if self._lock is None:
            found: dict[str, set[int]] = {}
            for record in self.records():
                found.setdefault(record.problem_id, set()).add(record.sample_index)
            return found
        return self._have

    # -- writing ----------------------------------------------------------------------------------

    def open(self, config: Mapping[str, Any], problems: Sequence[ProblemRecord]) -> "SampleStore":
        """Lock, repair and check the folder for appending; start it where it is new.

        Args:
            config: everything resolved, `HASHED_FIELDS` among it; "config_hash" is added here.
            problems: those of this session; earlier ones stay in the folder.

        Raises:
            InputError: another process writes here, the folder holds samples of other settings or
                other problems under the same names, or a file is damaged.
        """
        assert self._lock is None, "already open"
        self._lock = self._acquire()
        try:
            self.dropped_bytes = self._samples.open()
            self._write_config(dict(config) | {"config_hash": config_hash(config)})
            self._write_problems(problems)
            self._sessions.open()
            self._have = {}
            for record in self.records():
                self._have.setdefault(record.problem_id, set()).add(record.sample_index)
        except BaseException:
            self.close()
            raise
        return self

    def repair(self) -> int:
        """Mend torn last lines under the lock; return the bytes dropped from samples.jsonl."""
        assert self._lock is None, "open() repairs by itself"
        self._lock = self._acquire()
        try:
            self._sessions.repair()
            return self._samples.repair()
        finally:
            self.close()

    def append(self, record: SampleRecord) -> None:
        """Write one finished sample.

        Raises:
            InputError: the disk is full; everything before this sample is kept.
        """
        indices = self._have.setdefault(record.problem_id, set())
        assert record.sample_index not in indices, f"{record.key} is stored already"
        assert record.config_hash == self.config_hash, "a sample of another config"
        self._samples.append(record.as_dict())
        indices.add(record.sample_index)

    def append_session(self, row: Mapping[str, Any]) -> None:
        """Write a line about a session; a second line of the same session adds facts to it."""
        _session_row(dict(row))
        self._sessions.append(row)
        self._sessions.sync()

    def close(self) -> None:
        """Sync and close all files, release the lock; closing twice is fine."""
        try:
            self._samples.close()
            self._sessions.close()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> "SampleStore":
        assert self._lock is not None, "use `with store.open(...)`"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _acquire(self) -> IO[str]:
        advice = "wait for it, or give another folder with --out"
        return acquire(self.folder / ".lock", self.folder, advice)

    def _write_config(self, config: dict[str, Any]) -> None:
        path = self.folder / "config.json"
        if self._has_samples():
            if not path.exists():
                stop(
                    f"{self.folder} has samples.jsonl but no config.json, so nobody knows how they "
                    "were drawn; restore it, or give another folder with --out"
                )
            stored = self.config()
            differences = [
                f"{name} is {json.dumps(stored.get(name))} there and "
                f"{json.dumps(config.get(name))} now"
                for name in (*HASHED_FIELDS, *STOP_FIELDS)
                if stored.get(name) != config.get(name)
            ]
            if differences:
                stop(
                    f"{self.folder} holds samples of other settings: {'; '.join(differences)}; "
                    "give the same settings, or another folder with --out"
                )
            # Versions, hardware and command of this session go to sessions.jsonl.
            wanted = {
                name: _larger(stored[name], config[name]) for name in ("num_samples", "limit")
            }
            config = stored | wanted
        self.config_hash = config["config_hash"]
        self.run_key = run_key(config)
        write_atomically(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def _has_samples(self) -> bool:
        """Whether the folder is bound to its settings; a start that failed binds nothing."""
        path = self._samples.path
        return path.exists() and path.stat().st_size > 0

    def _write_problems(self, problems: Sequence[ProblemRecord]) -> None:
        kept = self.problems() if self._has_samples() else []
        stored = {problem.problem_id: problem for problem in kept}
        for problem in problems:
            old = stored.setdefault(problem.problem_id, problem)
            if old != problem:
                differing = [
                    field
                    for field in _PROBLEM_FIELDS
                    if getattr(old, field) != getattr(problem, field)
                ]
                stop(
                    f"{self._problems.path}: {problem.problem_id} is another problem now "
                    f"({', '.join(differing)}); give the same data and prompt, or another folder "
                    "with --out (a chat template that prints today's date is pinned with "
                    "--chat-template-args date_string=...)"
                )
        lines = (json.dumps(asdict(problem), ensure_ascii=False) for problem in stored.values())
        write_atomically(self._problems.path, "".join(f"{line}\n" for line in lines))


def _larger(stored: int | None, wanted: int | None) -> int | None:
    """Return the larger number; None means all."""
    return None if stored is None or wanted is None else max(stored, wanted)


def _session_row(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("session"), int):
        raise ValueError("field 'session' must be a whole number")
    return row
