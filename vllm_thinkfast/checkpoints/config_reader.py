"""From the files of a local folder to a configuration object.

The one place that decides what a folder is; ``plugin.py`` uses it for vLLM, ``convert`` and
``state-size`` for the command line.
"""

import logging
from pathlib import Path
from typing import Any

from vllm_thinkfast.checkpoints.folder import read_json, tensor_names
from vllm_thinkfast.checkpoints.key_map import CheckpointError
from vllm_thinkfast.checkpoints.mamba_in_llama import layout_of
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig
from vllm_thinkfast.configs.fields import shown
from vllm_thinkfast.configs.mamba_in_llama import WeightLayout

logger = logging.getLogger(__name__)

MAMBA_CONFIG = "mamba_config.json"
Config = LlambaConfig | MambaInLlamaConfig

BASE_TYPES: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
"""What a base model's config.json means by leaving a field out (transformers' config classes)."""


def read_config(folder: Path) -> Config:
    """Reads the configuration of a Llamba or MambaInLlama folder, published or converted.

    Args:
        folder: a local folder with config.json.

    Raises:
        CheckpointError: no such folder, or not one of the architectures served here.
        ValueError: a field that is impossible or unknown.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json; expected a Llamba or MambaInLlama checkpoint folder."
        )
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type == LlambaConfig.model_type:
        llamba: LlambaConfig = LlambaConfig.from_dict(config)
        return llamba
    if model_type == MambaInLlamaConfig.model_type:
        hybrid: MambaInLlamaConfig = MambaInLlamaConfig.from_dict(config)
        return hybrid
    if (folder / MAMBA_CONFIG).is_file():
        mamba_config = read_json(folder / MAMBA_CONFIG)
        return merge_published(config, mamba_config, tensor_names(folder), str(folder))
    raise CheckpointError(
        f"{folder}: model_type={shown(model_type)} without {MAMBA_CONFIG}; accepted: a Llamba "
        'folder (model_type "llamba"), a MambaInLlama or M1 folder (config.json with '
        "mamba_config.json beside it), or a folder written by `thinkfast convert`."
    )


def merge_published(
    config: dict[str, Any], mamba_config: dict[str, Any], names: list[str], source: str
) -> MambaInLlamaConfig:
    """Merges a published MambaInLlama or M1 pair of files.

    Args:
        config: config.json.
        mamba_config: mamba_config.json.
        names: names of the tensors in the folder; empty if it has no weights.
        source: the folder or repository, for messages.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BASE_TYPES:
        raise CheckpointError(
            f"{source}: config.json: model_type={shown(model_type)} beside {MAMBA_CONFIG}; "
            f"accepted: {', '.join(map(repr, BASE_TYPES))}, the base model's."
        )
    for required in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ):
        if not isinstance(config.get(required), int):
            raise CheckpointError(
                f"{source}: config.json: {required}={shown(config.get(required))} must be an "
                "integer."
            )
    # Base configurations state only what differs from their class's default.
    defaults = BASE_TYPES[model_type]
    # null means the default: old versions of transformers wrote it for fields they did not know.
    # Only a window's null has a meaning of its own: there is none.
    stated = {
        key: value for key, value in config.items() if value is not None or key == "sliding_window"
    }
    merged = {**defaults, **stated}
    return MambaInLlamaConfig.from_published(
        merged, mamba_config, _layout(mamba_config, names, source)
    )


def _layout(mamba_config: dict[str, Any], names: list[str], source: str) -> WeightLayout:
    if names:
        return layout_of(names, source)
    ssm_cfg = mamba_config.get("ssm_cfg")
    if isinstance(ssm_cfg, dict) and "ngroups" in ssm_cfg:
        return "mambainllama_mamba2"
    logger.warning(
        "%s has no weights: MambaInLlama Mamba-1 and M1 share their config files, and only the "
        "names of the weights say whether rope_scaling applies. Assuming MambaInLlama Mamba-1; "
        "with --load-format dummy this makes no difference to speed or memory.",
        source,
    )
    return "mambainllama_mamba1"
