"""MATH-500: fields and gold answers. The gold answers are LaTeX; math-verify compares."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.passk_task import PassAtKTask


class Math500PassAtK(PassAtKTask):
    """The 500 problems of MATH that "Let's verify step by step" tests on."""

    REQUIRED: ClassVar[FieldTypes] = {"problem": str, "answer": str}
    OPTIONAL: ClassVar[FieldTypes] = {
        "unique_id": str,
        "subject": str,
        "level": int,
        "solution": str,
    }
    BENCHMARK: ClassVar[str] = "math500"
    PROBLEMS: ClassVar[str] = "math500"
    ID_FIELD: ClassVar[str | None] = "unique_id"
    QUESTION_FIELD: ClassVar[str] = "problem"
    FOLDER: ClassVar[str] = "math500"

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row, or None."""
        return None if row["answer"].strip() else "field 'answer' is empty"

    @staticmethod
    def gold(doc: Mapping[str, Any]) -> str:
        """Return the field ``answer``."""
        return str(doc["answer"])
