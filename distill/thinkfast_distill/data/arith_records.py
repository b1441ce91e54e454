"""Records of the ``arith`` source: problems, solutions with step labels, labelled samples."""

import re
from collections.abc import Mapping
from random import Random
from typing import Any, ClassVar, Protocol

from thinkfast_distill.data import arith
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import RecordFormat, string_field
from thinkfast_distill.data.source_config import ArithSourceConfig

_STEP = re.compile(r"(\d+)([-+*/])(\d+)=\d+")


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def place(self, index: int) -> str: ...


class ArithRecords:
    """Problems made on the fly."""

    FORMAT: ClassVar[RecordFormat] = RecordFormat(
        layout="prompt", prompt_field="question", completion_field="answer"
    )

    def __init__(self, config: ArithSourceConfig) -> None:
        self._config = config
        self._spec = arith.ArithSpec(
            config.min_steps, config.max_steps, config.max_value, config.max_operand
        )

    def __len__(self) -> int:
        return self._config.num

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The problem and its solution."""
        one = self.problem(index)
        return {"question": one.question, "answer": one.solution}

    def problem(self, index: int) -> arith.Problem:
        """The problem."""
        return arith.problem(self._config.split, index, self._config.problem_seed, self._spec)

    def place(self, index: int) -> str:
        """Split and number."""
        return f"arith {self._config.split} {index}"


class ArithStepRecords:
    """Solutions with step labels made on the fly: right ones, and some with a planted mistake.

    Or single steps of such solutions.
    """

    def __init__(self, config: ArithSourceConfig) -> None:
        self._config = config
        self._problems = ArithRecords(config)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The solution, or one of its steps; a function of seed, split and index."""
        config = self._config
        one = self._problems.problem(index)
        rng = Random(f"arith/{config.problem_seed}/{config.split}/{index}/mistake")
        assert config.mistakes is not None
        is_wrong = rng.random() < config.mistakes
        if config.single_steps:
            line = rng.choice(one.steps[: len(one.operations)])
            if is_wrong:
                line = arith.wrong_result(line, rng, config.single_steps, config.max_value)
            return {"steps": [line], "labels": [not is_wrong]}
        if is_wrong:
            solution = arith.with_mistake(one, rng, config.mistake)
        else:
            solution = arith.right_solution(one)
        return {
            "question": one.question,
            "steps": list(solution.steps),
            "labels": list(solution.labels),
        }

    def place(self, index: int) -> str:
        """Split and number."""
        return self._problems.place(index)


class ArithSampleRecords:
    """A model's own solutions of ``arith`` problems, with step labels."""

    def __init__(self, rows: _Rows, split: arith.Split) -> None:
        """Opens nothing.

        Args:
            rows: with the fields ``question``, ``answer`` (the solution) and ``sample``.
            split: the one to which all problems must belong.
        """
        self._rows, self._split = rows, split

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The solution.

        Raises:
            DataError: a field is missing, empty or no text, ``answer`` is no solution of an
                ``arith`` problem, or the problem is of another split.
        """
        row = self._rows[index]
        try:
            question, answer, sample = (
                string_field(row, name) for name in ("question", "answer", "sample")
            )
            labels = arith.label_steps(answer, sample)
            self._check_split(answer)
        except DataError as error:
            raise DataError(f"{self.place(index)}: {error}") from error
        steps = [line for line in sample.split("\n") if line.strip()]
        return {"question": question, "steps": steps, "labels": labels}

    def place(self, index: int) -> str:
        """``file:line``."""
        return self._rows.place(index)

    def _check_split(self, solution: str) -> None:
        """A model trained on a problem that is measured with would look better than it is."""
        steps = _STEP.findall(solution)
        if not steps:
            raise DataError(f"field 'answer' has no step: {solution[:80]!r}")
        structure = " ".join([steps[0][0], *(operator + operand for _, operator, operand in steps)])
        split = arith.split_of(structure)
        if split != self._split:
            raise DataError(
                f"the problem belongs to the split {split}, the source reads {self._split}; sample "
                f"problems of the split {self._split}"
            )
