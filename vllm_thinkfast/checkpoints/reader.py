"""One door for everything that reads weights: vLLM's loader, ``thinkfast convert``, the trainer."""

from collections.abc import Iterable, Iterator

import torch

from vllm_thinkfast.checkpoints import llamba, mamba_in_llama
from vllm_thinkfast.checkpoints.key_map import Rule, Shape, read_tensors
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

Config = LlambaConfig | MambaInLlamaConfig

_QUANTISATION_SUFFIXES = (
    "_scale",
    "_scale_inv",
    "_zero_point",
    "_g_idx",
    "_packed",
    "_shape",
    "_global_scale",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
)


def house_shapes(config: Config) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, under the house's names."""
    if isinstance(config, LlambaConfig):
        return llamba.house_shapes(config)
    return mamba_in_llama.house_shapes(config)


def key_map(config: Config) -> list[Rule]:
    """The key map of the folder's layout (``config.weight_layout``)."""
    if isinstance(config, LlambaConfig):
        return llamba.rules(config)
    return mamba_in_llama.rules(config)


def house_tensors(
    config: Config,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    source: str,
    is_quantised: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the model's tensors under the house's names, complete and checked.

    Args:
        config: the folder's configuration.
        tensors: (published name, tensor) as found in the weight files.
        source: the folder, for messages.
        is_quantised: whether the weights are packed by a quantisation method, which adds scales
            and changes shapes.

    Yields:
        (house name, tensor). A tied head is compared with the embedding and not yielded.

    Raises:
        CheckpointError: the tensors do not match the configuration.
    """
    if isinstance(config, LlambaConfig) and config.weight_layout == "llamba":
        tensors = ((llamba.canonical_name(name), tensor) for name, tensor in tensors)
    tied = ("lm_head.weight", "model.embed_tokens.weight") if config.tie_word_embeddings else None
    yield from read_tensors(
        key_map(config),
        house_shapes(config),
        tensors,
        source=source,
        tied=tied,
        pass_through=_QUANTISATION_SUFFIXES if is_quantised else (),
    )
