"""Short causal convolution: every backend against the sequential float64 oracle."""

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

OPERATOR = "causal_conv"
C = 10


def parameters(channels=C, kernel=4, dtype=torch.float32):
    """weight, bias, activation."""
    return torch.randn(channels, kernel).to(dtype), torch.randn(channels).to(dtype), "silu"


def inputs(T, channels=C, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(T, channels).to(dtype)


def expected(u, weight, bias, activation, tail=None):
    """The oracle in float64, on rounded inputs: y and the new tail."""
    return oracle.causal_conv(
        u.double(), weight.double(), None if bias is None else bias.double(), activation,
        None if tail is None else tail.double(),
    )  # fmt: skip


def check_prefill(op, u, conv, cache, slots, has_initial, cu_seqlens):
    """Runs prefill and compares y, the tails and all other slots with the oracle."""
    before = cache.clone()
    y = op.prefill(u, *conv, cache, slots, has_initial, cu_seqlens)
    assert y.dtype == u.dtype
    for s, part in enumerate(slices(torch.arange(len(u)), cu_seqlens)):
        slot = int(slots[s])
        if len(part) == 0:
            assert torch.equal(cache[slot], before[slot]), "an empty sequence keeps its tail"
            continue
        expected_y, tail = expected(u[part], *conv, before[slot] if has_initial[s] else None)
        assert_close(y[part], expected_y, "operator")
        assert_close(cache[slot], tail, "operator")
    others = [slot for slot in range(len(cache)) if slot not in slots.tolist()]
    assert torch.equal(cache[others], before[others]), "other slots must not change"
    return y


@pytest.mark.parametrize("has_initial", [True, False])
@pytest.mark.parametrize("length", [2, 3, 4, 5, *LENGTHS])
def test_prefill_lengths(op, length, has_initial):
    u = inputs(length)
    cache = torch.randn(3, 3, C)
    check_prefill(
        op, u, parameters(), cache, torch.tensor([1]), torch.tensor([has_initial]),
        offsets([length]),
    )  # fmt: skip


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("kernel", range(2, 8))
def test_prefill_shorter_than_the_window(op, kernel, length):
    cache = torch.randn(3, kernel - 1, C)
    check_prefill(
        op, inputs(length), parameters(C, kernel), cache, torch.tensor([1]), torch.tensor([True]),
        offsets([length]),
    )  # fmt: skip


@pytest.mark.parametrize("channels", [1, 10, 300])
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_prefill_shapes(op, channels, kernel):
    u = inputs(40, channels)
    cache = torch.randn(4, kernel - 1, channels)
    check_prefill(
        op, u, parameters(channels, kernel), cache, torch.tensor([2, 1]),
        torch.tensor([True, False]), offsets([1, 39]),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_prefill_dtypes_and_paged_cache(op, dtype, cache_dtype):
    u = inputs(20, dtype=dtype)
    cache = paged_cache(torch.randn(5, 3, C).to(cache_dtype))
    check_prefill(
        op, u, parameters(dtype=dtype), cache, torch.tensor([4, 2, 1]),
        torch.tensor([True, True, False]), offsets([1, 2, 17]),
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_activation_and_bias(op, activation, has_bias):
    u = inputs(9)
    weight, bias, _ = parameters()
    conv = weight, bias if has_bias else None, activation
    cache = torch.randn(2, 3, C)
    slots = torch.tensor([1])
    check_prefill(op, u, conv, cache, slots, torch.tensor([True]), offsets([9]))
    expected_y, _ = expected(u[:1], *conv, cache[1])
    assert_close(op.decode(cache, slots, u[:1], *conv), expected_y, "operator")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_prefill_packed(op, index_dtype):
    """Empty sequences in every place; a slot that holds NaN is ignored where not asked for."""
    cu_seqlens = offsets([0, 3, 0, 0, 33, 1, 2, 64, 17, 0]).to(index_dtype)
    S = len(cu_seqlens) - 1
    cache = torch.randn(S + 2, 3, C)
    slots = torch.randperm(S).to(index_dtype) + 1
    has_initial = torch.tensor([True, False] * (S // 2))
    cache[slots.long()[~has_initial & (cu_seqlens.diff() > 0)]] = float("nan")
    check_prefill(
        op, inputs(int(cu_seqlens[-1])), parameters(), cache, slots, has_initial, cu_seqlens
    )


def test_prefill_nothing(op):
    cache = torch.randn(3, 3, C)
    before = cache.clone()
    y = op.prefill(
        inputs(0), *parameters(), cache, torch.tensor([1, 2]), torch.tensor([True, False]),
        offsets([0, 0]),
    )  # fmt: skip
    assert y.shape == (0, C)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("length", [14, 130])
def test_prefill_split_equals_whole(op, length):
    """Chunked prefill: cut at every border; parts may be shorter than the tail."""
    u, conv = inputs(length), parameters()
    cuts = [k for k in split_points(length) if k > 0]
    whole_y, whole_tail = expected(u, *conv)
    slots = torch.arange(1, len(cuts) + 1)
    cache = torch.full((len(cuts) + 1, 3, C), float("nan"))
    first = torch.cat([torch.arange(k) for k in cuts])
    second = torch.cat([torch.arange(k, length) for k in cuts])
    none, all_ = torch.zeros(len(cuts), dtype=torch.bool), torch.ones(len(cuts), dtype=torch.bool)
    y1 = op.prefill(u[first], *conv, cache, slots, none, offsets(cuts))
    y2 = op.prefill(u[second], *conv, cache, slots, all_, offsets([length - k for k in cuts]))
    assert_close(y1, whole_y[first], "operator")
    assert_close(y2, whole_y[second], "operator")
    assert_close(cache[slots], whole_tail.expand(len(cuts), 3, C), "operator")


def test_prefill_batch_order(op):
    lengths, order = [5, 33, 1, 16], [2, 0, 3, 1]
    u, conv = inputs(sum(lengths)), parameters()
    cache, slots = torch.randn(5, 3, C), torch.tensor([4, 1, 3, 2])
    has_initial = torch.tensor([True, False, True, True])
    moved_cache = cache.clone()
    y = op.prefill(u, *conv, cache, slots, has_initial, offsets(lengths))
    tokens = slices(torch.arange(sum(lengths)), offsets(lengths))
    moved = torch.cat([tokens[s] for s in order])
    moved_y = op.prefill(
        u[moved], *conv, moved_cache, slots[order], has_initial[order],
        offsets([lengths[s] for s in order]),
    )  # fmt: skip
    assert_close(moved_y, y[moved], "operator")
    assert torch.equal(moved_cache, cache)


def test_prefill_non_contiguous(op):
    u = inputs(37)
    weight, bias, activation = parameters()
    cache = torch.randn(3, C, 3).mT  # [slots, K - 1, C], channels not innermost
    check_prefill(
        op, non_contiguous(u), (non_contiguous(weight), non_contiguous(bias), activation), cache,
        torch.tensor([[2, 7], [1, 7]])[:, 0], torch.tensor([True, False]), offsets([20, 17]),
    )  # fmt: skip


# Triton's interpreter computes with numpy, which warns of the overflow to inf that is meant here.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs_of_the_activation(op, dtype):
    u = torch.full((5, C), 104.0, dtype=dtype)
    u[:, ::2] *= -1
    weight = torch.ones(C, 4, dtype=dtype)
    cache = torch.zeros(2, 3, C)
    y = op.prefill(
        u, weight, None, "silu", cache, torch.tensor([1]), torch.tensor([False]), offsets([5])
    )
    assert_close(y, expected(u, weight, None, "silu")[0], "operator")


@pytest.mark.parametrize("channels", [1, 10, 300])
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_decode_shapes(op, channels, kernel):
    u, conv = inputs(3, channels), parameters(channels, kernel)
    cache = torch.randn(5, kernel - 1, channels)
    before = cache.clone()
    slots = torch.tensor([4, 1, 2], dtype=torch.int32)
    y = op.decode(cache, slots, u, *conv)
    for s, slot in enumerate(slots.tolist()):
        expected_y, tail = expected(u[s : s + 1], *conv, before[slot])
        assert_close(y[s : s + 1], expected_y, "operator")
        assert_close(cache[slot], tail, "operator")
    assert torch.equal(cache[[0, 3]], before[[0, 3]]), "other slots must not change"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_decode_dtypes_and_paged_cache(op, dtype, cache_dtype):
    u, conv = inputs(4, dtype=dtype), parameters(dtype=dtype)
    cache = paged_cache(torch.randn(6, 3, C).to(cache_dtype))
    before = cache.clone()
    slots = torch.tensor([[5, 9], [2, 9], [1, 9], [3, 9]])[:, 0]  # a column of a block table
    y = op.decode(cache, slots, non_contiguous(u), *conv)
    assert y.dtype == dtype
    for s, slot in enumerate(slots.tolist()):
        expected_y, tail = expected(u[s : s + 1], *conv, before[slot])
        assert_close(y[s : s + 1], expected_y, "operator")
        assert_close(cache[slot], tail, "operator")
    assert torch.equal(cache[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_layouts(op, dtype, kernel, is_transposed):
    """All of one dtype; VLLM_SSM_CONV_STATE_LAYOUT=DS makes the taps the contiguous dimension."""
    channels = 1100
    u, conv = inputs(3, channels, dtype=dtype), parameters(channels, kernel, dtype=dtype)
    values = torch.randn(5, kernel - 1, channels).to(dtype)
    cache = (
        values.mT.clone(memory_format=torch.contiguous_format).mT
        if is_transposed
        else values.clone()
    )
    slots = torch.tensor([4, 1, 2])
    y = op.decode(cache, slots, u, *conv)
    for s, slot in enumerate(slots.tolist()):
        expected_y, tail = expected(u[s : s + 1], *conv, values[slot])
        assert_close(y[s : s + 1], expected_y, "operator")
        assert_close(cache[slot], tail, "operator")
    assert torch.equal(cache[[0, 3]], values[[0, 3]])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_beyond_int32(op, index_dtype):
    """The offset of slot 3 is more than 2^31 elements."""
    u, conv = inputs(3), parameters()
    cache = huge_cache(4, 2**30, torch.Size((3, C)))
    cache[3] = tail = torch.randn(3, C).half()
    slots = torch.tensor([3], dtype=index_dtype)
    y = op.prefill(u[:2], *conv, cache, slots, torch.tensor([True]), offsets([2]))
    expected_y, tail = expected(u[:2], *conv, tail)
    assert_close(y, expected_y, "operator")
    assert_close(cache[3], tail, "operator")
    tail = cache[3].clone()
    y = op.decode(cache, slots, u[2:], *conv)
    expected_y, tail = expected(u[2:], *conv, tail)
    assert_close(y, expected_y, "operator")
    assert_close(cache[3], tail, "operator")


def test_decode_padding_rows(op):
    """Several padding rows share slot 0, whatever it and their inputs hold."""
    u, conv = inputs(5), parameters()
    cache = torch.randn(4, 3, C)
    cache[0] = float("nan")
    before = cache.clone()
    slots = torch.tensor([0, 3, 0, 1, 0])
    u[[0, 2, 4]] = float("inf")
    y = op.decode(cache, slots, u, *conv)
    for s in (1, 3):
        expected_y, tail = expected(u[s : s + 1], *conv, before[slots[s]])
        assert_close(y[s : s + 1], expected_y, "operator")
        assert_close(cache[slots[s]], tail, "operator")
    assert torch.equal(cache[2], before[2])


def test_prefill_then_decode_equals_longer_prefill(op):
    lengths, steps = [30, 1, 2], 9
    total = [n + steps for n in lengths]
    u, conv = inputs(sum(total)), parameters()
    tokens = slices(torch.arange(sum(total)), offsets(total))
    cache, slots = torch.full((4, 3, C), float("nan")), torch.tensor([2, 1, 3])
    prompts = torch.cat([t[:n] for t, n in zip(tokens, lengths, strict=True)])
    op.prefill(u[prompts], *conv, cache, slots, torch.zeros(3, dtype=torch.bool), offsets(lengths))
    outputs = []
    for step in range(steps):
        now = torch.stack([t[n + step] for t, n in zip(tokens, lengths, strict=True)])
        outputs.append(op.decode(cache, slots, u[now], *conv))
    for s, n in enumerate(lengths):
        expected_y, tail = expected(u[tokens[s]], *conv)
        assert_close(torch.stack(outputs)[:, s], expected_y[n:], "operator")
        assert_close(cache[slots[s]], tail, "operator")


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    kernel=st.integers(2, 5),
    seed=st.integers(0, 2**16),
    has_initial=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_prefill_any_packing(op, lengths, kernel, seed, has_initial):
    S = len(lengths)
    u = inputs(sum(lengths), seed=seed)
    cache = torch.randn(S + 1, kernel - 1, C)
    check_prefill(
        op, u, parameters(C, kernel), cache, torch.randperm(S) + 1,
        torch.tensor(has_initial[:S]), offsets(lengths),
    )  # fmt: skip
