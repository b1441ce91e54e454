"""GSM8K: fields and gold answers. The gold answer is the integer after ``####``."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lm_eval_tasks.answers import parse_number
from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.passk_task import PassAtKTask


def gold_answer(answer: str) -> str:
    """Return the number after the last ``####`` of a GSM8K solution, as it is written.

    Raises:
        ValueError: there is none.
    """
    _, mark, last = answer.rpartition("####")
    if not mark or parse_number(last) is None:
        raise ValueError(f"field 'answer' must end in '#### <number>', got {answer[-40:]!r}")
    return last.strip()


class GSM8KPassAtK(PassAtKTask):
    """The 1,319 test problems of GSM8K."""

    REQUIRED: ClassVar[FieldTypes] = {"question": str, "answer": str}
    BENCHMARK: ClassVar[str] = "gsm8k"
    PROBLEMS: ClassVar[str] = "gsm8k"
    FOLDER: ClassVar[str] = "gsm8k"

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row, or None."""
        try:
            gold_answer(row["answer"])
        except ValueError as error:
            return str(error)
        return None

    @staticmethod
    def gold(doc: Mapping[str, Any]) -> str:
        """Return the number after ``####``."""
        return gold_answer(doc["answer"])


class GSM8K500PassAtK(GSM8KPassAtK):
    """The first 500 of them: our choice, since nobody has published what "GSM8K-500" means."""

    BENCHMARK: ClassVar[str] = "gsm8k_500"
    NUM_ROWS: ClassVar[int | None] = 500
