"""MATH-500: fields and grading. The gold answers are LaTeX; math-verify compares."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from lm_eval_tasks.answers import equivalent_many
from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.passk_task import PassAtKTask, score_results


class Math500PassAtK(PassAtKTask):
    """pass@k on the 500 problems of MATH that "Let's verify step by step" tests on."""

    REQUIRED: ClassVar[FieldTypes] = {"problem": str, "answer": str}
    OPTIONAL: ClassVar[FieldTypes] = {
        "unique_id": str,
        "subject": str,
        "level": int,
        "solution": str,
    }
    ID_FIELD: ClassVar[str | None] = "unique_id"
    DEFINITION: ClassVar[str] = "math500/math500_passk.yaml"

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row, or None."""
        return None if row["answer"].strip() else "field 'answer' is empty"


def process_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the metrics of one problem (lm-eval calls this)."""
    return score_results(results, partial(equivalent_many, doc["answer"]))
