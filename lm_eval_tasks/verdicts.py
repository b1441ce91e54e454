"""What ``thinkfast-eval score`` writes into a run folder: verdicts and answer classes.

``verdicts.jsonl`` has one line per sample: its answer, the rule that found it, and whether it is
correct. ``classes.jsonl`` has one line per problem: its different answers, grouped as
`lm_eval_tasks.voting` does; a later line of a problem replaces earlier ones. Both carry the version
of task and grading, so that verdicts of an older grader are never mixed with newer ones.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lm_eval_tasks.answers import Extracted
from lm_eval_tasks.errors import stop
from lm_eval_tasks.jsonl import JsonLines, write_rows
from lm_eval_tasks.locks import exclusive
from lm_eval_tasks.provenance import record_grading
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.scoring import Grading, grading_of

VERDICTS = "verdicts.jsonl"
CLASSES = "classes.jsonl"
SCORE_LOCK = ".score.lock"
"""Whoever holds it may write both."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one sample: a line of ``verdicts.jsonl``."""

    problem_id: str
    sample_index: int
    answer: str | None
    """None: no answer was found, which is an outcome of its own; ``correct`` is False then."""
    source: str | None
    """The extraction rule that found the answer."""
    correct: bool
    task_version: str
    """Version of the task and of its grading; see `lm_eval_tasks.scoring.Grading.version_of`."""

    @property
    def key(self) -> tuple[str, int]:
        """Problem and index: what makes a sample unique within a run."""
        return (self.problem_id, self.sample_index)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of the line."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Verdict":
        """Read the JSON object of a line.

        Raises:
            ValueError: a field is missing, unknown, or has a wrong type.
        """
        _check_fields(row, set(cls.__slots__))
        for field in ("problem_id", "task_version"):
            if not isinstance(row[field], str):
                raise ValueError(f"{field} is {row[field]!r}; need a string")
        index = row["sample_index"]
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(f"sample_index is {index!r}; need a whole number, 0 or more")
        for field in ("answer", "source"):
            if not isinstance(row[field], str | None):
                raise ValueError(f"{field} is {row[field]!r}; need a string or null")
        if not isinstance(row["correct"], bool):
            raise ValueError(f"correct is {row['correct']!r}; need true or false")
        if row["answer"] is None and row["correct"]:
            raise ValueError("a sample without an answer cannot be correct")
        return cls(**row)


@dataclass(frozen=True, slots=True)
class AnswerClasses:
    """The different answers of one problem, grouped: a line of ``classes.jsonl``."""

    problem_id: str
    task_version: str
    classes: list[list[str]]
    """Each answer stands in exactly one class."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of the line."""
        return asdict(self)

    def class_of(self) -> dict[str, int]:
        """Return the number of each answer's class."""
        return {answer: number for number, group in enumerate(self.classes) for answer in group}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "AnswerClasses":
        """Read the JSON object of a line.

        Raises:
            ValueError: a field is missing, unknown, or has a wrong type.
        """
        _check_fields(row, set(cls.__slots__))
        for field in ("problem_id", "task_version"):
            if not isinstance(row[field], str):
                raise ValueError(f"{field} is {row[field]!r}; need a string")
        groups = row["classes"]
        is_nested = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
        answers = [answer for group in groups for answer in group] if is_nested else [None]
        if not all(isinstance(answer, str) for answer in answers):
            raise ValueError("classes must be a list of lists of strings")
        if len(set(answers)) != len(answers):
            raise ValueError("an answer stands in two classes")
        return cls(**row)


def read_verdicts(folder: Path | str) -> Iterator[Verdict]:
    """Yield the verdicts of a run folder, of whatever version.

    Raises:
        InputError: a line is malformed, or a sample has two verdicts of one version; names file and
            line.
    """
    seen: set[tuple[str, int, str]] = set()

    def parse(row: dict[str, Any]) -> Verdict:
        verdict = Verdict.from_dict(row)
        key = (*verdict.key, verdict.task_version)
        if key in seen:
            raise ValueError(f"sample {verdict.sample_index} of {verdict.problem_id} stands twice")
        seen.add(key)
        return verdict

    return JsonLines(Path(folder) / VERDICTS).read(parse)


def read_classes(folder: Path | str, version: str) -> dict[str, AnswerClasses]:
    """Return the newest classes of each problem under one version.

    Raises:
        InputError: a line is malformed; names file and line.
    """
    rows = JsonLines(Path(folder) / CLASSES).read(AnswerClasses.from_dict)
    return {row.problem_id: row for row in rows if row.task_version == version}


class ScoreCounts(NamedTuple):
    """What `score_run` did."""

    num_samples: int
    """Samples of the run."""
    num_new: int
    """Of these, judged by this call."""


