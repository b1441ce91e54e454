"""Cutting a batch into blocks, so that no loop runs over sequences or tokens."""

from collections.abc import Iterator

import torch

_ROW_BLOCK_BYTES = 2**20
"""Size of a block's temporaries in ``row_blocks``: they stay in the second-level cache, and blocks
are few. Measured for decode steps with 128 KiB a row: 1 MiB is the fastest of 128 KiB to 4 MiB."""


def padded_blocks(
    cu_seqlens: torch.Tensor, block: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cuts packed sequences into blocks of tokens, all sequences side by side.

    Sequences are taken longest first, so that those which still have tokens are a prefix.

    Args:
        cu_seqlens: [S + 1], integer offsets; a sequence may be empty.
        block: tokens per block.

    Yields:
        (rows, tokens, is_real): indices [A] of the sequences that still have tokens, token indices
        [A, block] (padding repeats a valid token), and a mask [A, block]. Work is proportional to
        the tokens plus at most one block of padding per sequence.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    longest = int(lengths[0]) if len(lengths) else 0
    # The last block of a batch of short sequences need not be full width.
    width = max(1, min(block, longest))
    offsets = torch.arange(width, device=cu_seqlens.device)
    for begin in range(0, longest, width):
        active = int((lengths > begin).sum())
        position = begin + offsets
        is_real = position[None, :] < lengths[:active, None]
        clamped = torch.minimum(position[None, :], lengths[:active, None] - 1)
        yield order[:active], starts[:active, None] + clamped, is_real


def row_blocks(
    num_rows: int, row_bytes: int, block_bytes: int = _ROW_BLOCK_BYTES
) -> Iterator[slice]:
    """Cuts rows into consecutive blocks, by default small enough for the caches.

    Args:
        num_rows: rows in all.
        row_bytes: of one row of the temporaries.
        block_bytes: of a block; a larger row is a block of its own.

    Yields:
        slices that cover the rows in order.
    """
    block = max(1, block_bytes // row_bytes)
    for begin in range(0, num_rows, block):
        yield slice(begin, min(begin + block, num_rows))
