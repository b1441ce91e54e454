"""vLLM config parser that recognises published MambaInLlama and M1 folders.

vLLM asks one parser per model. Ours hands everything without a ``mamba_config.json`` on to vLLM's
own Hugging Face parser, unchanged. For names on the hub it asks the hub only about repositories
whose config.json is a Llama's or Mistral's, and only when the local cache does not know the answer.
"""

import logging
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import (
    file_exists,
    get_safetensors_metadata,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from transformers import PretrainedConfig
from vllm.transformers_utils.config import HFConfigParser
from vllm.transformers_utils.repo_utils import file_or_path_exists, get_hf_file_to_dict

from vllm_thinkfast.checkpoints.config_reader import BASE_TYPES, MAMBA_CONFIG, merge_published
from vllm_thinkfast.checkpoints.folder import read_json, tensor_names, weight_map
from vllm_thinkfast.checkpoints.key_map import CheckpointError
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

logger = logging.getLogger(__name__)

"""model_type of config.json in published MambaInLlama and M1 repositories: the base model's."""
_BIN_FILES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
# Older hub libraries raise requests' errors, which are OSErrors; so is offline mode's.
_NETWORK_ERRORS = (OSError, httpx.HTTPError, HfHubHTTPError)


class ThinkfastConfigParser(HFConfigParser):
    """Hugging Face parser plus MambaInLlama's pair of config files."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PretrainedConfig]:
        """Returns (config.json as a dict, configuration object); see ``ConfigParserBase``.

        Raises:
            ValueError: mamba_config.json is there, but cannot be read, or the folder is none of the
                known formats.
        """
        config = None
        if _has_mamba_config(model, revision):
            config = _read("config.json", model, revision)
        if config is None or config.get("model_type") == MambaInLlamaConfig.model_type:
            # A converted folder carries everything in config.json.
            parsed: tuple[dict[str, Any], PretrainedConfig] = super().parse(
                model, trust_remote_code, revision, code_revision, **kwargs
            )
            if isinstance(parsed[1], LlambaConfig | MambaInLlamaConfig) and Path(model).is_dir():
                # Raises where vLLM's reader takes the last of two equal fields.
                read_json(Path(model) / "config.json")
            return parsed
        mamba_config = _read(MAMBA_CONFIG, model, revision)
        names = _names_in_repository(model, revision)
        merged = merge_published(config, mamba_config, names, str(model))
        return merged.to_dict(), merged


def _read(name: str, model: str | Path, revision: str | None) -> dict[str, Any]:
    """A JSON file that is known to exist."""
    if Path(model).is_dir():
        return read_json(Path(model) / name)
    found: dict[str, Any] | None = get_hf_file_to_dict(name, model, revision)
    if found is None:
        raise ValueError(
            f"{model}: {name} is there but could not be fetched; check the network and the hub "
            "token, or download the repository and serve the folder."
        )
    return found


def _has_mamba_config(model: str | Path, revision: str | None) -> bool:
    """Whether a folder or hub repository has mamba_config.json."""
    if Path(model).exists():
        return (Path(model) / MAMBA_CONFIG).is_file()
    repository = str(model)
    try:
        cached = try_to_load_from_cache(repository, MAMBA_CONFIG, revision=revision)
        if cached is not None:  # a path, or the mark of a file known to be absent
            return isinstance(cached, str)
        base = get_hf_file_to_dict("config.json", repository, revision)
        if base is None or base.get("model_type") not in BASE_TYPES:
            return False
        return bool(file_exists(repository, MAMBA_CONFIG, revision=revision))
    except ValueError:  # no name of a repository: a URL or another loader's business
        return False
    except _NETWORK_ERRORS as error:
        logger.warning(
            "%s: the hub cannot be asked for %s (%s); going on as if the repository had none. If "
            "this is a MambaInLlama model, download it and serve the folder.",
            repository,
            MAMBA_CONFIG,
            type(error).__name__,
        )
        return False


def _names_in_repository(model: str | Path, revision: str | None) -> list[str]:
    """Names of the tensors of a local folder or hub repository, downloading as little as possible.

    What the cache holds comes first. safetensors headers and ``.bin`` indices are small. A single
    ``pytorch_model.bin`` has to be downloaded whole, which vLLM would do next anyway, into the same
    cache.
    """
    if Path(model).is_dir():
        return tensor_names(Path(model))
    repository = str(model)
    cached = try_to_load_from_cache(repository, MAMBA_CONFIG, revision=revision)
    if isinstance(cached, str):
        try:
            names = tensor_names(Path(cached).parent)
        except CheckpointError:  # only a part of the weights is there yet
            names = []
        if names:
            return names
    try:
        return _names_on_hub(repository, revision)
    except _NETWORK_ERRORS as error:
        raise ValueError(
            f"{repository}: the names of its weights, which tell MambaInLlama from M1, could not "
            f"be read from the hub ({type(error).__name__}); check the network, or download the "
            "repository and serve the folder."
        ) from error


def _names_on_hub(repository: str, revision: str | None) -> list[str]:
    try:
        metadata = get_safetensors_metadata(repository, revision=revision)
    except NotASafetensorsRepoError:
        pass
    else:
        return sorted(metadata.weight_map)
    for name in _BIN_FILES:
        if not file_or_path_exists(repository, name, revision):
            continue
        path = Path(hf_hub_download(repository, name, revision=revision))
        if path.suffix == ".json":
            return sorted(weight_map(path))
        return tensor_names(path.parent)
    return []