class Judge:
    """Judges samples of a run and keeps verdicts and classes; use it in a ``with`` statement.

    It holds the run's lock of scoring. Verdicts and classes of a problem are written as soon as
    they are known; an answer that a problem has had before is not compared again.
    """

    def __init__(self, folder: Path | str) -> None:
        """Check that the run can be judged.

        Args:
            folder: the run folder; sampling may go on meanwhile.

        Raises:
            InputError: no run folder, an unknown task, or a problem without a usable gold answer.
        """
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            stop(
                f"{folder} is no run folder (no config.json); give one that thinkfast-eval sample "
                "wrote"
            )
        self.store = SampleStore(self.folder)
        config = self.store.config()
        self._grading = grading_of(config["task"])
        self._version = self._grading.version_of(config["task_version"])
        self._golds = _golds(self.store, self._grading)
        self._verdicts = JsonLines(self.folder / VERDICTS)
        self._classes = JsonLines(self.folder / CLASSES)
        self._open = ExitStack()
        self._done: set[tuple[str, int]] = set()
        self._known: dict[str, dict[str, bool]] = defaultdict(dict)
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._grouped: dict[str, list[list[str]]] = {}

    def __enter__(self) -> "Judge":
        """Lock the run and read what is judged.

        Raises:
            InputError: a damaged file, or another process that scores this run.
        """
        with ExitStack() as opened:
            opened.enter_context(exclusive(self.folder / SCORE_LOCK, self.folder))
            opened.enter_context(self._verdicts)
            opened.enter_context(self._classes)
            self._read()
            self._open = opened.pop_all()
        return self

    def _read(self) -> None:
        self._done.clear()
        self._known.clear()
        self._counts.clear()
        for verdict in read_verdicts(self.folder):
            if verdict.task_version == self._version:
                self._done.add(verdict.key)
                if verdict.answer is not None:
                    self._known[verdict.problem_id][verdict.answer] = verdict.correct
                    self._counts[verdict.problem_id][verdict.answer] += 1
        rows = read_classes(self.folder, self._version).items()
        self._grouped = {name: row.classes for name, row in rows}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def extract(self, text: str) -> Extracted:
        """Return the answer of a sampled text."""
        return self._grading.extract(text)

    def catch_up(self, command: str | None) -> ScoreCounts:
        """Judge all stored samples that have no verdict yet; see `score_run`."""
        missing: dict[str, list[tuple[int, Extracted]]] = defaultdict(list)
        stored: set[tuple[str, int]] = set()
        for record in self.store.records():  # the texts are not kept
            stored.add(record.key)
            if record.key not in self._done:
                missing[record.problem_id].append((record.sample_index, self.extract(record.text)))
        if not self._done <= stored:
            self._drop_verdicts_without(stored)
        num_samples, num_new = len(stored), sum(map(len, missing.values()))
        if num_new:
            self.store.sync_samples()
            record_grading(self.folder, command, num_new)
        for name in self._golds:
            self.judge(name, missing[name])
        return ScoreCounts(num_samples, num_new)

    def _drop_verdicts_without(self, stored: Set[tuple[str, int]]) -> None:
        """Take out verdicts of samples that are gone: lost in a power cut, or deleted by hand.

        Such a sample is drawn again, and without a seed it is another one.
        """
        rows = [row.as_dict() for row in read_verdicts(self.folder) if row.key in stored]
        self._verdicts.close()
        write_rows(self._verdicts.path, rows)
        self._verdicts.open()
        self._read()

    def judge(self, name: str, samples: Sequence[tuple[int, Extracted]]) -> None:
        """Write the verdicts on samples of a problem, and its classes where they have changed.

        Args:
            name: of the problem.
            samples: index and answer of those without a verdict. They are on the disk
                (`SampleStore.sync_samples`): a verdict must not outlive its sample.
        """
        gold, verdict_of = self._golds[name], self._known[name]
        answers = {found.answer for _, found in samples if found.answer is not None}
        asked = sorted(answers - verdict_of.keys())
        verdict_of.update(zip(asked, self._grading.grade(gold, asked), strict=True))
        for index, (answer, source) in samples:
            correct = answer is not None and bool(verdict_of[answer])
            row = Verdict(name, index, answer, source, correct, self._version)
            self._verdicts.append(row.as_dict())
            if answer is not None:
                self._counts[name][answer] += 1
        grouped = {answer for group in self._grouped.get(name, []) for answer in group}
        if verdict_of.keys() != grouped:
            groups = _group(gold, sorted(verdict_of), self._grading)
            self._classes.append(AnswerClasses(name, self._version, groups).as_dict())
            self._grouped[name] = groups

    def votes(self, name: str) -> list[int]:
        """Return the votes of each answer class among the judged samples of a problem."""
        counts = self._counts[name]
        return [sum(counts[answer] for answer in group) for group in self._grouped.get(name, [])]


def score_run(folder: Path | str, command: str | None = None) -> ScoreCounts:
    """Judge the samples of a run that have no verdict yet, and group the answers.

    Problem by problem: a problem's verdicts and classes are written as soon as they are known, so a
    kill costs one problem. An answer that a problem has had before is not compared again.

    Args:
        folder: the run folder; sampling may go on meanwhile.
        command: the command line, which reports quote; kept where anything is judged.

    Raises:
        InputError: no run folder, an unknown task, a problem without a usable gold answer, a
            damaged file, or another process that scores this run.
    """
    with Judge(folder) as judge:
        return judge.catch_up(command)


def _golds(store: SampleStore, grading: Grading) -> dict[str, str]:
    golds = {}
    for problem in store.problems():
        fault = grading.check_gold(problem.gold)
        if fault:
            stop(
                f"{store.folder / 'problems.jsonl'}: {problem.problem_id}: {fault}; mend the data "
                "and sample again into another folder, or correct the gold answer in this file"
            )
        golds[problem.problem_id] = problem.gold
    return golds


def _group(gold: str, answers: list[str], grading: Grading) -> list[list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for answer, number in zip(answers, grading.group(gold, answers), strict=True):
        assert number is not None, f"no class for {answer!r}"
        groups[number].append(answer)
    return list(groups.values())


def _check_fields(row: Mapping[str, Any], fields: set[str]) -> None:
    if set(row) != fields:
        missing, unknown = sorted(fields - set(row)), sorted(set(row) - fields)
        raise ValueError(f"fields missing: {missing}, unknown: {unknown}")
