"""The process that holds one vLLM engine. Started by `demo.engine`, never by hand.

Commands: ``start`` (make the engine), ``passk`` (sample and score), ``speed`` (time one batch).
"""

import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from vllm_thinkfast.bench.serve import OnProgress, peak_memory_bytes, serve

TASK = "arith_passk"
SPEED_PROMPT_TOKENS = 64
MAX_BATCHED_TOKENS = 4096
"""Tokens per step; holds the prompts of a speed measurement with up to 64 sequences."""


class Engine:
    """One model in vLLM, behind lm-eval's model class."""

    def __init__(self, folder: str, settings: dict[str, Any], on_progress: OnProgress) -> None:
        from lm_eval.models.vllm_causallms import VLLM

        self.settings = settings
        self.num_batches = 0
        """Of the speed measurement so far."""
        self.lm = VLLM(
            pretrained=folder,
            dtype=settings["dtype"],
            enforce_eager=True,
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            kv_cache_memory_bytes=settings["kv_cache_bytes"],
            gpu_memory_utilization=0.25,  # all engines are loaded at once during the speed rounds
            enable_prefix_caching=True,  # one prefill for all samples of a prompt, also of students
            block_size=32,  # the smallest that attention has on a CPU: prompts here are short
            seed=settings["seed"],
            disable_log_stats=False,  # stamps first and last tokens, for the speed measurement
        )
        self._report_progress(on_progress)

    def _report_progress(self, on_progress: OnProgress) -> None:
        """Reports what vLLM's progress bar would show."""
        generate = self.lm.model.generate

        class Progress(tqdm):  # type: ignore[type-arg]
            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                on_progress(int(self.n), int(self.total or 0))
                return shown

        def with_progress(*args: Any, **kwargs: Any) -> Any:
            return generate(*args, **kwargs | {"use_tqdm": Progress})

        self.lm.model.generate = with_progress
        self.generate = generate

    def passk(self) -> dict[str, Any]:
        """Samples and scores all problems.

        The samples carry no seeds of their own, which vLLM would draw row by row. With the global
        seed, and all requests submitted at once, the run is still reproducible.
        """
        import lm_eval
        from lm_eval.tasks import TaskManager

        import lm_eval_tasks

        values = self.settings
        options = {"num_samples": values["num_samples"], "data_file": values["data"]}
        # With a small --limit all problems may be easy ones, whose samples are all the same.
        options["allow_identical_samples"] = True
        tasks = TaskManager(
            include_path=str(lm_eval_tasks.task_path()), include_defaults=False, metadata=options
        )
        begin = time.perf_counter()
        found = lm_eval.simple_evaluate(
            model=self.lm,
            tasks=[TASK],
            task_manager=tasks,
            limit=values["limit"],
            apply_chat_template=True,
            gen_kwargs={
                "max_gen_toks": values["max_tokens"],
                "temperature": values["temperature"],
                "seed": -1,
            },
            random_seed=values["seed"],
            numpy_random_seed=values["seed"],
            torch_random_seed=values["seed"],
            fewshot_random_seed=values["seed"],
            log_samples=True,
        )
        wall_s = time.perf_counter() - begin
        metrics = {
            # lm-eval names a metric "pass@4,<filter>"; + 0.0 turns a negative zero into zero
            key.removesuffix(",all"): value + 0.0
            for key, value in found["results"][TASK].items()
            if key.endswith(",all") and isinstance(value, int | float)
        }
        rows = found["samples"][TASK]
        names = [name for name in metrics if not name.endswith("_stderr")]
        return {
            "metrics": metrics,
            "per_problem": [{name: row[name] + 0.0 for name in names} for row in rows],
            "wall_s": wall_s,
            "peak_memory_bytes": peak_memory_bytes(),
            "samples": [
                {"question": row["doc"]["question"], "samples": list(map(str, row["resps"][0]))}
                for row in rows
            ],
        }

    def speed(self, prompts: Sequence[str], num_sequences: int, num_tokens: int) -> dict[str, Any]:
        """Times one batch: first the prefill of all prompts, then decoding without any.

        vLLM stamps the first and the last token of every sequence with the step that made it, so
        one batch gives both speeds. A salt of its own keeps every sequence from the prefix cache,
        where earlier rounds left the same prompts, and where a prompt that comes twice in a batch
        waits for the first one's state.

        Args:
            prompts: taken in turn, each cut to `SPEED_PROMPT_TOKENS`, so that all fit in one step.
            num_sequences: sequences in the batch.
            num_tokens: generated for each sequence, whatever it says.
        """
        from vllm import SamplingParams

        encoded = [self.lm.tok_encode(text)[:SPEED_PROMPT_TOKENS] for text in prompts]
        self.num_batches += 1
        batch = [
            {
                "prompt_token_ids": encoded[i % len(encoded)],
                "cache_salt": f"{self.num_batches} {i}",
            }
            for i in range(num_sequences)
        ]
        params = SamplingParams(
            max_tokens=num_tokens,
            ignore_eos=True,
            temperature=self.settings["temperature"],
        )
        begin = time.perf_counter()
        outputs = self.generate(batch, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        cached = sum(output.num_cached_tokens for output in outputs)
        assert cached == 0, f"{cached} prompt tokens came from the prefix cache"
        stamps = [output.metrics for output in outputs]
        firsts = {stamp.first_token_ts for stamp in stamps}
        assert len(firsts) == 1, f"the prefill took {len(firsts)} steps instead of one"
        (first,) = firsts
        decode_s = max(stamp.last_token_ts for stamp in stamps) - first
        prefill_s = first - min(stamp.scheduled_ts for stamp in stamps)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert tokens == num_sequences * num_tokens, (tokens, num_sequences, num_tokens)
        num_prompt_tokens = sum(len(item["prompt_token_ids"]) for item in batch)
        return {
            "seconds": seconds,
            "prefill_tokens_per_s": num_prompt_tokens / prefill_s,
            "decode_tokens_per_s": (tokens - num_sequences) / decode_s,
        }


def answer(
    engine: Engine | None, command: dict[str, Any], on_progress: OnProgress
) -> tuple[Engine, Any]:
    """Carries out one command; returns the engine and the result."""
    if command["do"] == "start":
        begin = time.perf_counter()
        engine = Engine(command["folder"], command["settings"], on_progress)
        return engine, {"engine_start_s": time.perf_counter() - begin}
    assert engine is not None
    if command["do"] == "passk":
        return engine, engine.passk()
    assert command["do"] == "speed", command
    return engine, engine.speed(command["prompts"], command["num_sequences"], command["num_tokens"])


if __name__ == "__main__":
    serve(answer)
