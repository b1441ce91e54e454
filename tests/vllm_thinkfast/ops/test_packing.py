"""Blocks of packed sequences: every token once, in order, and little padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vllm_thinkfast.ops.data import offsets
from vllm_thinkfast.ops.packing import padded_blocks, row_blocks

LENGTH_LISTS = st.lists(st.integers(0, 20), max_size=6)


@given(LENGTH_LISTS, st.integers(1, 9))
@settings(deadline=None, derandomize=True)
def test_padded_blocks_visit_every_token_once_in_order(lengths, block):
    cu_seqlens = offsets(lengths)
    seen: list[list[int]] = [[] for _ in lengths]
    for rows, tokens, is_real in padded_blocks(cu_seqlens, block):
        assert len(rows) == len(set(rows.tolist()))
        assert ((tokens >= 0) & (tokens < sum(lengths))).all(), "padding must repeat a valid token"
        for row, token, real in zip(rows.tolist(), tokens.tolist(), is_real.tolist(), strict=True):
            seen[row] += [t for t, r in zip(token, real, strict=True) if r]
    starts = cu_seqlens.tolist()
    assert seen == [list(range(starts[s], starts[s + 1])) for s in range(len(lengths))]


@given(LENGTH_LISTS, st.integers(1, 9))
@settings(deadline=None, derandomize=True)
def test_padded_blocks_pad_less_than_one_block_per_sequence(lengths, block):
    visited = sum(tokens.numel() for _, tokens, _ in padded_blocks(offsets(lengths), block))
    assert visited <= sum(lengths) + (block - 1) * sum(n > 0 for n in lengths)


def test_padded_blocks_of_nothing():
    assert list(padded_blocks(torch.tensor([0]), 4)) == []
    assert list(padded_blocks(torch.tensor([0, 0, 0]), 4)) == []


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "block_bytes", "sizes"),
    [
        (0, 8, 2**20, []),
        (3, 2**18, 2**20, [3]),
        (9, 2**18, 2**20, [4, 4, 1]),
        (2, 2**30, 2**20, [1, 1]),
        (5, 2**18, 2**19, [2, 2, 1]),
    ],
)
def test_row_blocks(num_rows, row_bytes, block_bytes, sizes):
    blocks = list(row_blocks(num_rows, row_bytes, block_bytes))
    assert [b.stop - b.start for b in blocks] == sizes
    assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(num_rows))
