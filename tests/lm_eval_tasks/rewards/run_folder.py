"""Run folders with given texts, as ``thinkfast-eval sample`` would have written them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.samples import ProblemRecord, SampleRecord, SampleStore

CONFIG: dict[str, Any] = {
    "name": "test",
    "model": "m",
    "model_id": "files:0",
    "task": "arith",
    "task_version": "1",
    "data_sha256": "0",
    "prompt": {},
    "temperature": 0.7,
    "top_p": 1.0,
    "max_tokens": 64,
    "seed": 1,
    "regime": "saturated",
    "engine": {},
    "num_samples": 4,
    "limit": None,
}


def write_run(folder: Path, texts: Mapping[str, Sequence[str]]) -> SampleStore:
    """Append the texts as samples; problem ``p`` asks "question p" and its answer is 7."""
    store = SampleStore(folder)
    problems = [ProblemRecord(name, f"question {name}", "7", "0") for name in texts]
    have = store.have() if (folder / "config.json").exists() else {}
    with store.open(CONFIG, problems):
        config_hash = store.config()["config_hash"]
        for name, drawn in texts.items():
            for index, text in enumerate(drawn):
                if index in have.get(name, ()):
                    continue
                number = float(index)
                store.append(
                    SampleRecord(
                        problem_id=name,
                        sample_index=index,
                        seed=index,
                        text=text,
                        num_tokens=len(text.split()) + 1,
                        num_prompt_tokens=5,
                        num_cached_tokens=None,
                        finish_reason="stop",
                        session=0,
                        submit_s=0.0,
                        first_token_s=None,
                        finish_s=number + 1,
                        config_hash=config_hash,
                    )
                )
    return store
