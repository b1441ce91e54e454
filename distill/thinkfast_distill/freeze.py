"""The freeze table: which parts of the student a stage trains, printed before it starts.

Toggling ``requires_grad`` is easy to get wrong and hard to see in a loss curve, so it is shown.
"""

from collections.abc import Iterable

from torch import nn

from thinkfast_distill.costs import PARTS, part_of


def freeze_table(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Lines of a table with trained and frozen parameters per part.

    Args:
        parameters: (name, parameter); ``requires_grad`` decides.
    """
    return freeze_lines((name, p.numel(), p.requires_grad) for name, p in parameters)


def freeze_lines(counts: Iterable[tuple[str, int, bool]]) -> list[str]:
    """The same from (name, number of elements, whether it is trained)."""
    trained = dict.fromkeys(PARTS, 0)
    frozen = dict.fromkeys(PARTS, 0)
    for name, count, is_trained in counts:
        (trained if is_trained else frozen)[part_of(name)] += count
    present = [part for part in PARTS if trained[part] or frozen[part]]
    lines = [f"{'part':<10} {'trained':>16} {'frozen':>16}"]
    lines += [f"{part:<10} {trained[part]:>16,} {frozen[part]:>16,}" for part in present]
    total = f"{'all':<10} {sum(trained.values()):>16,} {sum(frozen.values()):>16,}"
    return [*lines, total]
