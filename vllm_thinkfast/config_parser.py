"""vLLM config parser that recognises published MambaInLlama and M1 folders.

vLLM asks one parser per model. Ours hands everything without a ``mamba_config.json`` on to vLLM's
own Hugging Face parser, unchanged.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, hf_hub_download
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import PretrainedConfig
from vllm.transformers_utils.config import HFConfigParser
from vllm.transformers_utils.repo_utils import file_or_path_exists, get_hf_file_to_dict

from vllm_thinkfast.checkpoints.config_reader import MAMBA_CONFIG, merge_published
from vllm_thinkfast.checkpoints.folder import read_json, tensor_names
from vllm_thinkfast.configs import MambaInLlamaConfig

_BIN_FILES = ("pytorch_model.bin.index.json", "pytorch_model.bin")


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
            ValueError: mamba_config.json is there, but the folder is none of the known formats.
        """
        if not file_or_path_exists(model, MAMBA_CONFIG, revision):
            return super().parse(  # type: ignore[no-any-return]
                model, trust_remote_code, revision, code_revision, **kwargs
            )
        config = get_hf_file_to_dict("config.json", model, revision)
        if config is None or config.get("model_type") == MambaInLlamaConfig.model_type:
            # A converted folder carries everything in config.json.
            return super().parse(  # type: ignore[no-any-return]
                model, trust_remote_code, revision, code_revision, **kwargs
            )
        mamba_config = get_hf_file_to_dict(MAMBA_CONFIG, model, revision)
        if mamba_config is None:
            mamba_config = {}
        merged = merge_published(
            config, mamba_config, _names_in_repository(model, revision), str(model)
        )
        return merged.to_dict(), merged


def _names_in_repository(model: str | Path, revision: str | None) -> list[str]:
    """Names of the tensors of a local folder or hub repository, downloading as little as possible.

    safetensors headers and ``.bin`` indices are small. A single ``pytorch_model.bin`` has to be
    downloaded whole, which vLLM would do next anyway, into the same cache.
    """
    if Path(model).is_dir():
        return tensor_names(Path(model))
    try:
        metadata = get_safetensors_metadata(str(model), revision=revision)
    except NotASafetensorsRepoError:
        pass
    else:
        return sorted(metadata.weight_map)
    for name in _BIN_FILES:
        if not file_or_path_exists(model, name, revision):
            continue
        path = Path(hf_hub_download(str(model), name, revision=revision))
        if path.suffix == ".json":
            return sorted(read_json(path).get("weight_map", {}))
        return tensor_names(path.parent)
    return []
