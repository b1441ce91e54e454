"""Patches and hooks for engines with CUDA graphs; a part of ``compat.py``, where the rules are."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from vllm_thinkfast import compat
from vllm_thinkfast.import_hooks import when_imported

F = TypeVar("F", bound=Callable[..., Any])

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_BREAKABLE = "vllm.compilation.breakable_cudagraph"


def register_prompt_dispatch_fix(architectures: tuple[str, ...]) -> None:
    """A prompt as long as a decoding sequence's part of a step never runs in a decode graph.

    Patch: wraps ``GPUModelRunner._determine_batch_execution_and_padding`` (vLLM's V1 runner), for
    our architectures only: a step with an unfinished prompt is no uniform decode.
    Why: vLLM tells uniform decodes by the numbers of tokens alone. A step of prompts of one token,
    or of 1 + k with k drafted ones, replays the whole-decode graph, while the batch's metadata says
    prefill and does not renew the slots that the graph reads: the prompt's state is never written,
    and those of sequences of earlier steps may be (vllm-project/vllm#57720, #53051). The last token
    of a longer prompt alone would be safe since #42430, but not every accepted version has that.
    Remove when: the oldest accepted vLLM asks for more than numbers of tokens, as #53059 does, or
    has no V1 runner.
    """
    when_imported(_RUNNER, functools.partial(_look_for_prompts, architectures))


def _look_for_prompts(architectures: tuple[str, ...]) -> None:
    runner = getattr(sys.modules[_RUNNER], "GPUModelRunner", None)
    name = "_determine_batch_execution_and_padding"
    original = getattr(runner, name, None)
    if runner is None or original is None:
        compat.log_missing(
            f"GPUModelRunner.{name}",
            "prompts as short as a draft may be computed wrong under whole-decode CUDA graphs",
        )
        return
    if hasattr(original, "thinkfast_original"):
        return

    ours = frozenset(architectures)

    @functools.wraps(original)
    def determine(self: Any, *args: Any, **named: Any) -> Any:
        # Runs without requests, such as those that capture graphs, say what they are.
        is_asked = named.get("force_uniform_decode") is None
        if is_asked and not ours.isdisjoint(self.model_config.architectures):
            num_seqs = named["num_reqs"] if "num_reqs" in named else args[1]
            batch = self.input_batch
            num_done = batch.num_computed_tokens_cpu[:num_seqs]
            if (num_done < batch.num_prompt_tokens[:num_seqs]).any():
                named["force_uniform_decode"] = False
        return original(self, *args, **named)

    determine.thinkfast_original = original  # type: ignore[attr-defined]
    setattr(runner, name, determine)


def has_graphs(vllm_config: Any) -> bool:
    """Whether whole decode steps of this engine may be CUDA graphs.

    vLLM has decided it when it builds the model; on a CPU it keeps a mode that nothing reads.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    is_cuda = vllm_config.device_config.device.type == "cuda"
    return is_cuda and mode is not None and mode.has_full_cudagraphs()


def outside_of_graphs(op: F) -> F:
    """``op``, run between the pieces of a breakable CUDA graph, as vLLM's own mixers are.

    Only for VLLM_USE_BREAKABLE_CUDAGRAPH=1, where pieces are not made by the compiler at
    ``splitting_ops``: without this, a piece would hold what an op does for a dummy batch. Otherwise
    it changes nothing, and in a vLLM without such graphs it returns ``op`` itself.
    """
    if importlib.util.find_spec(_BREAKABLE) is None:
        return op
    decorate = getattr(importlib.import_module(_BREAKABLE), "eager_break_during_capture", None)
    if decorate is None:
        compat.log_missing(
            "eager_break_during_capture", "VLLM_USE_BREAKABLE_CUDAGRAPH=1 would give wrong texts"
        )
        return op
    decorated: F = decorate(op)
    return decorated
