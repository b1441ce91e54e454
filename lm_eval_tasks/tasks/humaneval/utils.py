"""HumanEval: fields and tests. The gold answer is the tests, not the reference solution."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.passk_task import PassAtKTask
from lm_eval_tasks.programs.checks import Checks


class HumanEvalPassAtK(PassAtKTask):
    """The 164 problems of HumanEval, asked for in one chat turn."""

    REQUIRED: ClassVar[FieldTypes] = {
        "task_id": str,
        "prompt": str,
        "test": str,
        "entry_point": str,
    }
    BENCHMARK: ClassVar[str] = "humaneval"
    PROBLEMS: ClassVar[str] = "humaneval"
    ID_FIELD: ClassVar[str | None] = "task_id"
    QUESTION_FIELD: ClassVar[str] = "prompt"
    FOLDER: ClassVar[str] = "humaneval"

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row, or None."""
        return _checks(row).fault()

    @staticmethod
    def gold(doc: Mapping[str, Any]) -> str:
        """Return the tests and the prompt they belong to."""
        return _checks(doc).to_gold()


class HumanEvalBasePassAtK(HumanEvalPassAtK):
    """The same problems as texts to be continued, for models without chat."""

    BENCHMARK: ClassVar[str] = "humaneval_base"
    PROBLEMS: ClassVar[str] = "humaneval_base"


def _checks(row: Mapping[str, Any]) -> Checks:
    return Checks(row["test"], entry_point=row["entry_point"], prompt=row["prompt"])
