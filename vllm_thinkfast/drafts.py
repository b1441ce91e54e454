"""Speculative decoding: what vLLM's scheduler must not do to sequences with recurrent states."""

import functools
from typing import Any

from vllm_thinkfast.import_hooks import when_imported


def register_draft_padding(architectures: tuple[str, ...]) -> None:
    """A new request with one token to compute is not filled up to the length of a draft.

    Patch: wraps ``Scheduler.__init__``, for our architectures with drafts only: it gives the
    scheduler the table of draft lengths by batch size that a user could configure, with the one
    configured length for every size. With a table vLLM does not fill up.
    Why: vLLM adds placeholders for the sake of equal lengths in a batch (vLLM 0.32
    ``v1/core/sched/scheduler.py``). Where the token is a whole prompt, mixers get token and
    placeholders as a prompt, and only the state after all of them is kept. The option itself,
    ``num_speculative_tokens_per_batch_size``, is not used: vLLM drops it in data parallelism and
    gives up whole CUDA graphs for it.
    Remove when: vLLM fills up only sequences that have a state already.
    """
    when_imported(
        "vllm.v1.core.sched.scheduler", functools.partial(_leave_single_tokens, architectures)
    )


def _leave_single_tokens(architectures: tuple[str, ...]) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.__init__
    if hasattr(original, "thinkfast_original"):
        return

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        num_drafted = getattr(self, "num_spec_tokens", 0)
        is_ours = self.vllm_config.model_config.architecture in architectures
        if is_ours and num_drafted and getattr(self, "dynamic_sd_lookup", ()) is None:
            sizes = self.scheduler_config.max_num_seqs + 1  # the first one is unused
            self.dynamic_sd_lookup = [num_drafted] * sizes

    initialise.thinkfast_original = original  # type: ignore[attr-defined]
    Scheduler.__init__ = initialise
