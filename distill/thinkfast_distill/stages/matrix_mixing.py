"""Stage 1, matrix orientation of MOHAWK (arXiv 2408.10189, section 4): mixers like attention.

A mixer without gate and projections is a matrix per head that mixes tokens, and so is softmax
attention. For every SSM layer, given the teacher's input of that layer, the loss is the Frobenius
norm (not squared, not divided by the length) of the difference of the two, per row and head; mean
over rows and heads, sum over layers. Entries across documents and on padding do not count.

It is always logged beside ``baseline``, the norm of the attention matrix itself, which a mixer of
zeros has: a loss above it means that nothing was learned.

What moves: B, C and the decay, that is rows of the fused input projection, channels of the
convolution, D, and dt, A where there are such. The rows of x and z in the same tensor get a zero
gradient and stay as they are, provided that the optimizer does not decay the tensor
(``partly_trained_parameters``).

Shapes: B rows, L tokens of a row, H heads, D width.
"""

import torch

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.stages.base import LayerwiseStage, mixer_layers, mixer_part

_FUSED_PARTS = frozenset({"in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"})
_MATRIX_PARTS = _FUSED_PARTS | {"D", "A_log", "dt_bias"}


class MatrixMixing(LayerwiseStage):
    """Matrices of mixers against matrices of attention."""

    kind = "matrix_mixing"
    counted = "num_rows"

    def partly_trained_parameters(self) -> list[str]:
        """The fused projections and convolutions: their part for x (and z) does not move."""
        return [name for name in self.trainable_parameters() if mixer_part(name) in _FUSED_PARTS]

    def count(self, batch: PackedBatch) -> int:
        """Rows with at least one token."""
        return int(batch.is_token().any(1).sum())

    def compared_layers(self) -> list[int]:
        """SSM layers with a parameter that moves."""
        moving = {int(name.split(".")[2]) for name in self.trainable_parameters()}
        return [i for i in mixer_layers(self.student) if i in moving]

    def _is_trained(self, name: str) -> bool:
        part = mixer_part(name)
        if part is None:
            # The norm before the mixer is the only other thing the objective reaches.
            layers = {
                f"model.layers.{i}.input_layernorm.weight" for i in mixer_layers(self.student)
            }
            return self.config.train == "all" and name in layers
        return part in _MATRIX_PARTS

    def _check(self) -> None:
        super()._check()
        config = self.student.config
        if getattr(config, "mamba_version", None) == "mamba1":
            raise ValueError(
                "matrix_mixing: a Mamba-1 mixer has a matrix per channel, attention one per head; "
                "start with hidden_state instead."
            )
        heads = getattr(config, "num_heads", None) or getattr(config, "mamba_num_heads", None)
        if self.teacher is not None and heads != self.teacher.num_heads:
            raise ValueError(
                f"matrix_mixing: the student's mixers have {heads} heads, the teacher's attention "
                f"{self.teacher.num_heads}; set num_heads to {self.teacher.num_heads}, or start "
                "with hidden_state."
            )

    def _compare(
        self,
        i: int,
        before: torch.Tensor,
        mixed: torch.Tensor,
        after: torch.Tensor,
        batch: PackedBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        attention = self.teacher.attention_matrix(i, before, batch)
        made = self.student.mixer_matrix(i, before, batch)
        # Padding sees padding in same_document, but is no document.
        allowed = batch.same_document() & batch.is_token()[:, :, None]
        difference = (made.to(attention.dtype) - attention).masked_fill(~allowed[:, None], 0.0)
        loss = torch.linalg.vector_norm(difference, dim=(-2, -1)).mean(1).sum()
        baseline = torch.linalg.vector_norm(attention, dim=(-2, -1)).mean(1).sum()
        return loss, {"alignment": loss, "baseline": baseline}
