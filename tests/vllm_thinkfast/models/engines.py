"""vLLM engines for the tests: one at a time in this process, kept while tests ask for it."""

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_logprobs": -1,
    "kv_cache_memory_bytes": 2**28,
    "seed": 0,
}


class EnginePool:
    """Keeps the engine that was asked for last."""

    def __init__(self) -> None:
        self._key: Any = None
        self._engine: Any = None

    def get(self, folder: Path | str, **options: Any) -> Any:
        """A ``vllm.LLM`` of ``folder``; the plugin comes in through its entry point."""
        from vllm import LLM

        settings = {**DEFAULTS, **options}
        ours = sorted(v for v in os.environ.items() if v[0].startswith("VLLM_THINKFAST_"))
        key = (str(folder), sorted(settings.items(), key=str), ours)
        if key != self._key:
            self.close()
            self._engine = LLM(str(folder), **settings)
            self._key = key
        return self._engine

    def close(self) -> None:
        """Frees the engine and the process groups that vLLM made for it."""
        if self._engine is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.llm_engine.engine_core.shutdown()
        self._engine = self._key = None
        gc.collect()
        cleanup_dist_env_and_memory()


def log_probabilities(llm: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probabilities of all tokens at all positions of each prompt but the last, [L - 1, V]."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=-1, temperature=0, detokenize=False)
    outputs = llm.generate(token_prompts(prompts), params, use_tqdm=False)
    found = []
    for output in outputs:
        rows = [
            torch.tensor([row[i].logprob for i in range(len(row))])
            for row in output.prompt_logprobs[1:]
        ]
        found.append(torch.stack(rows) if rows else torch.empty(0, 0))
    return found


def greedy(llm: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations of ``num_tokens`` tokens, all prompts in flight at once."""
    outputs = llm.generate(token_prompts(prompts), greedy_params(num_tokens), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy_params(num_tokens: int) -> Any:
    """Sampling parameters of ``greedy``."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)


def token_prompts(prompts: Sequence[Sequence[int]]) -> list[Any]:
    """vLLM's form of prompts that are token ids."""
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of given lengths with ids from 3 up (below are special ones)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]
