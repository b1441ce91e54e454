"""Ranks: starting under torchrun, summing over ranks, and FSDP2 sharding.

With one process nothing here touches ``torch.distributed``. With several, parameters are sharded by
``fully_shard`` and gradients are summed, not averaged: every stage divides by the targets of the
global batch itself.

Stages call single layers and other methods of the student, not its ``forward``; those methods are
registered with FSDP2, which would otherwise not gather the parameters they use. Parameters are
gathered in float32 and lower precision comes from autocast, because a mixed-precision policy would
also round A, D and dt.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from thinkfast_distill.config import ComputeConfig
from thinkfast_distill.recipe import RecipeError


@dataclass
class World:
    """The processes of this run, seen from one of them."""

    rank: int = 0
    """Index of this process."""

    size: int = 1
    """Number of processes."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of this process."""

    replicas: int = 1
    """Groups of ranks that each hold all shards."""

    mesh: Any = None
    """Device mesh for FSDP2; None with one process."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()


def start(compute: ComputeConfig) -> World:
    """Joins the process group that torchrun describes, or runs alone.

    Raises:
        RecipeError: a device that is not there, or replicas that do not divide the ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    has_cuda = torch.cuda.is_available()
    if compute.device == "cuda" and not has_cuda:
        raise RecipeError(
            "compute.device: 'cuda', but torch finds no CUDA device; use cpu or auto."
        )
    use_cuda = has_cuda and compute.device != "cpu"
    device = torch.device("cpu")
    if use_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size % compute.replicas:
        raise RecipeError(
            f"compute.replicas: {compute.replicas} must divide the number of ranks, {size}."
        )
    if size == 1:
        return World(device=device)
    if not dist.is_initialized():
        dist.init_process_group("cuda:nccl,cpu:gloo" if use_cuda else "gloo")
    shape = (compute.replicas, size // compute.replicas)
    names = ("replicate", "shard")
    mesh = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)
    if compute.replicas == 1:
        mesh = mesh["shard"]
    return World(rank, size, device, compute.replicas, mesh)


def stop(world: World) -> None:
    """Leaves the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], methods: Sequence[str], world: World
) -> None:
    """Shards a model with FSDP2: one group per block, one for the rest.

    Embedding, final norm and head stay in one group: they may share weights.

    Args:
        model: sharded in place; nothing happens with one process.
        blocks: modules whose parameters are gathered and freed together.
        methods: methods of the model that use its parameters, besides ``forward``.
        world: the ranks.
    """
    if world.size == 1:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    for block in blocks:
        fully_shard(block, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    for method in methods:
        if hasattr(model, method):
            setattr(model, method, _without_parameters(getattr(model, method)))
            register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums instead of means. Without the flag FSDP2 would use an operation that only NCCL
            # has.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


class _Alias(torch.autograd.Function):
    """The same values as a tensor of the graph, without a copy."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _without_parameters(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with an alias where it returns a parameter.

    FSDP2 registers a hook on what a forward method returns. Those of a parameter would stay on it:
    one more in every micro-batch, for the whole run.
    """

    @functools.wraps(method)
    def wrapped(*args: Any, **options: Any) -> Any:
        found = method(*args, **options)
        is_parameter = isinstance(found, nn.Parameter)
        return _Alias.apply(found) if is_parameter else found  # type: ignore[no-untyped-call]

    return wrapped
