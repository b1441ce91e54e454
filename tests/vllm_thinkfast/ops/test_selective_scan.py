"""Mamba-1 selective scan: every backend against the sequential float64 oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import operators as oracle
from tests.tolerances import assert_close
from tests.vllm_thinkfast.ops.data import (
    DTYPES,
    LENGTHS,
    huge_cache,
    non_contiguous,
    offsets,
    paged_cache,
    slices,
    split_points,
)
from tests.vllm_thinkfast.ops.int8_cache import NUM_TOKENS, check_decode_int8
from vllm_thinkfast.ops.state_codec import reference as state_codec

OPERATOR = "selective_scan"

SHAPES = [  # H, P, G, N
    (4, 3, 4, 5),
    (6, 5, 2, 7),  # three heads per group, nothing a power of two
    (4, 16, 1, 16),  # MambaInLlama's head; one group
    (1, 70, 1, 16),  # plain Mamba-1: one head; more channels than one program takes
    (3, 30, 3, 4),  # programs that span heads
    (1, 1, 1, 1),
]


def inputs(T, shape=(4, 3, 2, 5), dtype=torch.float32, seed=0):
    """x, dt (float32), A, B, C, D."""
    H, P, G, N = shape
    torch.manual_seed(seed)
    x = torch.randn(T, H * P).to(dtype)
    dt = torch.nn.functional.softplus(2 * torch.randn(T, H * P) - 2)
    A = -torch.exp(torch.randn(H * P, N))
    B, C = torch.randn(T, G, N).to(dtype), (torch.randn(T, H, N) / N**0.5).to(dtype)
    return x, dt, A, B, C, torch.randn(H * P).to(dtype)


def expected(x, dt, A, B, C, D, state=None):
    """The oracle in float64, on rounded inputs."""
    return oracle.selective_scan(
        x.double(), dt.double(), A.double(), B.double(), C.double(), D.double(),
        None if state is None else state.double(),
    )  # fmt: skip


def prefill(op, case, cu_seqlens, state=None):
    if state is None:
        state = torch.zeros(len(cu_seqlens) - 1, *case[2].shape)
    return op.prefill(*case, state, cu_seqlens)


def rows(case, index):
    x, dt, A, B, C, D = case
    return x[index], dt[index], A, B[index], C[index], D


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_lengths(op, length):
    case = inputs(length)
    state = torch.randn(1, 12, 5)
    y, final = prefill(op, case, offsets([length]), state)
    expected_y, expected_final = expected(*case, state[0])
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_shapes(op, shape):
    case = inputs(19, shape)
    y, final = prefill(op, case, offsets([19]))
    expected_y, expected_final = expected(*case)
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_dtypes(op, dtype):
    case = inputs(40, dtype=dtype)
    y, final = prefill(op, case, offsets([40]))
    assert y.dtype == dtype
    assert final.dtype == torch.float32
    expected_y, expected_final = expected(*case)
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_prefill_packed(op, index_dtype):
    cu_seqlens = offsets([3, 0, 33, 1, 0, 64, 17, 0]).to(index_dtype)
    case = inputs(int(cu_seqlens[-1]))
    state = torch.randn(len(cu_seqlens) - 1, 12, 5)
    before = state.clone()
    y, final = prefill(op, case, cu_seqlens, state)
    assert torch.equal(state, before), "the initial state must not be changed"
    for s, part in enumerate(slices(torch.arange(len(y)), cu_seqlens)):
        expected_y, expected_final = expected(*rows(case, part), state[s])
        assert_close(y[part], expected_y, "operator")
        assert_close(final[s], expected_final, "operator")


def test_prefill_nothing(op):
    state = torch.randn(2, 12, 5)
    y, final = prefill(op, inputs(0), offsets([0, 0]), state)
    assert y.shape == (0, 12)
    assert torch.equal(final, state)


@pytest.mark.parametrize("length", [14, 130])
def test_prefill_split_equals_whole(op, length):
    """Chunked prefill: cut at every border, the second part starts from the first one's state."""
    case = inputs(length)
    cuts = split_points(length)
    whole_y, whole_final = expected(*case)
    first = torch.cat([torch.arange(k) for k in cuts])
    second = torch.cat([torch.arange(k, length) for k in cuts])
    y1, between = prefill(op, rows(case, first), offsets(cuts))
    y2, final = prefill(op, rows(case, second), offsets([length - k for k in cuts]), between)
    assert_close(y1, whole_y[first], "operator")
    assert_close(y2, whole_y[second], "operator")
    assert_close(final, whole_final.expand(len(cuts), *whole_final.shape), "operator")


