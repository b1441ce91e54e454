"""The ``arith`` problems: shipped data and grading. The gold answer stands after ``####``."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lm_eval_tasks.answers import same_number_many
from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.passk_task import PassAtKTask, score_results
from lm_eval_tasks.tasks.gsm8k.utils import GSM8KPassAtK, gold_number

#: The test problems, written by ``python -m thinkfast_distill.data.arith --split test``.
TEST_FILE = Path(__file__).resolve().with_name("test.jsonl")


class ArithPassAtK(PassAtKTask):
    """pass@k on the test problems that are shipped with this task."""

    REQUIRED: ClassVar[FieldTypes] = {"question": str, "answer": str}
    OPTIONAL: ClassVar[FieldTypes] = {"id": str}
    ID_FIELD: ClassVar[str | None] = "id"
    DEFINITION: ClassVar[str] = "arith/arith_passk.yaml"
    check_row = staticmethod(GSM8KPassAtK.check_row)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the shipped problems, or the file named by ``data_file``."""
        metadata = self.config.metadata
        if metadata.get("data_file") is None:
            # Written into the metadata, which lm-eval stores beside the results.
            metadata["data_file"] = str(TEST_FILE)
        super().download(dataset_kwargs, **kwargs)


def process_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the metrics of one problem (lm-eval calls this)."""
    return score_results(results, partial(same_number_many, gold_number(doc["answer"])))
