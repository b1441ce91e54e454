"""Patches of vLLM's scheduler; a part of ``compat.py``, where the rules for patches are."""

import functools
import sys
from typing import Any

from vllm_thinkfast import compat
from vllm_thinkfast.import_hooks import when_imported

_SCHEDULER = "vllm.v1.core.sched.scheduler"


def register_scheduler_patches(architectures: tuple[str, ...]) -> None:
    """Registers the patch below, for our architectures only."""
    when_imported(_SCHEDULER, functools.partial(_leave_single_tokens, architectures))


def _leave_single_tokens(architectures: tuple[str, ...]) -> None:
    """A new request with one token to compute is not filled up to the length of a draft.

    Patch: wraps ``Scheduler.__init__``. With drafts it gives the scheduler the table of draft
    lengths by batch size that a user could configure, with the one configured length for every
    size. With a table vLLM does not fill up.
    Why: vLLM adds placeholders for the sake of equal lengths in a batch (vLLM 0.32
    ``v1/core/sched/scheduler.py``). Where the token is a whole prompt, mixers get token and
    placeholders as a prompt, and only the state after all of them is kept. The option itself,
    ``num_speculative_tokens_per_batch_size``, is not used: vLLM drops it in data parallelism and
    gives up whole CUDA graphs for it.
    Remove when: vLLM fills up only sequences that have a state already.
    """
    scheduler: Any = getattr(sys.modules[_SCHEDULER], "Scheduler", None)
    consequence = "with drafts, text after a prompt of one token may be wrong"
    if scheduler is None:
        compat.log_missing("Scheduler", consequence)
        return
    original = scheduler.__init__
    if hasattr(original, "thinkfast_original"):
        return

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        num_drafted = getattr(self, "num_spec_tokens", 0)
        if not num_drafted or self.vllm_config.model_config.architecture not in architectures:
            return
        if not hasattr(self, "dynamic_sd_lookup"):
            compat.log_missing("Scheduler.dynamic_sd_lookup", consequence)
        elif self.dynamic_sd_lookup is None:
            sizes = self.scheduler_config.max_num_seqs + 1  # the first one is unused
            self.dynamic_sd_lookup = [num_drafted] * sizes

    initialise.thinkfast_original = original  # type: ignore[attr-defined]
    scheduler.__init__ = initialise
