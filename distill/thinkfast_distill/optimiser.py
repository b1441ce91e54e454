"""AdamW over the trainable parameters: weight-decay groups, gradient norms, clipping.

No weight decay on what is not a matrix of a projection: A, D, dt_bias, norms, biases, convolutions;
nor on Mamba-1's dt_proj. Rows of in_proj that make step sizes or decays (dt) decay with in_proj.
Norms are summed in float64 over all parameters and ranks before anything is scaled, so that the
same gradients are clipped alike on one rank and on many.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from thinkfast_distill.config import StageConfig
from thinkfast_distill.distributed import World, local_tensor

_NO_DECAY = (".A_log", ".D", ".dt_bias", ".z_bias", ".x_bias", ".bias")


def has_weight_decay(name: str, ndim: int) -> bool:
    """Whether a parameter is decayed.

    Args:
        name: its qualified name.
        ndim: its number of dimensions; vectors (norms, biases, D) never decay. A matrix decays as a
            whole: in_proj with its rows of dt.
    """
    if ndim < 2 or name.endswith(_NO_DECAY):
        return False
    return not any(part in name for part in ("conv1d.", "norm.", "dt_proj."))


def group_of(name: str) -> str:
    """The part of the model a parameter is logged under: ssm, attention, mlp, norm or embedding."""
    if "norm" in name and ".mamba.norm" not in name:
        return "norm"
    if ".mixer." in name or ".mamba." in name:
        return "ssm"
    if ".self_attn." in name:
        return "attention"
    return "mlp" if ".mlp." in name else "embedding"


def named_trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that require gradients; a tied weight once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build(
    stage: StageConfig, parameters: Mapping[str, nn.Parameter], no_decay: Collection[str] = ()
) -> torch.optim.AdamW:
    """A fresh AdamW for one stage.

    Args:
        stage: its hyper-parameters.
        parameters: name -> trainable parameter; frozen ones must not be among them, because
            torch.distributed.checkpoint drops optimizer state that was never made.
        no_decay: names of further parameters without weight decay.
    """
    decayed = {
        name: p
        for name, p in parameters.items()
        if has_weight_decay(name, p.ndim) and name not in no_decay
    }
    others = [p for n, p in parameters.items() if n not in decayed]
    groups = [
        {"params": list(decayed.values()), "weight_decay": stage.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=stage.lr,
        betas=(stage.beta1, stage.beta2),
        eps=stage.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def squared_norms(parameters: Mapping[str, nn.Parameter], world: World) -> dict[str, float]:
    """Sum of squared gradients per part of the model, over all ranks.

    Args:
        parameters: name -> parameter; a parameter without gradient counts as zero.
        world: the ranks that hold shards.

    Returns:
        group -> squared norm; every group of ``parameters`` occurs, NaN and inf included.
    """
    groups = sorted({group_of(name) for name in parameters})
    sums = torch.zeros(len(groups), dtype=torch.float64, device=world.device)
    by_group: dict[str, list[torch.Tensor]] = {group: [] for group in groups}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            by_group[group_of(name)].append(local_tensor(parameter.grad))
    for i, group in enumerate(groups):
        gradients = [g for g in by_group[group] if g.numel()]
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
            sums[i] = norms.double().square().sum()
    world.sum_(sums)
    # With replicas every shard is held, and was counted, once per replica.
    return dict(zip(groups, (sums / world.replicas).tolist(), strict=True))


def clip(parameters: Iterable[nn.Parameter], total_norm: float, clip_norm: float | None) -> None:
    """Scales all gradients so that their norm is at most ``clip_norm``."""
    if clip_norm is None or total_norm <= clip_norm:
        return
    gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, clip_norm / total_norm)
