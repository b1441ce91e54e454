"""Sums of metrics over micro-batches and ranks, and the figures a log line shows.

Stages return sums over tokens (or over matrices); this module adds them up in float64 and divides
once, so that the numbers do not depend on how a global batch was cut.
"""

import math
from collections.abc import Mapping

import torch

from thinkfast_distill.distributed import World


def add_sums(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Adds ``more`` to ``total`` in place."""
    for key, value in more.items():
        total[key] = total.get(key, 0.0) + float(value)


def sum_over_ranks(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Sums every value over the ranks, which must have the same keys."""
    keys = sorted(values)
    vector = torch.tensor([values[key] for key in keys], dtype=torch.float64)
    if world.size > 1:
        vector = world.sum_(vector.to(world.device)).cpu()
    return dict(zip(keys, vector.tolist(), strict=True))


def is_finite(values: Mapping[str, float]) -> bool:
    """Whether all values are finite."""
    return all(math.isfinite(value) for value in values.values())


def by_layer(figures: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Figures named ``<what>_<layer>`` as ``<what>_by_layer`` -> {layer: value}."""
    found: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        what, _, layer = key.rpartition("_")
        if layer.isdigit():
            found.setdefault(f"{what}_by_layer", {})[layer] = value
    return found
