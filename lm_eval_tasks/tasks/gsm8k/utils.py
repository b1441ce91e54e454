"""GSM8K: fields and grading. The gold answer is the integer after ``####``."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

from lm_eval_tasks.answers import parse_number, same_number_many
from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.passk_task import PassAtKTask, score_results


def gold_number(answer: str) -> Fraction:
    """Return the number after the last ``####`` of a GSM8K solution.

    Raises:
        ValueError: there is none.
    """
    _, mark, last = answer.rpartition("####")
    number = parse_number(last) if mark else None
    if number is None:
        raise ValueError(f"field 'answer' must end in '#### <number>', got {answer[-40:]!r}")
    return number


class GSM8KPassAtK(PassAtKTask):
    """pass@k on the 1,319 test problems of GSM8K."""

    REQUIRED: ClassVar[FieldTypes] = {"question": str, "answer": str}
    DEFINITION: ClassVar[str] = "gsm8k/gsm8k_passk.yaml"

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row, or None."""
        try:
            gold_number(row["answer"])
        except ValueError as error:
            return str(error)
        return None


def process_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the metrics of one problem (lm-eval calls this)."""
    return score_results(results, partial(same_number_many, gold_number(doc["answer"])))
