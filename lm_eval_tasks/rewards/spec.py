"""Name a reward model in one string: ``MODEL[,key=value...]``.

``RLHFlow/Llama3.1-8B-PRM-Deepseek-Data`` is enough for a published model: its protocol and step
split follow from its name. ``my/prm,protocol=rlhflow-deepseek,split=line`` names them. A model of
someone else is not run with a protocol by guess.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lm_eval_tasks.errors import stop
from lm_eval_tasks.rewards.protocols import PROTOCOLS
from lm_eval_tasks.rewards.steps import SPLITS, Split
from lm_eval_tasks.sampling import environment

BACKENDS = ("hf", "vllm", "remote")

#: Raised when a protocol changes what it computes, so that old and new scores are not mixed.
PROTOCOL_VERSION = 1


class _Known(NamedTuple):
    protocol: str
    split: Split | None = None


#: Last component of a model's name or folder, in lower case -> how it is used.
_KNOWN: dict[str, _Known] = {
    "llama3.1-8b-prm-deepseek-data": _Known("rlhflow-deepseek"),
    "llama3.1-8b-prm-mistral-data": _Known("rlhflow-mistral"),
    "math-shepherd-mistral-7b-prm": _Known("math-shepherd"),
    "qwen2.5-math-prm-7b": _Known("qwen2.5-math-prm"),
    "qwen2.5-math-prm-72b": _Known("qwen2.5-math-prm"),
    "qwen2.5-math-7b-prm800k": _Known("qwen2.5-math-prm"),
    "skywork-o1-open-prm-qwen-2.5-1.5b": _Known("skywork-o1"),
    "skywork-o1-open-prm-qwen-2.5-7b": _Known("skywork-o1"),
    # The project's own; its steps are lines.
    "prm-tiny": _Known("rlhflow-deepseek", "line"),
}

#: Arguments of ``vllm.LLM`` that say where, how fast and in which batches a score is computed. They
#: change no more than its last digits. Every other one counts as deciding what it is
#: (quantization, dtype, kv_cache_dtype, hf_overrides, max_model_len, load_format, ...), also one
#: that this list has not heard of: a score file refused by mistake can be made again, two kinds of
#: scores in one file cannot be told apart.
_NEUTRAL_ENGINE_ARGS = frozenset({
    # memory
    "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size",
    "cpu_offload_gb", "offload_backend", "kv_offloading_size", "kv_offloading_backend",
    "enable_prefix_caching", "prefix_caching_hash_algo", "enable_sleep_mode",
    # devices
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_backend",
    "decode_context_parallel_size", "prefill_context_parallel_size", "enable_expert_parallel",
    "distributed_executor_backend", "disable_custom_all_reduce", "max_parallel_loading_workers",
    "device_ids", "nnodes", "node_rank", "master_addr", "master_port", "numa_bind",
    # batches and speed
    "max_num_seqs", "max_num_batched_tokens", "max_num_scheduled_tokens", "enable_chunked_prefill",
    "long_prefill_token_threshold", "scheduling_policy", "async_scheduling", "enforce_eager",
    "cudagraph_capture_sizes", "max_cudagraph_capture_size",
    # loading and logs
    "download_dir", "hf_token", "safetensors_load_strategy", "use_tqdm_on_load",
    "disable_log_stats", "log_level", "served_model_name",
})  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RewardSpec:
    """A reward model, its protocol and where it runs."""

    model: str
    """Hub name or folder; for ``remote`` the name under which the server serves it."""
    protocol: str
    """One of `PROTOCOLS`."""
    split: Split
    """How a solution is cut into steps."""
    name: str
    """Name of the score file."""
    backend: str = "hf"
    """``hf`` (transformers, here), ``vllm`` (an engine, here), ``remote`` (a vLLM server)."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer, where it is not that of ``model``."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "auto"
    """``float32``, ``bfloat16``, ``float16``; ``auto`` is the checkpoint's own on a GPU and float32
    on a CPU (vLLM decides for itself, a server has decided)."""
    device: str = "auto"
    """torch device of the ``hf`` backend; ``auto`` is the first GPU, or the CPU without one."""
    max_tokens: int | None = None
    """Longest input in tokens; None for the model's own limit. Longer solutions are not scored."""
    batch_tokens: int = 16384
    """Tokens in one forward pass of the ``hf`` backend, padding included."""
    url: str | None = None
    """Address of the server of the ``remote`` backend, without ``/v1``."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key; may be unset."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``vllm.LLM``, given as ``engine.NAME=JSON``."""

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from."""
        return self.tokenizer or self.model

    def identity(self) -> dict[str, Any]:
        """Return all that decides what a score means; where it is computed does not."""
        if self.backend == "remote":
            model = f"server:{self.model}"
        else:
            model = environment.model_id(self.model, self.revision)
        revision = self.revision if self.tokenizer is None else None
        engine = {
            name: value
            for name, value in self.engine.items()
            if name not in _NEUTRAL_ENGINE_ARGS and value is not None
        }
        found = {
            "model_id": model,
            "tokenizer_id": environment.model_id(self.tokenizer_source, revision),
            "protocol": self.protocol,
            "protocol_version": PROTOCOL_VERSION,
            "split": self.split,
            "backend": self.backend,
            "dtype": self.dtype,
            "max_tokens": self.max_tokens,
        }
        # Without such arguments as it was before they counted: older score files go on.
        return found | ({"engine": engine} if engine else {})

    def hash(self) -> str:
        """Return a short hash of `identity`."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def parse_spec(text: str) -> RewardSpec:
    """Read a reward model's string.

    Args:
        text: ``MODEL[,key=value...]``; the keys are the fields of `RewardSpec` except ``model``,
            and ``engine.NAME`` for an argument of ``vllm.LLM``.

    Raises:
        InputError: unknown key, protocol, split or backend, or a value that does not fit.
    """
    model, *settings = text.split(",")
    if not model or "=" in model:
        stop(f"--reward {text}: begin with the model's name or folder: MODEL[,key=value...]")
    accepted = [f.name for f in dataclasses.fields(RewardSpec) if f.name not in ("model", "engine")]
    values: dict[str, Any] = {"model": model}
    engine: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        is_engine = key.startswith("engine.")
        if not equals or not value or not (is_engine or key in accepted):
            stop(
                f"--reward {text}: {setting!r} is not accepted; accepted are key=value with one of "
                f"{', '.join(accepted)}, engine.NAME"
            )
        if is_engine:
            engine[key.removeprefix("engine.")] = _json_or_text(value)
        else:
            values[key] = value
    for key in ("max_tokens", "batch_tokens"):
        if key in values:
            values[key] = _positive(text, key, values[key])
    return _resolve(text, values, engine)


