"""Program of ``test_parallel.py``: greedy tokens of engines with several worker processes.

Reads {"cases": [{"folder", "options"}], "prompts", "num_tokens"} from stdin, and writes one line
``RESULT {"tokens": ...}`` or ``RESULT {"error": ...}`` for each case.
"""

import json
import sys
from typing import Any

from tests.vllm_thinkfast.models.engines import EnginePool, greedy


def main() -> None:
    """Runs the cases one after another."""
    job = json.load(sys.stdin)
    pool = EnginePool()
    for case in job["cases"]:
        try:
            llm = pool.get(case["folder"], **case["options"])
            result: dict[str, Any] = {"tokens": greedy(llm, job["prompts"], job["num_tokens"])}
        except (ValueError, RuntimeError, AssertionError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        pool.close()
        sys.stdout.write(f"RESULT {json.dumps(result)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