def test_prefill_batch_order(op):
    lengths = [5, 33, 1, 16]
    case = inputs(sum(lengths))
    state = torch.randn(4, 12, 5)
    y, final = prefill(op, case, offsets(lengths), state)
    order = [2, 0, 3, 1]
    tokens = slices(torch.arange(sum(lengths)), offsets(lengths))
    moved = torch.cat([tokens[s] for s in order])
    moved_y, moved_final = prefill(
        op, rows(case, moved), offsets([lengths[s] for s in order]), state[order]
    )
    assert_close(moved_y, y[moved], "operator")
    assert_close(moved_final, final[order], "operator")


def test_prefill_non_contiguous(op):
    x, dt, A, B, C, D = inputs(37)
    state = torch.randn(2, 5, 12).mT  # [2, 12, 5], N not innermost
    y, final = op.prefill(
        non_contiguous(x), non_contiguous(dt), non_contiguous(A), non_contiguous(B),
        non_contiguous(C), D[:1].expand(12), state, offsets([20, 17]),
    )  # fmt: skip
    for s, part in enumerate((slice(0, 20), slice(20, 37))):
        case = rows((x, dt, A, B, C, D[:1].expand(12)), part)
        expected_y, expected_final = expected(*case, state[s])
        assert_close(y[part], expected_y, "operator")
        assert_close(final[s], expected_final, "operator")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", [-104.0, -100.0, 100.0, "mixed"])
def test_extreme_steps(op, dtype, logit):
    """dt = softplus(logit) from nothing at all to steps that wipe the state."""
    x, _, A, B, C, D = inputs(70, dtype=dtype)
    if logit == "mixed":
        logits = torch.randn(70, 12)
        logits[::3], logits[1::7], logits[5::11] = -104.0, 100.0, -100.0
    else:
        logits = torch.full((70, 12), logit)
    case = x, torch.nn.functional.softplus(logits), A, B, C, D
    state = torch.randn(1, 12, 5)
    expected_y, expected_final = expected(*case, state[0])
    y, final = prefill(op, case, offsets([70]), state)
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")
    cache = torch.cat([torch.zeros_like(state), state])
    for t in range(10):
        y = op.decode(cache, torch.tensor([1]), *rows(case, slice(t, t + 1)))
        assert_close(y[0], expected_y[t], "operator")


