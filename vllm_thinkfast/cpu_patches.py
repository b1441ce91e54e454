"""Patches that our CPU kernels need; a part of ``compat.py``, where the rules for patches are."""

import functools
import sys
from typing import Any

from vllm_thinkfast import compat
from vllm_thinkfast.import_hooks import when_imported

_DISPATCHER = "vllm.triton_utils.dispatcher"
_LLVMLITE = "llvmlite.binding.ffi"


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
