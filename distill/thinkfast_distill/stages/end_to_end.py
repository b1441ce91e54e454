"""Stage 3, end-to-end distillation: the student's next-token distribution like the teacher's.

Reverse KL by default, as in M1 (arXiv 2504.10449) and this paper (arXiv 2502.20339); forward KL,
JSD and a part of cross entropy can be chosen. Everything is trained unless the recipe says
``train: mixers`` or freezes by name. Only positions whose next token is a target of the same
document count.
"""

import torch

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.losses import LossOutput, distillation_loss
from thinkfast_distill.stages.base import Stage, backward


class EndToEnd(Stage):
    """Divergence between student and teacher over the vocabulary."""

    kind = "end_to_end"
    counted = "num_targets"

    def count(self, batch: PackedBatch) -> int:
        """Target tokens."""
        return batch.num_targets()

    def backward(self, batch: PackedBatch, num_targets_global: float) -> dict[str, float]:
        """See ``Stage``."""
        output = self._loss(batch, int(num_targets_global))
        # Also without targets: with shards every rank must take part in the backward pass.
        backward(output.loss)
        return {"loss": output.loss.item() * num_targets_global, **output.metrics}

    def evaluate(self, batch: PackedBatch) -> dict[str, float]:
        """See ``Stage``."""
        number = batch.num_targets()
        with torch.no_grad():
            output = self._loss(batch, number)
        return {"loss": output.loss.item() * number, **output.metrics}

    def _loss(self, batch: PackedBatch, number: int) -> LossOutput:
        options = self.config.loss
        target = self.teacher.final_hidden(batch)
        return distillation_loss(
            self.student.hidden(batch),
            self.student.head_weight(),
            target,
            self.teacher.head_weight(),
            batch.input_ids,
            batch.target_mask(),
            num_targets=number,
            kind=options.kind,
            beta=options.beta,
            ce_weight=options.ce_weight,
            temperature=options.temperature,
            chunk_tokens=options.chunk_tokens,
        )

    def _check(self) -> None:
        super()._check()
        if self.teacher is None:
            return
        found, wanted = (m.config.vocab_size for m in (self.student, self.teacher))
        if found < wanted:
            raise ValueError(
                f"end_to_end: the teacher's vocabulary has {wanted} tokens, the student's only "
                f"{found}; build the student with vocab_size={wanted}."
            )
