"""The process that holds one engine. Started by `vllm_thinkfast.bench.process`, never by hand.

Commands: ``start`` (make the engine, say what it is), ``warm_up``, ``measure`` (one cell), and
``roofline``, which needs no engine.
"""

import math
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_thinkfast import compat
from vllm_thinkfast.bench import capacity
from vllm_thinkfast.bench.serve import OnProgress, peak_memory_bytes, reset_peak_memory, serve

_WARM_UP_PROMPT_TOKENS = 8
_WARM_UP_TOKENS = 2
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""How configs in transformers say that a layer has several MLPs."""
_FIRST_ORDINARY_TOKEN = 3
_FEWEST_STEPS = 3
"""Of pure decoding; fewer give no median worth the name."""


class Engine:
    """One model in vLLM, driven step by step."""

    def __init__(self, folder: str, options: Mapping[str, Any]) -> None:
        """Starts vLLM.

        Args:
            folder: the model.
            options: arguments of ``vllm.LLM``.
        """
        from vllm import LLM

        begin = time.perf_counter()
        self.llm = LLM(folder, **options)
        self.start_s = time.perf_counter() - begin
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.executor = core.model_executor
        self.config = self.engine.vllm_config
        self.watch = _Watch(self.scheduler)
        self._num_requests = 0

    @property
    def _cache(self) -> Any:
        return self.scheduler.kv_cache_config

    @property
    def block_bytes(self) -> float:
        """Bytes of one cache block, all layers that share it."""
        return compat.cache_bytes(self._cache) / float(self._cache.num_blocks)

    def describe(self, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """What the parent needs to know of the engine.

        Args:
            lengths: tokens of prompt and generated ones, for which the capacity is computed.
        """
        hf_config = self.config.model_config.hf_config
        count, embedding = count_parameters(hf_config)
        is_plain = getattr(hf_config, "quantization_config", None) is None
        return {
            "start_s": self.start_s,
            "num_parameters": count,
            "architecture": self.config.model_config.architecture,
            "max_decoding": {f"{P}+{T}": self.max_decoding(P, T) for P, T in lengths},
            "largest_batch": {f"{P}+{T}": self.largest_batch(P, T) for P, T in lengths},
            "cache_bytes": compat.cache_bytes(self._cache),
            "num_blocks": self._cache.num_blocks,
            "prefix_caching": bool(self.config.cache_config.enable_prefix_caching),
            "step_cost": self._step_cost(count, embedding) if count and is_plain else None,
        }

    def max_decoding(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Sequences of such lengths that the cache lets decode at once."""
        sequence = capacity.blocks_per_sequence(
            self.config, self._cache, num_prompt_tokens, num_tokens
        )
        return capacity.max_decoding(sequence, self._cache.num_blocks)

    def largest_batch(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Sequences of such lengths that may be submitted at once and are never preempted."""
        sequence = capacity.blocks_per_sequence(
            self.config, self._cache, num_prompt_tokens, num_tokens
        )
        return capacity.largest_batch(
            sequence,
            self._cache.num_blocks,
            num_prompt_tokens,
            self.scheduler.max_num_scheduled_tokens,
        )

    def _step_cost(self, num_parameters: int, embedding: int) -> dict[str, Any] | None:
        from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

        model_config = self.config.model_config
        (specs,) = self.executor.get_kv_cache_specs()
        states = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
        attention = [spec for spec in specs.values() if isinstance(spec, AttentionSpec)]
        windows = {getattr(spec, "sliding_window", None) for spec in attention} or {None}
        if len(windows) > 1:  # some layers read the whole context, others a part
            return None
        unknown = len(specs) - len(states) - len(attention)
        assert not unknown, f"{unknown} cache specs of unknown kind: {specs}"
        is_tied = bool(getattr(model_config.hf_config, "tie_word_embeddings", False))
        elements = num_parameters - (0 if is_tied else embedding)
        query_heads = model_config.get_num_attention_heads(self.config.parallel_config)
        return {
            "weight_bytes": elements * model_config.dtype.itemsize,
            "weight_elements": elements,
            "state_bytes": sum(map(compat.state_bytes, states)),
            # The convolution's state comes first in every model of vLLM; scales of ours are last.
            "state_elements": sum(math.prod(spec.shapes[:2][-1]) for spec in states),
            "kv_bytes_per_token": sum(
                compat.kv_bytes(spec) // spec.block_size for spec in attention
            ),
            "attention_flops_per_token": sum(
                4 * query_heads * spec.head_size for spec in attention
            ),
            "window": windows.pop(),
        }

    def warm_up(self, batch: int, mode: str, num_prompt_tokens: int) -> None:
        """Runs a batch of short prompts, and one of the cell's length, that nobody times.

        Matrix products are prepared for each number of tokens, at most those of one step.
        """
        # The engine was made for the longest cell, which may be shorter than the usual prompt.
        room = self.config.model_config.max_model_len - _WARM_UP_TOKENS
        prompts = self._prompts(1, batch, min(_WARM_UP_PROMPT_TOKENS, room), mode)
        self._run(prompts, batch, _WARM_UP_TOKENS, mode, seed=1)
        length = min(num_prompt_tokens, self.scheduler.max_num_scheduled_tokens, room)
        self._run(self._prompts(2, 1, length, mode), 1, _WARM_UP_TOKENS, mode, seed=2)

    def measure(
        self, mode: str, batch: int, num_prompt_tokens: int, num_tokens: int, seed: int
    ) -> dict[str, Any]:
        """Times one batch from the first submission to the last token.

        A step belongs to the decoding if it comes after the one in which the last sequence got its
        first token, and every sequence got a token in it. Its time is the time per output token;
        the prefill is everything before.

        Args:
            mode: "separate" or "samples".
            batch: sequences.
            num_prompt_tokens: of each prompt; random tokens.
            num_tokens: generated for each sequence.
            seed: of prompts and sampling.
        """
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache before the measurement")
        prompts = self._prompts(seed, batch, num_prompt_tokens, mode)
        self.watch.reset()
        reset_peak_memory()
        steps, prefilled = self._run(prompts, batch, num_tokens, mode, seed)
        seconds = steps[-1].ended - steps[0].began
        # Nobody waited, so everybody decoded together and no prefill was mixed in.
        is_together = self.watch.num_preempted == 0 and self.watch.most_running >= batch
        full = [step for step in steps[prefilled + 1 :] if step.num_tokens == batch]
        decode = full if is_together and len(full) >= _FEWEST_STEPS else []
        num_inputs = self.watch.num_scheduled_tokens - batch * (num_tokens - 1)
        prefill_s = steps[prefilled].ended - steps[0].began
        result = {
            "batch": batch,
            "seconds": seconds,
            "tokens_per_s": batch * num_tokens / seconds,
            "prefill_s": prefill_s,
            "num_prefilled_tokens": num_inputs,
            "prefill_tokens_per_s": num_inputs / prefill_s,
            "num_preempted": self.watch.num_preempted,
            "most_running": self.watch.most_running,
            "most_decoding": max(step.num_tokens for step in steps),
            "peak_cache_bytes": self.watch.most_blocks * self.block_bytes,
            "peak_memory_bytes": peak_memory_bytes(),
            "load_average": os.getloadavg()[0],
            "num_decode_steps": len(decode),
        }
        if decode:
            times = [step.ended - step.began for step in decode]
            result |= {
                "step_s": statistics.median(times),
                "step_s_least": min(times),
                "step_s_most": max(times),
                "step_cpu_s": statistics.median(step.cpu_s for step in decode),
                "decode_tokens_per_s": batch / statistics.median(times),
                "mean_context": num_prompt_tokens + num_tokens - len(decode) / 2,
            }
        return result

    def _prompts(self, seed: int, batch: int, num_tokens: int, mode: str) -> list[list[int]]:
        chance = random.Random(seed)
        vocab_size = self.config.model_config.get_vocab_size()
        number = 1 if mode == "samples" else batch
        return [
            [chance.randrange(_FIRST_ORDINARY_TOKEN, vocab_size) for _ in range(num_tokens)]
            for _ in range(number)
        ]

    def _run(
        self, prompts: list[list[int]], batch: int, num_tokens: int, mode: str, seed: int
    ) -> "tuple[list[_Step], int]":
        """Returns the steps, and the index of the one that ended the prefill."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rendered = self.engine.renderer.render_cmpl(
            [{"prompt_token_ids": prompt} for prompt in prompts]
        )
        last, last_cpu = time.perf_counter(), time.process_time()
        for prompt in rendered:
            params = SamplingParams(
                n=batch if mode == "samples" else 1,
                temperature=1.0,
                seed=seed,
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self.engine.add_request(f"bench-{self._num_requests}", prompt, params)
            self._num_requests += 1
        steps: list[_Step] = []
        begun: set[tuple[str, int]] = set()
        prefilled = None
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now, now_cpu = time.perf_counter(), time.process_time()
            num_new = 0
            for output in outputs:
                for sequence in output.outputs:
                    num_new += len(sequence.token_ids)
                    begun.add((output.request_id, sequence.index))
            steps.append(_Step(last, now, now_cpu - last_cpu, num_new))
            last, last_cpu = now, now_cpu
            if prefilled is None and len(begun) == batch:
                prefilled = len(steps) - 1
        generated = sum(step.num_tokens for step in steps)
        assert generated == batch * num_tokens, (generated, batch, num_tokens)
        assert prefilled is not None
        return steps, prefilled


class _Step:
    """One step of the engine."""

    def __init__(self, began: float, ended: float, cpu_s: float, num_tokens: int) -> None:
        self.began = began
        self.ended = ended
        self.cpu_s = cpu_s
        self.num_tokens = num_tokens


class _Watch:
    """Counts what the scheduler does, from outside."""

    def __init__(self, scheduler: Any) -> None:
        self.num_scheduled_tokens = 0
        """Prompt tokens and generated ones that were put in again."""
        self.num_preempted = 0
        self.most_running = 0
        self.most_blocks = 0
        """Cache blocks in use at once."""
        schedule = scheduler.schedule
        pool = scheduler.kv_cache_manager.block_pool

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.num_scheduled_tokens += output.total_num_scheduled_tokens
            self.num_preempted += len(output.preempted_req_ids or ())
            self.most_running = max(self.most_running, len(scheduler.running))
            # Block 0 is vLLM's null block; it is never free.
            used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            self.most_blocks = max(self.most_blocks, used)
            return output

        scheduler.schedule = watched

    def reset(self) -> None:
        """Forgets what was counted."""
        self.num_scheduled_tokens = self.num_preempted = self.most_running = self.most_blocks = 0


def count_parameters(hf_config: Any) -> tuple[int | None, int]:
    """(parameters, those of the embedding) of a model, without its weights; None if unknown.

    vLLM packs weights into formats of its kernels, so its modules cannot be asked. Of a model with
    towers besides the language model, or with experts, a step reads only a part: that counts as
    unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_thinkfast.bench.shapes import num_parameters
    from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

    if isinstance(hf_config, LlambaConfig | MambaInLlamaConfig):
        return num_parameters(hf_config), hf_config.vocab_size * hf_config.hidden_size
    is_nested = hf_config.get_text_config() is not hf_config
    has_experts = any(getattr(hf_config, name, None) for name in _EXPERTS)
    is_known = type(hf_config) in AutoModelForCausalLM._model_mapping
    if is_nested or has_experts or not is_known:
        return None, 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    model.tie_weights()
    embedding = hf_config.vocab_size * hf_config.hidden_size
    return sum(parameter.numel() for parameter in model.parameters()), embedding


def answer(
    engine: Engine | None, command: dict[str, Any], _: OnProgress
) -> tuple[Engine | None, Any]:
    """Carries out one command; returns the engine and the result."""
    do = command.pop("do")
    if do == "roofline":
        from vllm_thinkfast.bench.roofline import measure_machine

        return engine, measure_machine(**command)
    if do == "start":
        engine = Engine(command["folder"], command["options"])
        return engine, engine.describe(command["lengths"])
    assert engine is not None
    if do == "warm_up":
        engine.warm_up(**command)
        return engine, None
    assert do == "measure", do
    return engine, engine.measure(**command)


if __name__ == "__main__":
    serve(answer)
