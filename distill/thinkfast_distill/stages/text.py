"""Stages that learn from text alone: fine-tuning after distillation, and training from scratch.

Both are next-token cross entropy over the targets of the batch. Which tokens are targets is up to
the data: completions (``loss_on: completion``) for fine-tuning, everything for plain text.
"""

import torch

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.losses import LossOutput, cross_entropy_loss
from thinkfast_distill.stages.base import Stage, backward


class _CrossEntropy(Stage):
    """Cross entropy with the next token."""

    counted = "num_targets"

    def count(self, batch: PackedBatch) -> int:
        """Target tokens."""
        return batch.num_targets()

    def backward(self, batch: PackedBatch, num_targets_global: float) -> dict[str, float]:
        """See ``Stage``."""
        output = self._loss(batch, int(num_targets_global))
        backward(output.loss)
        return {"loss": output.metrics["cross_entropy"], **output.metrics}

    def evaluate(self, batch: PackedBatch) -> dict[str, float]:
        """See ``Stage``."""
        with torch.no_grad():
            output = self._loss(batch, batch.num_targets())
        return {"loss": output.metrics["cross_entropy"], **output.metrics}

    def _loss(self, batch: PackedBatch, number: int) -> LossOutput:
        return cross_entropy_loss(
            self.student.hidden(batch),
            self.student.head_weight(),
            batch.input_ids,
            batch.target_mask(),
            num_targets=number,
            chunk_tokens=self.config.loss.chunk_tokens,
        )


class Sft(_CrossEntropy):
    """Fine-tuning of a student, usually on completions."""

    kind = "sft"


class Pretrain(_CrossEntropy):
    """Training of a fresh model."""

    kind = "pretrain"
