"""Prometheus metrics of the memory that sequences need, beside vLLM's own on ``/metrics``.

vLLM shows which part of its cache is in use, but not what a sequence costs, which for these models
does not depend on its length. Found by vLLM through the entry point group
``vllm.stat_logger_plugins``; for other models it does nothing.

==========================================  =====================================================
metric                                      value
==========================================  =====================================================
thinkfast:conv_state_bytes_per_sequence     convolution states of a sequence, bytes
thinkfast:ssm_state_bytes_per_sequence      recurrent states of a sequence with scales, bytes
thinkfast:kv_bytes_per_token                keys and values of a token, bytes; 0 for Llamba
thinkfast:running_state_bytes               states of the running sequences, bytes
==========================================  =====================================================

All are for one tensor-parallel rank and all pipeline stages, before vLLM's paging.
"""

import functools
from typing import Any

from prometheus_client import Gauge
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig
from vllm_thinkfast.state_cache import BytesPerSequence, bytes_per_sequence, state_dtypes

_LABELS = ("model_name", "engine")
_GAUGES = {
    "thinkfast:conv_state_bytes_per_sequence": "Convolution states of a sequence, bytes.",
    "thinkfast:ssm_state_bytes_per_sequence": "Recurrent states of a sequence, bytes.",
    "thinkfast:kv_bytes_per_token": "Keys and values of a token, bytes.",
    "thinkfast:running_state_bytes": "States of the running sequences, bytes.",
}


class StateMemoryLogger(StatLoggerBase):
    """Gauges of one engine."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        """vLLM's constructor signature."""
        self._sizes = _engine_bytes_per_sequence(vllm_config)
        if self._sizes is None:
            return
        names = vllm_config.model_config.served_model_name
        labels = (names[0] if isinstance(names, list) else names, str(engine_index))
        self._gauges = {name: _gauge(name).labels(*labels) for name in _GAUGES}
        self._set("conv_state_bytes_per_sequence", self._sizes.conv_bytes)
        self._set("ssm_state_bytes_per_sequence", self._sizes.ssm_bytes)
        self._set("kv_bytes_per_token", self._sizes.kv_bytes_per_token)
        self._set("running_state_bytes", 0)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step."""
        if self._sizes is not None and scheduler_stats is not None:
            state_bytes = self._sizes.conv_bytes + self._sizes.ssm_bytes
            self._set("running_state_bytes", scheduler_stats.num_running_reqs * state_bytes)

    def log_engine_initialized(self) -> None:
        """Nothing to add to vLLM's own lines."""

    def _set(self, name: str, value: int) -> None:
        self._gauges[f"thinkfast:{name}"].set(value)


def _engine_bytes_per_sequence(vllm_config: Any) -> BytesPerSequence | None:
    """What a sequence costs with an engine's settings; None for models that are not ours.

    Of keys and values in the quantised formats of ``--kv-cache-dtype`` that have scales or packed
    values, the scales are left out and a value counts as a whole byte.
    """
    model_config = vllm_config.model_config
    config = model_config.hf_config
    if not isinstance(config, LlambaConfig | MambaInLlamaConfig):
        return None
    conv_dtype, ssm_dtype = state_dtypes(vllm_config)[:2]
    one = bytes_per_sequence(
        config,
        # The convolution's dtype is given, so this one is of keys and values only.
        dtype=kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model_config),
        conv_dtype=conv_dtype,
        ssm_dtype=ssm_dtype,
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
    )
    # Speculative decoding keeps the states after each of the drafted tokens.
    num_states = 1 + vllm_config.num_speculative_tokens
    return BytesPerSequence(
        conv_bytes=num_states * one.conv_bytes,
        ssm_bytes=num_states * one.ssm_bytes,
        kv_bytes_per_token=one.kv_bytes_per_token,
    )


@functools.cache
def _gauge(name: str) -> Gauge:
    """The gauge of a name, one for all engines of this process."""
    return Gauge(name, _GAUGES[name], labelnames=_LABELS, multiprocess_mode="mostrecent")
