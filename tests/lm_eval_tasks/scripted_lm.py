"""A scripted lm-eval model, and small benchmarks of our own in the hub's field layout."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lm_eval_tasks import task_path

GSM8K_ROWS = [
    {
        "question": "A crate holds 6 jars, a van holds 3 crates. How many jars fit into the van?",
        "answer": "Each crate has 6 jars, so 3 * 6 = <<3*6=18>>18 jars fit.\n#### 18",
    },
    {
        "question": "Ann earns $35,000 twice a year. How much does she earn in a year?",
        "answer": "She earns 2 * 35,000 = 70,000 dollars.\n#### 70,000",
    },
    {
        "question": "Ben has 9 coins and loses 4. How many are left?",
        "answer": "9 - 4 = <<9-4=5>>5\n#### 5",
    },
]
MATH500_ROWS = [
    {
        "problem": "Simplify $\\sqrt{8}$.",
        "solution": "It is $\\boxed{2\\sqrt{2}}$.",
        "answer": "2\\sqrt{2}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/a.json",
    },
    {
        "problem": "Which is larger, $\\frac{1}{2}$ or $\\frac{1}{3}$?",
        "solution": "The larger is $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/b.json",
    },
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class ScriptedLM(LM):
    """Answers sample j of a prompt with ``script(prompt, j)`` and records what it was asked."""

    def __init__(self, script: Callable[[str, int], str]) -> None:
        super().__init__()
        self.script = script
        self.calls: list[list[Instance]] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.calls.append(requests)
        seen: defaultdict[str, int] = defaultdict(int)
        texts = []
        for request in requests:
            prompt = request.args[0]
            texts.append(self.script(prompt, seen[prompt]))
            seen[prompt] += 1
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise AssertionError("the tasks only generate")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("the tasks only generate")

    @property
    def tokenizer_name(self) -> str:
        return "scripted"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history) + "<bot>"


def evaluate(lm: LM, task: str, metadata: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Run one of the tasks from this repository's definitions (no index of 15,000 files)."""
    manager = TaskManager(
        include_path=str(task_path()), include_defaults=False, metadata=dict(metadata)
    )
    results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, **kwargs)
    assert results is not None
    return dict(results)
