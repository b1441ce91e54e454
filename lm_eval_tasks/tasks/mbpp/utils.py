"""MBPP: fields and tests. The gold answer is the assertions, not the reference solution."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.passk_task import PassAtKTask
from lm_eval_tasks.programs.checks import Checks


class MBPPPassAtK(PassAtKTask):
    """The 500 test problems of MBPP."""

    REQUIRED: ClassVar[FieldTypes] = {"text": str, "test_list": list}
    OPTIONAL: ClassVar[FieldTypes] = {"task_id": int, "test_setup_code": str}
    BENCHMARK: ClassVar[str] = "mbpp"
    PROBLEMS: ClassVar[str] = "mbpp"
    ID_FIELD: ClassVar[str | None] = "task_id"
    QUESTION_FIELD: ClassVar[str] = "text"
    FOLDER: ClassVar[str] = "mbpp"

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row, or None."""
        if not all(isinstance(test, str) for test in row["test_list"]):
            return "field 'test_list' must be a list of assertions, each a text"
        return _checks(row).fault()

    @staticmethod
    def gold(doc: Mapping[str, Any]) -> str:
        """Return the assertions."""
        return _checks(doc).to_gold()


def _checks(row: Mapping[str, Any]) -> Checks:
    return Checks("\n".join(row["test_list"]), setup=row.get("test_setup_code") or "")
