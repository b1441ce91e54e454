"""Stage 2, hidden-state alignment of MOHAWK (arXiv 2408.10189, section 4): layers like layers.

Every student layer is given the teacher's input of that layer and compared with the teacher's
output, before the final norm in the last one too. The loss is the L2 norm of the difference over
features (not squared), mean over tokens, sum over layers; ``mixer_output_weight`` adds the same of
the mixer's output against the attention's, which repairs the mixer without help of the MLP.

It is always logged beside ``baseline``, the norm of what the teacher's layer adds, which a layer
that only passes its input on has.

Only layers that the stage can change are compared: with ``train: mixers`` (the default) those with
an SSM mixer, with ``train: all`` every layer, MLP and norms included.

Shapes: B rows, L tokens of a row, D width.
"""

import re

import torch

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.stages.base import LayerwiseStage, mixer_part

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class HiddenState(LayerwiseStage):
    """Outputs of layers against outputs of the teacher's layers."""

    kind = "hidden_state"
    counted = "num_tokens"

    def count(self, batch: PackedBatch) -> int:
        """Tokens, without padding; whether they are targets plays no part."""
        return int(batch.is_token().sum())

    def compared_layers(self) -> list[int]:
        """Layers with a parameter that moves."""
        found = (_LAYER.match(name) for name in self.trainable_parameters())
        return sorted({int(match[1]) for match in found if match is not None})

    def _is_trained(self, name: str) -> bool:
        if self.config.train == "all":
            return _LAYER.match(name) is not None
        return mixer_part(name) is not None

    def _compare(
        self,
        i: int,
        before: torch.Tensor,
        mixed: torch.Tensor,
        after: torch.Tensor,
        batch: PackedBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        token = batch.is_token()
        weight = self.config.mixer_output_weight
        if weight > 0:
            mixed_here, after_here = self.student.mixer_and_layer(i, before, batch)
        else:
            after_here = self.student.layer(i, before, batch)
        loss = _distance(after_here, after, token)
        figures = {"alignment": loss, "baseline": _distance(before, after, token)}
        if weight > 0:
            mixer = _distance(mixed_here, mixed, token)
            loss = loss + weight * mixer
            figures["mixer_alignment"] = mixer
            figures["mixer_baseline"] = _distance(torch.zeros_like(mixed), mixed, token)
        return loss, figures


def _distance(found: torch.Tensor, wanted: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the L2 norm over features, in float32 at least."""
    dtype = torch.promote_types(wanted.dtype, torch.float32)
    # Padding is taken out before the norm: its values mean nothing and need not be finite.
    difference = (found.to(dtype) - wanted.to(dtype))[token]
    distance: torch.Tensor = torch.linalg.vector_norm(difference, dim=-1).sum()
    return distance
