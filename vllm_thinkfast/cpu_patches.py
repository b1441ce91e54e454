"""Patches for engines on CPUs; a part of ``compat.py``, where the rules for patches are."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from vllm_thinkfast import compat
from vllm_thinkfast.import_hooks import when_imported

if TYPE_CHECKING:
    import torch

_DISPATCHER = "vllm.triton_utils.dispatcher"
_LLVMLITE = "llvmlite.binding.ffi"
_KERNELS = "vllm.utils.cpu_triton_utils"


def register_llvmlite_fix() -> None:
    """An engine can start in a process that has imported numba.

    Patch: wraps ``register_kernels`` of vLLM's Triton dispatcher, for every model; while it runs,
    the module ``llvmlite.binding.ffi`` is not in ``sys.modules``.
    Why: on CPU vLLM looks into the ``__dict__`` of everything that any module holds, when an engine
    starts. llvmlite's ``lib`` answers every attribute, ``__dict__`` too, with a wrapped function:
    "'_lib_fn_wrapper' object has no attribute 'get'" (vLLM 0.32 ``triton_utils/dispatcher.py``).
    Our kernels are compiled by numba, which imports llvmlite, while the first model is built; so
    the second engine of a process could not start, as after vLLM's own n-gram drafts.
    Remove when: vLLM reads instance dictionaries that are none with care.
    """
    when_imported(_DISPATCHER, _hide_llvmlite)


def _hide_llvmlite() -> None:
    dispatcher = sys.modules[_DISPATCHER]
    original = getattr(dispatcher, "register_kernels", None)
    if original is None:
        compat.log_missing(
            "register_kernels", "a second engine in a process with numba may fail to start"
        )
        return
    if hasattr(original, "thinkfast_original"):
        return

    @functools.wraps(original)
    def register_kernels(*args: Any, **named: Any) -> Any:
        hidden = sys.modules.pop(_LLVMLITE, None)
        try:
            return original(*args, **named)
        finally:
            if hidden is not None:
                sys.modules[_LLVMLITE] = hidden

    register_kernels.thinkfast_original = original  # type: ignore[attr-defined]
    dispatcher.register_kernels = register_kernels  # type: ignore[attr-defined]


def register_draft_sampling_fix() -> None:
    """Requests with a temperature get tokens of their own distribution when there are drafts.

    Patch: replaces ``_expand_kernel_impl`` of vLLM's CPU kernels, for every model.
    Why: it hands temperature, top_k and top_p of each request on to the request's drafted tokens.
    vLLM 0.32 writes them to a converted copy of the result, so that logits are divided by whatever
    the memory held: texts of no sense for every sampled request, with drafts of any kind
    (https://github.com/vllm-project/vllm/issues/55005). Greedy requests do not need it.
    Remove when: pull request 55006, or another mend of that issue, is in the oldest vLLM that
    drafts (``compat.FIRST_WITH_DRAFTS``).
    """
    when_imported(_KERNELS, _replace_expand_kernel)


def _replace_expand_kernel() -> None:
    kernels = sys.modules[_KERNELS]
    # Where it is missing, vLLM came to do without it.
    if hasattr(kernels, "_expand_kernel_impl"):
        kernels._expand_kernel_impl = expand_to_tokens  # type: ignore[attr-defined]


def expand_to_tokens(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeats each request's value for its tokens.

    Args:
        output: [tokens], of the values' dtype; written.
        values: [requests], of any dtype.
        cu_num_tokens: [requests], integer: ends of the requests in the tokens.
        replace_from: a value that stands for another.
        replace_to: the other.
        MAX_NUM_TOKENS: unused; vLLM's kernels for GPUs need it.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(counts))
