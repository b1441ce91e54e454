"""Drops training documents that contain an evaluation problem.

Texts are compared as lists of lower-case words and numbers, without punctuation and LaTeX spacing.
A document is dropped when a whole turn (or text) equals a problem, or when it shares 13 consecutive
words with one, the n-gram size of the GPT-3 paper (arXiv 2005.14165, appendix C). A problem of 8 to
12 words counts as one n-gram of its own length; shorter ones are found only as a whole turn.

A paraphrase is not found. Templated problems (``arith``) share whole sentences by design and are
split by construction, so they must not be checked here.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from thinkfast_distill.data.errors import DataError

NGRAM_WORDS = 13
_SHORTEST_NGRAM = 8
#: Names of the problem's field in the usual benchmarks, first match wins.
PROBLEM_FIELDS = ("problem", "question", "prompt", "text")
_SPACING = re.compile(r"\\[!,;:> ]|\\q?quad(?![a-z])|\\(?:left|right|displaystyle)(?![a-z])|[{}$~]")
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")

Finding = Literal["exact", "ngram"]


def words(text: str) -> list[str]:
    """The normalised words of a text."""
    text = _SPACING.sub(" ", text.lower().replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return _WORD.findall(text)


class Decontaminator:
    """Knows the evaluation problems and finds them in documents."""

    def __init__(self, problems: Iterable[str]) -> None:
        """Indexes the problems.

        Raises:
            DataError: none of them has a word.
        """
        self._whole: set[str] = set()
        self._ngrams: dict[int, set[str]] = {}
        for problem in problems:
            found = words(problem)
            if not found:
                continue
            self._whole.add(" ".join(found))
            size = min(NGRAM_WORDS, len(found))
            if size >= _SHORTEST_NGRAM:
                self._ngrams.setdefault(size, set()).update(_grams(found, size))
        if not self._whole:
            raise DataError("decontaminate: no evaluation problem with any word was given")

    @classmethod
    def from_files(cls, files: Sequence[str | Path]) -> "Decontaminator":
        """Reads JSON lines files with a field problem, question, prompt or text.

        Raises:
            DataError: with file and line.
        """
        return cls(problem for file in files for problem in _read(Path(file)))

    @property
    def num_problems(self) -> int:
        """Different problems after normalisation."""
        return len(self._whole)

    @property
    def fingerprint(self) -> str:
        """A hash of the set of problems, to be kept with the run."""
        return hashlib.sha256("\n".join(sorted(self._whole)).encode()).hexdigest()[:16]

    def find(self, texts: Sequence[str]) -> Finding | None:
        """What a document, given as its turns, has in common with a problem, or None."""
        turns = [words(text) for text in texts]
        if any(" ".join(turn) in self._whole for turn in turns):
            return "exact"
        together = [word for turn in turns for word in turn]
        for size, known in self._ngrams.items():
            if not known.isdisjoint(_grams(together, size)):
                return "ngram"
        return None


def _grams(found: list[str], size: int) -> set[str]:
    return {" ".join(found[i : i + size]) for i in range(len(found) - size + 1)}


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"decontaminate: {path} cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg})") from error
        fields = [
            f for f in PROBLEM_FIELDS if isinstance(row, dict) and isinstance(row.get(f), str)
        ]
        if not fields:
            raise DataError(
                f"{path}:{number}: need an object with a text field {', '.join(PROBLEM_FIELDS)}"
            )
        found.append(row[fields[0]])
    if not found:
        raise DataError(f"decontaminate: {path} has no problems")
    return found
