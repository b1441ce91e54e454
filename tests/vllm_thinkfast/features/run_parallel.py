"""Program of ``test_parallel.py``: greedy tokens of engines with several worker processes.

Reads {"cases": [{"folder", "options"}], "prompts", "num_tokens"} from stdin, and writes one line
``RESULT {"tokens": ...}`` or ``RESULT {"error": ...}`` for each case.
"""

import asyncio
import json
import sys
from typing import Any

from tests.vllm_thinkfast.models.engines import (
    DEFAULTS,
    EnginePool,
    greedy,
    greedy_params,
    token_prompts,
)

Tokens = list[list[int]]


def main() -> None:
    """Runs the cases one after another."""
    job = json.load(sys.stdin)
    pool = EnginePool()
    for case in job["cases"]:
        folder, options = case["folder"], case["options"]
        try:
            if "data_parallel_size" in options:
                run = replicated(folder, options, job["prompts"], job["num_tokens"])
                result: dict[str, Any] = {"tokens": asyncio.run(run)}
            else:
                llm = pool.get(folder, **options)
                result = {"tokens": greedy(llm, job["prompts"], job["num_tokens"])}
        except (ValueError, RuntimeError, AssertionError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        pool.close()
        sys.stdout.write(f"RESULT {json.dumps(result)}\n")
        sys.stdout.flush()


async def replicated(
    folder: str, options: dict[str, Any], prompts: Tokens, num_tokens: int
) -> Tokens:
    """Greedy tokens from several engines behind one client; the prompts take turns on them."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **{**DEFAULTS, **options}))
    num_engines = options["data_parallel_size"]

    async def one(i: int, prompt: Any) -> list[int]:
        params, rank, last = greedy_params(num_tokens), i % num_engines, None
        async for output in engine.generate(prompt, params, str(i), data_parallel_rank=rank):
            last = output
        assert last is not None
        return list(last.outputs[0].token_ids)

    try:
        asked = (one(i, prompt) for i, prompt in enumerate(token_prompts(prompts)))
        return list(await asyncio.gather(*asked))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