def test_prefill_very_small_steps(op):
    x, dt, A, B, C, D = inputs(129)
    case = x, 1e-7 * dt, A, B, C, torch.zeros_like(D)
    y, final = prefill(op, case, offsets([129]))
    expected_y, expected_final = expected(*case)
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_shapes(op, shape):
    H, P, _, N = shape
    case = inputs(3, shape)
    cache = torch.randn(5, H * P, N)
    before = cache.clone()
    slots = torch.tensor([4, 1, 2], dtype=torch.int32)
    y = op.decode(cache, slots, *case)
    for s, slot in enumerate(slots.tolist()):
        row = slice(s, s + 1)
        expected_y, expected_state = expected(*rows(case, row), before[slot])
        assert_close(y[row], expected_y, "operator")
        assert_close(cache[slot], expected_state, "operator")
    assert torch.equal(cache[[0, 3]], before[[0, 3]]), "other slots must not change"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_decode_dtypes_and_paged_cache(op, dtype, cache_dtype):
    case = inputs(4, dtype=dtype)
    x, dt, A, B, C, D = case
    cache = paged_cache(torch.randn(6, 12, 5).to(cache_dtype))
    before = cache.clone()
    slots = torch.tensor([[5, 9], [2, 9], [1, 9], [3, 9]])[:, 0]  # a column of a block table
    y = op.decode(
        cache, slots, non_contiguous(x), non_contiguous(dt), A, non_contiguous(B),
        non_contiguous(C), D,
    )  # fmt: skip
    assert y.dtype == dtype
    for s, slot in enumerate(slots.tolist()):
        row = slice(s, s + 1)
        expected_y, expected_state = expected(*rows(case, row), before[slot])
        assert_close(y[row], expected_y, "operator")
        assert_close(cache[slot], expected_state, "operator")
    assert torch.equal(cache[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_int8(op, shape):
    """As with a float32 cache of the same states; what is written is off by less than a step."""
    case = inputs(4, shape)
    check_decode_int8(op, torch.randn(6, *case[2].shape), case)


def test_decode_int8_rounds_by_element(op):
    """All channels hold the same numbers, and still do not round the same way."""
    B = torch.linspace(0.1, 1, 16).expand(1, 1, 16)
    ones, A, C = torch.ones(1, 70), -torch.ones(70, 16), torch.ones(1, 2, 16)
    cache, scales = torch.zeros(2, 70, 16, dtype=torch.int8), torch.zeros(2, 70)
    op.decode(
        cache,
        torch.tensor([1]),
        ones,
        ones,
        A,
        B,
        C,
        torch.zeros(70),
        scales=scales,
        num_tokens=NUM_TOKENS[:1],
    )
    wanted, factors = state_codec.quantise(B[0].expand(1, 70, 16), NUM_TOKENS[:1])
    assert torch.equal(cache[1], wanted[0])
    assert torch.equal(scales[1], factors[0])
    assert len({tuple(row) for row in cache[1].tolist()}) > 35


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_decode_beyond_int32(op, index_dtype):
    """The offset of slot 3 is more than 2^31 elements."""
    case = inputs(1)
    cache = huge_cache(4, 2**30, torch.Size((12, 5)))
    state = torch.randn(12, 5).half()
    cache[3] = state
    y = op.decode(cache, torch.tensor([3], dtype=index_dtype), *case)
    expected_y, expected_state = expected(*case, state)
    assert_close(y, expected_y, "operator")
    assert_close(cache[3], expected_state, "operator")


def test_decode_padding_rows(op):
    """Several padding rows share slot 0, whatever it and their inputs hold."""
    case = inputs(5)
    cache = torch.randn(4, 12, 5)
    cache[0] = float("nan")
    before = cache.clone()
    slots = torch.tensor([0, 3, 0, 1, 0])
    case[0][[0, 2, 4]] = float("inf")
    y = op.decode(cache, slots, *case)
    for s in (1, 3):
        row = slice(s, s + 1)
        expected_y, expected_state = expected(*rows(case, row), before[slots[s]])
        assert_close(y[row], expected_y, "operator")
        assert_close(cache[slots[s]], expected_state, "operator")
    assert torch.equal(cache[2], before[2])


def test_prefill_then_decode_equals_longer_prefill(op):
    lengths, steps = [30, 1, 17], 20
    total = [n + steps for n in lengths]
    case = inputs(sum(total))
    tokens = slices(torch.arange(sum(total)), offsets(total))
    prompts = torch.cat([t[:n] for t, n in zip(tokens, lengths, strict=True)])
    _, final = prefill(op, rows(case, prompts), offsets(lengths))
    cache, slots = torch.randn(4, 12, 5), torch.tensor([2, 1, 3])
    cache[slots] = final
    outputs = []
    for step in range(steps):
        now = torch.stack([t[n + step] for t, n in zip(tokens, lengths, strict=True)])
        outputs.append(op.decode(cache, slots, *rows(case, now)))
    for s, n in enumerate(lengths):
        expected_y, expected_state = expected(*rows(case, tokens[s]))
        assert_close(torch.stack(outputs)[:, s], expected_y[n:], "operator")
        assert_close(cache[slots[s]], expected_state, "operator")


def test_decode_batch_order(op):
    case = inputs(4)
    cache, slots, order = torch.randn(5, 12, 5), torch.tensor([1, 2, 3, 4]), [3, 1, 0, 2]
    moved_cache = cache.clone()
    y = op.decode(cache, slots, *case)
    moved_y = op.decode(moved_cache, slots[order], *rows(case, order))
    assert_close(moved_y, y[order], "operator")
    assert_close(moved_cache, cache, "operator")


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    groups=st.integers(1, 2),
    heads_per_group=st.integers(1, 3),
    P=st.integers(1, 4),
    N=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_prefill_any_packing(op, lengths, groups, heads_per_group, P, N, seed):
    H = groups * heads_per_group
    case = inputs(sum(lengths), (H, P, groups, N), seed=seed)
    state = torch.randn(len(lengths), H * P, N)
    y, final = prefill(op, case, offsets(lengths), state)
    for s, part in enumerate(slices(torch.arange(sum(lengths)), offsets(lengths))):
        expected_y, expected_final = expected(*rows(case, part), state[s])
        assert_close(y[part], expected_y, "operator")
        assert_close(final[s], expected_final, "operator")