def _resolve(text: str, values: dict[str, Any], engine: dict[str, Any]) -> RewardSpec:
    base = values["model"].rstrip("/").rpartition("/")[2]
    known = _KNOWN.get(base.lower())
    if "protocol" not in values:
        if known is None:
            stop(
                f"--reward {text}: {values['model']} is not one of the published models "
                f"({', '.join(_KNOWN)}); say how it is read with protocol=, one of "
                f"{', '.join(PROTOCOLS)}"
            )
        values["protocol"] = known.protocol
    _check(text, "protocol", values["protocol"], tuple(PROTOCOLS))
    default_split = PROTOCOLS[values["protocol"]].default_split
    if known is not None and known.split is not None and known.protocol == values["protocol"]:
        default_split = known.split
    values.setdefault("split", default_split)
    _check(text, "split", values["split"], SPLITS)
    backend = values.setdefault("backend", "remote" if "url" in values else "hf")
    _check(text, "backend", backend, BACKENDS)
    if (backend == "remote") != ("url" in values):
        stop(
            f"--reward {text}: url= goes with backend=remote and only there; give "
            f"url=http://HOST:PORT{'' if backend == 'remote' else ' or leave it out'}"
        )
    if engine and backend != "vllm":
        stop(f"--reward {text}: engine.* goes with backend=vllm, not {backend}")
    if "name" not in values:
        suffix = "" if values["split"] == default_split else f"-{values['split']}"
        values["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-._") + suffix
    if not _NAME.fullmatch(values["name"]):
        stop(
            f"--reward {text}: name {values['name']!r} is not accepted; give name= of letters, "
            "digits, '.', '_' and '-'"
        )
    return RewardSpec(**values, engine=engine)


def _check(text: str, key: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        stop(f"--reward {text}: {key}={value} is not known; accepted: {', '.join(accepted)}")


def _positive(text: str, key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        stop(f"--reward {text}: {key}={value} must be a whole number above 0")
    return int(value)


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
