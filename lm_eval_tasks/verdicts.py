"""What ``thinkfast-eval score`` writes into a run folder: verdicts and answer classes.

``verdicts.jsonl`` has one line per sample: its answer, the rule that found it, and whether it is
correct. ``classes.jsonl`` has one line per problem: its different answers, grouped as
`lm_eval_tasks.voting` does; a later line of a problem replaces earlier ones. Both carry the version
of task and grading, so that verdicts of an older grader are never mixed with newer ones.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval_tasks.answers import Extracted
from lm_eval_tasks.errors import stop
from lm_eval_tasks.jsonl import JsonLines
from lm_eval_tasks.locks import exclusive
from lm_eval_tasks.provenance import record_grading
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.scoring import Grading, grading_of

VERDICTS = "verdicts.jsonl"
CLASSES = "classes.jsonl"


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
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        stop(
            f"{folder} is no run folder (no config.json); give one that thinkfast-eval sample wrote"
        )
    store = SampleStore(folder)
    config = store.config()
    grading = grading_of(config["task"])
    version = grading.version_of(config["task_version"])
    golds = _golds(store, grading)
    with (
        exclusive(folder / ".score.lock", folder),
        JsonLines(folder / VERDICTS) as verdicts,
        JsonLines(folder / CLASSES) as classes,
    ):
        done: set[tuple[str, int]] = set()
        known: dict[str, dict[str, bool]] = defaultdict(dict)
        for verdict in read_verdicts(folder):
            if verdict.task_version == version:
                done.add(verdict.key)
                if verdict.answer is not None:
                    known[verdict.problem_id][verdict.answer] = verdict.correct
        grouped = {
            name: {answer for group in row.classes for answer in group}
            for name, row in read_classes(folder, version).items()
        }
        missing: dict[str, list[tuple[int, Extracted]]] = defaultdict(list)
        num_samples = 0
        for record in store.records():  # the texts are not kept
            num_samples += 1
            if record.key not in done:
                found = grading.extract(record.text)
                missing[record.problem_id].append((record.sample_index, found))
        num_new = sum(map(len, missing.values()))
        if num_new:
            record_grading(folder, command, num_new)
        for name, gold in golds.items():
            verdict_of = known[name]
            answers = {one.answer for _, one in missing[name] if one.answer is not None}
            asked = sorted(answers - verdict_of.keys())
            verdict_of.update(zip(asked, grading.grade(gold, asked), strict=True))
            for index, (answer, source) in missing[name]:
                correct = answer is not None and bool(verdict_of[answer])
                row = Verdict(name, index, answer, source, correct, version)
                verdicts.append(row.as_dict())
            if verdict_of.keys() != grouped.get(name, set()):
                groups = _group(gold, sorted(verdict_of), grading)
                classes.append(AnswerClasses(name, version, groups).as_dict())
    return ScoreCounts(num_samples, num_new)


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
