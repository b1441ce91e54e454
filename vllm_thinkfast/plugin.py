"""Entry point of the vLLM plugin (group ``vllm.general_plugins``, name ``thinkfast``).

vLLM calls ``register`` in every process, some of them several times, before it knows which model it
will serve. So everything here is a table of strings: nothing of vLLM or transformers is imported,
what is to be registered there is registered when they are (``import_hooks``), and a second call
changes nothing. An exception raised here stops vLLM, which is wanted: a plugin that failed to
register would show up as "architecture not supported" much later.
"""

import logging

logger = logging.getLogger(__name__)

ARCHITECTURES: tuple[tuple[str, str], ...] = (
    ("LlambaForCausalLM", "vllm_thinkfast.models.llamba:LlambaForCausalLM"),
    ("MambaInLlamaForCausalLM", "vllm_thinkfast.models.mamba_in_llama:MambaInLlamaForCausalLM"),
    # Names that published folders carry.
    ("LlambaLMHeadModel", "vllm_thinkfast.models.llamba:LlambaForCausalLM"),
)
"""(architecture in config.json, "module:Class")."""

ATTENTION_FREE = ("LlambaForCausalLM", "LlambaLMHeadModel")

_registered = False


def register() -> None:
    """Registers config classes, the config parser and the models with transformers and vLLM.

    Raises:
        RuntimeError: vLLM is older than the accepted range.
    """
    global _registered
    if _registered:
        return
    from vllm_thinkfast import compat, cpu_patches, cuda_patches, scheduler_patches
    from vllm_thinkfast.import_hooks import when_imported

    _check_version()
    when_imported("transformers.models.auto.configuration_auto", _register_configs)
    when_imported("vllm.model_executor.models.registry", _register_models)
    compat.register_config_parser()
    architectures = tuple(name for name, _ in ARCHITECTURES)
    compat.register_model_defaults(architectures, ATTENTION_FREE)
    compat.register_fork(architectures, ATTENTION_FREE)
    compat.register_token_id_check(architectures)
    scheduler_patches.register_scheduler_patches(architectures)
    compat.register_memory_message(architectures)
    compat.register_cpu_seed_fix()
    cuda_patches.register_prompt_dispatch_fix(architectures)
    cpu_patches.register_llvmlite_fix()
    cpu_patches.register_draft_sampling_fix()
    _registered = True


def _register_configs() -> None:
    from transformers import AutoConfig

    from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

    for config_class in (LlambaConfig, MambaInLlamaConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_models() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture, target in ARCHITECTURES:
        ModelRegistry.register_model(architecture, target)


def _check_version() -> None:
    from vllm_thinkfast import compat

    distribution = compat.vllm_distribution()
    if distribution is None:  # a source build without metadata: nothing to compare
        return
    name, version = distribution
    if compat.is_too_old(version):
        raise RuntimeError(
            f"vllm-thinkfast needs vLLM {compat.OLDEST_VLLM} or newer, found {name} {version}; "
            f'install one with: pip install "{name}>={compat.OLDEST_VLLM}"'
        )
    if compat.is_newer_than_tested(version):
        logger.warning(
            "vllm-thinkfast was tested with vLLM %s; %s %s is newer.",
            ", ".join(compat.TESTED_VLLM),
            name,
            version,
        )
