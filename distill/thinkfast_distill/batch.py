"""A batch of packed documents with their boundaries.

Everything that mixes positions (attention, RoPE, convolution, state) has to stop at the borders of
documents, in teacher and student alike; this class is the one place that says where they are.

Shapes: B rows, L tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class PackedBatch:
    """Rows of documents, one after the other, padded at the end."""

    input_ids: torch.Tensor
    """[B, L] int64."""
    position_ids: torch.Tensor
    """[B, L] int64: position inside the document; a carried-over part starts at 0 again."""
    document_ids: torch.Tensor
    """[B, L] int32: number of the document in its row, ascending from 0; -1 on padding."""
    loss_mask: torch.Tensor
    """[B, L] bool: whether the token counts as a target; False on padding."""
    sample_ids: list[list[str]] = field(default_factory=list)
    """For each row the documents in it, ``source:index``, for logs."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each source in the batch, without padding."""

    def __post_init__(self) -> None:
        """Checks shapes and dtypes: a wrong mask trains silently on the wrong tokens."""
        shape = self.input_ids.shape
        for name, dtype in (
            ("input_ids", torch.int64),
            ("position_ids", torch.int64),
            ("document_ids", torch.int32),
            ("loss_mask", torch.bool),
        ):
            tensor = getattr(self, name)
            if tensor.dim() != 2 or tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"PackedBatch.{name}: expected {dtype} of shape {list(shape)}, found "
                    f"{tensor.dtype} of shape {list(tensor.shape)}."
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def target_mask(self) -> torch.Tensor:
        """[B, L - 1] bool: position t predicts t + 1, of the same document, and t + 1 counts."""
        same = self.document_ids[:, 1:] == self.document_ids[:, :-1]
        return same & (self.document_ids[:, 1:] >= 0) & self.loss_mask[:, 1:]

    def num_targets(self) -> int:
        """Number of positions that ``target_mask`` counts."""
        return int(self.target_mask().sum())

    def is_token(self) -> torch.Tensor:
        """[B, L] bool: not padding."""
        return self.document_ids >= 0

    def same_document(self) -> torch.Tensor:
        """[B, L, L] bool: query t (rows) may see key s (columns): s <= t, same document.

        Padding sees itself, so that no softmax is over nothing.
        """
        length = self.input_ids.shape[1]
        ids = self.document_ids
        same = ids[:, :, None] == ids[:, None, :]
        index = torch.arange(length, device=ids.device)
        return same & (index[:, None] >= index[None, :])

    def starts(self) -> torch.Tensor:
        """[B, L] bool: first token of a document (or of the padding)."""
        first = torch.ones_like(self.loss_mask[:, :1])
        return torch.cat([first, self.document_ids[:, 1:] != self.document_ids[:, :-1]], dim=1)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def split(self, num_parts: int) -> Iterator["PackedBatch"]:
        """Micro-batches of consecutive rows, at most ``num_parts``, none empty.

        ``source_tokens`` stays with the first part: it is a sum over the batch.
        """
        rows = torch.arange(self.input_ids.shape[0]).chunk(num_parts)
        for number, part in enumerate(rows):
            low, high = int(part[0]), int(part[-1]) + 1
            yield PackedBatch(
                self.input_ids[low:high],
                self.position_ids[low:high],
                self.document_ids[low:high],
                self.loss_mask[low:high],
                self.sample_ids[low:high],
                self.source_tokens if number == 0 else {},
            )
