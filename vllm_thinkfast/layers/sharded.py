"""Parameters that are split over tensor-parallel ranks in pieces."""

from collections.abc import Sequence

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.utils import set_weight_attrs


def load_sharded(
    param: torch.Tensor, loaded: torch.Tensor, pieces: Sequence[int] | None = None
) -> None:
    """Copies this rank's rows of ``loaded`` into ``param``.

    Args:
        param: [rows / ranks, ...], the destination.
        loaded: [rows, ...], the full tensor; cast to the parameter's dtype.
        pieces: rows of independently split pieces, in order; default: one piece.
    """
    rank = get_tensor_model_parallel_rank()
    size = get_tensor_model_parallel_world_size()
    parts = loaded.split(list(pieces or [loaded.shape[0]]))
    mine = [part.narrow(0, rank * (len(part) // size), len(part) // size) for part in parts]
    param.data.copy_(torch.cat(mine))


def sharded_parameter(
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    pieces: Sequence[int] | None = None,
) -> nn.Parameter:
    """A parameter split by rows over the tensor-parallel ranks.

    Args:
        shape: of the full tensor.
        dtype: default: torch's current default, which vLLM sets to the model's.
        pieces: rows of independently split pieces.
    """
    rows, *rest = shape
    local = rows // get_tensor_model_parallel_world_size()
    param = nn.Parameter(torch.empty(local, *rest, dtype=dtype), requires_grad=False)

    def loader(param: torch.Tensor, loaded: torch.Tensor) -> None:
        load_sharded(param, loaded, pieces)

    set_weight_attrs(param, {"weight_loader": loader})
    return param


def negative_exp_parameter(shape: Sequence[int]) -> nn.Parameter:
    """A = -exp(A_log) in float32, loaded from ``A_log`` of any dtype."""
    param = sharded_parameter(shape, dtype=torch.float32)

    def loader(param: torch.Tensor, loaded: torch.Tensor) -> None:
        load_sharded(param, -torch.exp(loaded.float()))

    param.weight_loader = loader  # type: ignore[attr-defined]
    return param


class ShortConv(nn.Module):
    """Weights of a short depth-wise convolution, [C, 1, K] as published; no forward of its own."""

    def __init__(self, pieces: Sequence[int], conv_kernel: int, *, has_bias: bool) -> None:
        """Allocates the weights.

        Args:
            pieces: channels of independently split pieces (x, B and C).
            conv_kernel: taps K.
            has_bias: whether there is a bias.
        """
        super().__init__()
        self.weight = sharded_parameter((sum(pieces), 1, conv_kernel), pieces=pieces)
        self.bias = sharded_parameter((sum(pieces),), pieces=pieces) if has_bias else None

    @property
    def taps(self) -> torch.Tensor:
        """[C, K] of this rank."""
        return self.weight[:, 0]
