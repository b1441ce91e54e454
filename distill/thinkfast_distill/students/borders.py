"""What the layers of a student need to know about a packed batch, computed once per batch.

Shapes: B rows, L tokens of a row.
"""

from functools import cached_property

import torch

from thinkfast_distill.batch import PackedBatch


class Boundaries:
    """Where documents begin and end, in the forms that mixers and attention use."""

    def __init__(self, batch: PackedBatch, window: int | None = None) -> None:
        """Derives the boundaries.

        Args:
            batch: the packed rows.
            window: sliding window of the attention layers in tokens, the token itself included.
        """
        self.position_ids = batch.position_ids
        """[B, L] int64, for RoPE."""
        self.starts = batch.starts()
        """[B, L] bool: first token of a document."""
        self._batch = batch
        self._window = window

    @cached_property
    def segments(self) -> torch.Tensor:
        """[B, L] int64: number of the document in its row; differs between neighbours only."""
        return self.starts.long().cumsum(1)

    @cached_property
    def tokens_before(self) -> torch.Tensor:
        """[B, L] int64: how many tokens of the same document come before."""
        index = torch.arange(self.starts.shape[1], device=self.starts.device)
        first = torch.where(self.starts, index, torch.zeros_like(index)).cummax(1).values
        return index - first

    @cached_property
    def visible(self) -> torch.Tensor:
        """[B, 1, L, L] bool: query t (rows) attends to key s (columns)."""
        visible = self._batch.same_document()
        if self._window is not None:
            index = torch.arange(visible.shape[1], device=visible.device)
            visible = visible & (index[:, None] - index[None, :] < self._window)
        return visible[:, None]
