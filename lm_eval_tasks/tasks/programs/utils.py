"""The ``programs`` problems: shipped data in HumanEval's layout."""

from pathlib import Path
from typing import Any, ClassVar

from lm_eval_tasks.tasks.humaneval.utils import HumanEvalPassAtK

TEST_FILE = Path(__file__).resolve().with_name("test.jsonl")


class ProgramsPassAtK(HumanEvalPassAtK):
    """The problems that are shipped with this task."""

    BENCHMARK: ClassVar[str] = "programs"
    PROBLEMS: ClassVar[str] = "programs"
    FOLDER: ClassVar[str] = "programs"

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the shipped problems, or the file named by ``data_file``."""
        metadata = self.config.metadata
        if metadata.get("data_file") is None:
            # Written into the metadata, which lm-eval stores beside the results.
            metadata["data_file"] = str(TEST_FILE)
        super().download(dataset_kwargs, **kwargs)
