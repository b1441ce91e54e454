"""lm-eval tasks with N samples per problem: ``math500_passk``, ``gsm8k_passk``, ``arith_passk``.

Importing this package, and scoring with `lm_eval_tasks.answers`, `lm_eval_tasks.scoring` and
`lm_eval_tasks.estimators`, needs neither torch nor vllm nor lm-eval. The lm-eval side lives in
`lm_eval_tasks.passk_task` and is imported by lm-eval itself, through the YAML files.
"""

from pathlib import Path


def task_path() -> Path:
    """Return the folder of the task definitions, for ``lm_eval --include_path``."""
    return Path(__file__).resolve().parent / "tasks"


__all__ = ["task_path"]
