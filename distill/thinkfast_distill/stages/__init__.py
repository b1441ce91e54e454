"""Objectives: what each kind of stage trains, and towards what.

A stage computes loss and gradient of a micro-batch in one call (``backward``), because the first
two kinds run a backward pass per layer, so that memory does not grow with depth. Optimizer, data
and ranks belong to the loop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from thinkfast_distill.config import StageConfig
from thinkfast_distill.stages.base import Stage
from thinkfast_distill.stages.end_to_end import EndToEnd
from thinkfast_distill.stages.hidden_state import HiddenState
from thinkfast_distill.stages.matrix_mixing import MatrixMixing
from thinkfast_distill.stages.text import Pretrain, Sft

STAGES: dict[str, type[Stage]] = {
    stage.kind: stage for stage in (Pretrain, MatrixMixing, HiddenState, EndToEnd, Sft)
}
"""Kind, as recipes write it -> class."""

__all__ = ["STAGES", "EndToEnd", "Stage", "build", "normalised"]


def build(
    config: StageConfig, student: nn.Module, teacher: Any, *, freeze: Sequence[str] = ()
) -> Stage:
    """The objective of a stage.

    Args:
        config: the stage; ``kind`` selects the class.
        student: what is trained; on the meta device if only names are asked for.
        teacher: ``teacher.Teacher``; None for ``pretrain`` and ``sft``, and if only names are asked
            for.
        freeze: patterns (``fnmatch``) of parameter names that must not move.

    Raises:
        ValueError: the student or the teacher does not fit this kind of stage.
    """
    return STAGES[config.kind](student, teacher, config, freeze=freeze)


def normalised(kind: str, sums: Mapping[str, float]) -> dict[str, float]:
    """Sums that a stage returned, added over micro-batches and ranks -> figures to log.

    Args:
        kind: of the stage.
        sums: metric -> sum.

    Returns:
        metric -> mean over what ``Stage.count`` counts; that number is kept under its own name.
        Empty if nothing was counted.
    """
    counted = STAGES[kind].counted
    number = sums.get(counted, 0.0)
    if not number:
        return {}
    figures = {name: value / number for name, value in sums.items() if name != counted}
    return {**figures, counted: number}
