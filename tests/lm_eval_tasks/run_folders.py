"""Write small run folders as ``thinkfast-eval sample`` and ``reward`` would."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.samples import ProblemRecord, SampledText, SampleRecord, SampleStore

CONFIG: dict[str, Any] = {
    "name": "run",
    "model_id": "scripted",
    "task": "gsm8k",
    "task_version": "1.0",
    "data_sha256": "0" * 64,
    "prompt": {},
    "temperature": 0.7,
    "top_p": 1.0,
    "max_tokens": 64,
    "seed": 0,
    "regime": "saturated",
    "engine": {},
    "num_samples": 4,
    "limit": None,
}


def write_run(
    folder: Path,
    golds: Mapping[str, str],
    texts: Mapping[str, Sequence[str]],
    **config: Any,
) -> Path:
    """Write a run folder; sample j of each problem takes from j to j + 2 seconds.

    Args:
        folder: where.
        golds: problem id -> gold answer.
        texts: problem id -> its sampled texts; appended to what the folder has.
        config: fields that differ from `CONFIG`.
    """
    problems = [ProblemRecord(name, f"question {name}", gold, "") for name, gold in golds.items()]
    with SampleStore(folder).open(CONFIG | config, problems) as store:
        have = {name: set(indices) for name, indices in store.have().items()}
        for name, drawn in texts.items():
            for j, text in enumerate(drawn):
                if j in have.get(name, ()):
                    continue
                is_known = isinstance(text, SampledText)
                record = SampleRecord(
                    problem_id=name,
                    sample_index=j,
                    seed=j,
                    text=str(text),
                    num_tokens=text.num_tokens if is_known else 10,
                    num_prompt_tokens=5,
                    num_cached_tokens=None,
                    finish_reason=(text.finish_reason or "stop") if is_known else "stop",
                    session=0,
                    submit_s=float(j),
                    first_token_s=None,
                    finish_s=j + 2.0,
                    config_hash=store.config_hash,
                )
                store.append(record)
    return folder


def write_scores(folder: Path, name: str, steps: Callable[[str], list[float]]) -> None:
    """Write a score file; ``steps`` gives the step scores of a text."""
    path = folder / "scores" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = []
    for record in SampleStore(folder).records():
        found = steps(record.text)
        row = {
            "problem_id": record.problem_id,
            "sample_index": record.sample_index,
            "step_scores": found,
            "seconds": 0.25,
            "reward_hash": "hash",
            "unscored": None if found else "empty",
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
