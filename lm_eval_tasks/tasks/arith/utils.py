"""The ``arith`` problems: shipped data. The gold answer stands after ``####``, as in GSM8K."""

from pathlib import Path
from typing import Any, ClassVar

from lm_eval_tasks.data import FieldTypes
from lm_eval_tasks.tasks.gsm8k.utils import GSM8KPassAtK

#: The test problems, written by ``python -m thinkfast_distill.data.arith --split test``.
TEST_FILE = Path(__file__).resolve().with_name("test.jsonl")


class ArithPassAtK(GSM8KPassAtK):
    """The test problems that are shipped with this task."""

    OPTIONAL: ClassVar[FieldTypes] = {"id": str}
    BENCHMARK: ClassVar[str] = "arith"
    PROBLEMS: ClassVar[str] = "arith"
    ID_FIELD: ClassVar[str | None] = "id"
    FOLDER: ClassVar[str] = "arith"

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the shipped problems, or the file named by ``data_file``."""
        metadata = self.config.metadata
        if metadata.get("data_file") is None:
            # Written into the metadata, which lm-eval stores beside the results.
            metadata["data_file"] = str(TEST_FILE)
        super().download(dataset_kwargs, **kwargs)
