"""From the house's tensors to vLLM's parameters: fused projections and pipeline stages."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_thinkfast.checkpoints.mamba_in_llama import in_proj_rows
from vllm_thinkfast.checkpoints.reader import Config, house_tensors

# (part of the house's name, vLLM's fused parameter, shard)
_FUSED: tuple[tuple[str, str, str | int], ...] = (
    (".self_attn.q_proj.", ".self_attn.qkv_proj.", "q"),
    (".self_attn.k_proj.", ".self_attn.qkv_proj.", "k"),
    (".self_attn.v_proj.", ".self_attn.qkv_proj.", "v"),
    (".mlp.gate_proj.", ".mlp.gate_up_proj.", 0),
    (".mlp.up_proj.", ".mlp.gate_up_proj.", 1),
)

_POOLING_HEAD = "score."
"""Prefix of the linear layer that vLLM adds for classification and process rewards."""


def load_house_tensors(
    model: nn.Module,
    config: Config,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    source: str,
    is_quantised: bool,
) -> set[str]:
    """Fills a model from the tensors of a folder.

    Args:
        model: a ForCausalLM of this package.
        config: its configuration.
        weights: (published name, tensor).
        source: the folder, for messages.
        is_quantised: see ``checkpoints.reader.house_tensors``.

    Returns:
        names of the parameters that were filled.

    Raises:
        CheckpointError: the tensors do not match the configuration.
        ValueError: a quantised tensor that this model has no place for.
    """
    params = dict(model.named_parameters())
    loaded: set[str] = set()

    def house_only() -> Iterable[tuple[str, torch.Tensor]]:
        """Fills the head that vLLM puts on a pooling model, and passes everything else on."""
        for name, tensor in weights:
            if name.startswith(_POOLING_HEAD) and name in params:
                param = params[name]
                getattr(param, "weight_loader", default_weight_loader)(param, tensor)
                loaded.add(name)
            else:
                yield name, tensor

    weights_left = house_only()
    for name, tensor in house_tensors(
        config, weights_left, source=source, is_quantised=is_quantised
    ):
        for target, shard, part in _targets(config, name, tensor, source):
            if target not in params:
                if is_pp_missing_parameter(target, model):
                    continue
                raise ValueError(
                    f"{source}: {name} has no parameter {target} in this model; a checkpoint "
                    "quantised with an unsupported method, or of another architecture."
                )
            param = params[target]
            loader = getattr(param, "weight_loader", default_weight_loader)
            if shard is None:
                loader(param, part)
            else:
                loader(param, part, shard)
            loaded.add(target)
    return loaded


def _targets(
    config: Config, name: str, tensor: torch.Tensor, source: str
) -> Iterable[tuple[str, str | int | None, torch.Tensor]]:
    """(vLLM parameter, shard, tensor) for a house tensor."""
    for part, fused, shard in _FUSED:
        if part in name:
            yield name.replace(part, fused), shard, tensor
            return
    if name.endswith(".A_log"):
        # vLLM's convention: the parameter is A = -exp(A_log), computed when loading.
        yield name.removesuffix("A_log") + "A", None, tensor
    elif ".mamba.in_proj." in name and getattr(config, "mamba_version", "") == "mamba1":
        # Rows [z | x | B | C] are split over ranks, the dt rows are needed whole on each. The
        # scales of quantised rows go the same way; one scale for all rows is that of both layers.
        num_rows, rank = sum(in_proj_rows(config).values()), config.time_step_rank
        if tensor.numel() == 1:
            rest = dt = tensor
        elif tensor.dim() and tensor.shape[0] == num_rows:
            rest, dt = tensor[:-rank], tensor[-rank:]
        else:
            raise ValueError(
                f"{source}: {name} of shape {tuple(tensor.shape)} cannot be split into in_proj and "
                f"dt_in_proj; accepted are tensors with the {num_rows} rows of in_proj first, and "
                "single scales. Quantise it per row or per tensor, such as int8 with "
                "compressed-tensors."
            )
        yield name, None, rest
        yield name.replace(".in_proj.", ".dt_in_proj."), None, dt
    else:
        yield name, None, tensor
