"""What all stages have in common: which parameters move, and how sums are counted."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.config import StageConfig

_MIXER = re.compile(r"^model\.layers\.(\d+)\.(?:mixer|mamba)\.(.+)$")


class Stage(ABC):
    """An objective for one student.

    ``backward`` is called once per micro-batch; gradients add up. The loss is a mean over what
    ``count`` counts in the global batch (rows, tokens or targets, see ``counted``), so the parts of
    a batch give the gradient of the whole however it is cut.
    """

    kind: ClassVar[str]
    """The recipe's word for this stage."""

    counted: ClassVar[str]
    """Name of the metric that holds ``count``: num_rows, num_tokens or num_targets."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        config: StageConfig,
        *,
        freeze: Sequence[str] = (),
    ) -> None:
        """Takes the models; nothing is computed, and no parameter is read or changed.

        Args:
            student: with the root methods of ``students``.
            teacher: ``teacher.Teacher``, or None where none is needed.
            config: the stage.
            freeze: patterns (``fnmatch``) of parameter names that must not move.

        Raises:
            ValueError: a pattern that matches nothing, parts that do not fit together, or nothing
                left to train.
        """
        self.student: Any = student
        self.teacher = teacher
        self.config = config
        self._names = [name for name, _ in student.named_parameters()]
        for pattern in freeze:
            if not any(fnmatchcase(name, pattern) for name in self._names):
                raise ValueError(
                    f"freeze: {pattern!r} matches no parameter; names look like {self._names[1]}."
                )
        self._freeze = tuple(freeze)
        self._check()
        if not self.trainable_parameters():
            raise ValueError(
                f"{self.kind}: nothing is trained: train={config.train} and freeze="
                f"{list(freeze)} leave none of the student's parameters; change them, or leave "
                "the stage out."
            )

    def trainable_parameters(self) -> list[str]:
        """Names of the parameters that the stage trains, in the student's order."""
        return [
            name
            for name in self._names
            if self._is_trained(name) and not any(fnmatchcase(name, p) for p in self._freeze)
        ]

    def partly_trained_parameters(self) -> list[str]:
        """Trainable parameters of which some rows never get a gradient.

        AdamW leaves those rows alone only without weight decay, so the optimizer must not decay
        these parameters.
        """
        return []

    @abstractmethod
    def count(self, batch: PackedBatch) -> int:
        """What the loss is a mean over, in this batch; the loop sums it over the global batch."""

    @abstractmethod
    def backward(self, batch: PackedBatch, num_targets_global: float) -> dict[str, float]:
        """Forward and backward pass of a micro-batch; gradients are added to ``.grad``.

        Args:
            batch: some rows of the global batch.
            num_targets_global: sum of ``count`` over the global batch: all micro-batches and ranks.

        Returns:
            sums, to be added over micro-batches and ranks and given to ``normalised``.
        """

    @abstractmethod
    def evaluate(self, batch: PackedBatch) -> dict[str, float]:
        """The same sums without gradients."""

    def _is_trained(self, name: str) -> bool:
        """Whether the stage trains a parameter, ``freeze`` aside."""
        return self.config.train != "mixers" or mixer_part(name) is not None

    def _check(self) -> None:
        """Raises ValueError if student and teacher do not fit together."""
        if getattr(self.student.config, "lm_head_bias", False):
            raise ValueError(
                f"{self.kind}: the student's head has a bias, which the losses do not use; build "
                "it with lm_head_bias=False."
            )


class LayerwiseStage(Stage):
    """A stage that compares layer by layer, each given the teacher's input of that layer."""

    def _check(self) -> None:
        super()._check()
        if self.teacher is None:
            return
        for field in ("num_hidden_layers", "hidden_size"):
            found, wanted = (getattr(m.config, field) for m in (self.student, self.teacher))
            if found != wanted:
                raise ValueError(
                    f"{self.kind}: {field} of the student is {found}, of the teacher {wanted}; "
                    "they must be equal to compare layers. Use end_to_end for other sizes."
                )

    def backward(self, batch: PackedBatch, num_targets_global: float) -> dict[str, float]:
        """See ``Stage``: one backward pass per layer."""
        return self._run(batch, num_targets_global)

    def evaluate(self, batch: PackedBatch) -> dict[str, float]:
        """See ``Stage``."""
        with torch.no_grad():
            return self._run(batch, None)

    def _run(self, batch: PackedBatch, number: float | None) -> dict[str, float]:
        """Compares all layers; ``number`` None: without gradients."""
        compared = set(self.compared_layers())
        dtype = next(self.student.parameters()).dtype
        found: dict[str, torch.Tensor] = {}
        for i, *states in self.teacher.layers(batch):
            if i not in compared:
                continue
            before, mixed, after = (state.to(dtype) for state in states)
            loss, figures = self._compare(i, before, mixed, after, batch)
            if number is not None:
                backward(loss / number)
            for name, value in {"loss": loss, **figures}.items():
                value = value.detach().double()
                found[name] = found[name] + value if name in found else value
                if name != "loss":
                    found[f"{name}_{i}"] = value
        sums = {"loss": 0.0, **{name: float(value) for name, value in found.items()}}
        return {**sums, self.counted: float(self.count(batch))}

    @abstractmethod
    def compared_layers(self) -> list[int]:
        """Layers with a loss."""

    @abstractmethod
    def _compare(
        self,
        i: int,
        before: torch.Tensor,
        mixed: torch.Tensor,
        after: torch.Tensor,
        batch: PackedBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the loss of a layer, and sums to log.

        Args:
            i: the layer.
            before: (B, L, D) its input in the teacher.
            mixed: (B, L, D) the teacher's attention output.
            after: (B, L, D) its output in the teacher.
            batch: the batch.
        """


def backward(loss: torch.Tensor) -> None:
    """Adds the gradients of a loss, outside of autocast.

    Operations of the backward pass run in the precision of their forward pass. Inside of autocast
    the regions that leave it for float32, as the recurrences do, would be differentiated in
    bfloat16. A recomputed forward pass enters autocast by itself.
    """
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def mixer_part(name: str) -> str | None:
    """What a parameter is called inside of its SSM mixer; None outside of mixers."""
    match = _MIXER.match(name)
    return None if match is None else match[2]


def mixer_layers(student: Any) -> list[int]:
    """Layers of a student that have an SSM mixer instead of attention."""
    kinds = student.config.layers_block_type
    return [i for i, kind in enumerate(kinds) if kind == "mamba"]
