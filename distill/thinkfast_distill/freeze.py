"""The freeze table: which parts of the student a stage trains, printed before it starts.

Toggling ``requires_grad`` is easy to get wrong and hard to see in a loss curve, so it is shown.
"""

from collections.abc import Collection, Iterable

from torch import nn

from thinkfast_distill.costs import PARTS, part_of
from thinkfast_distill.optimiser import has_weight_decay


def freeze_table(
    parameters: Iterable[tuple[str, nn.Parameter]],
    trained: Collection[str],
    no_decay: Collection[str],
) -> list[str]:
    """Lines of a table: trained and frozen parameters per part, and those under weight decay.

    Args:
        parameters: (name, parameter) of the whole student; shards and meta tensors count in full.
        trained: names of those that move.
        no_decay: names that the stage exempts from weight decay, besides those that never have it
            (``optimiser.has_weight_decay``).
    """
    counts = {part: [0, 0, 0] for part in PARTS}
    for name, parameter in parameters:
        count, row = parameter.numel(), counts[part_of(name)]
        if name not in trained:
            row[1] += count
            continue
        row[0] += count
        if has_weight_decay(name, parameter.ndim) and name not in no_decay:
            row[2] += count
    rows = [(part, row) for part, row in counts.items() if any(row)]
    rows.append(("all", [sum(row[i] for row in counts.values()) for i in range(3)]))
    lines = [f"{'part':<10} {'trained':>16} {'frozen':>16} {'weight decay':>16}"]
    return lines + [f"{part:<10} {a:>16,} {b:>16,} {c:>16,}" for part, (a, b, c) in rows]
