"""Discrete SSD: every backend against the sequential float64 oracle."""

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

OPERATOR = "discrete_ssd"

SHAPES = [  # H, P, G, N
    (4, 8, 4, 8),
    (4, 8, 1, 16),  # one group
    (6, 5, 2, 7),  # three heads per group, nothing a power of two
    (2, 96, 2, 64),  # Llamba-3B's head
    (2, 64, 1, 64),  # Llamba-1B's head
    (1, 128, 1, 128),  # MambaInLlama Mamba-2's head
    (1, 1, 1, 1),
    (2, 33, 1, 65),
]


def inputs(T, shape=(2, 6, 1, 9), dtype=torch.float32, seed=0):
    """x, decay logits a, B, C, D with decay = sigmoid(-a), as a Llamba projection yields them."""
    H, P, G, N = shape
    torch.manual_seed(seed)
    x = torch.randn(T, H, P).to(dtype)
    logits = (2 * torch.randn(T, H) - 1).to(dtype)
    B, C = torch.randn(T, G, N).to(dtype), (torch.randn(T, G, N) / N**0.5).to(dtype)
    return x, logits, B, C, torch.randn(H).to(dtype)


def log_decay_of(logits):
    return -torch.nn.functional.softplus(logits.float())


def expected(x, logits, B, C, D, state=None):
    """The oracle in float64, on rounded inputs, without logarithms."""
    return oracle.discrete_ssd(
        x.double(), torch.sigmoid(-logits.double()), B.double(), C.double(),
        None if D is None else D.double(), None if state is None else state.double(),
    )  # fmt: skip


def prefill(op, case, cu_seqlens, state=None):
    x, logits, B, C, D = case
    if state is None:
        state = torch.zeros(len(cu_seqlens) - 1, *x.shape[1:], B.shape[-1])
    return op.prefill(x, log_decay_of(logits), B, C, D, state, cu_seqlens)


def rows(case, index):
    x, logits, B, C, D = case
    return x[index], logits[index], B[index], C[index], D


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_lengths(op, length):
    case = inputs(length)
    state = torch.randn(1, 2, 6, 9)
    y, final = prefill(op, case, offsets([length]), state)
    expected_y, expected_final = expected(*case, state[0])
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_shapes(op, shape):
    case = inputs(35, shape)
    y, final = prefill(op, case, offsets([35]))
    expected_y, expected_final = expected(*case)
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", ["none", "head", "channel"])
def test_prefill_dtypes_and_skip(op, dtype, skip):
    x, logits, B, C, D = inputs(40, dtype=dtype)
    D = {"none": None, "head": D, "channel": torch.randn(2, 6).to(dtype)}[skip]
    y, final = prefill(op, (x, logits, B, C, D), offsets([40]))
    assert y.dtype == dtype
    assert final.dtype == torch.float32
    expected_y, expected_final = expected(x, logits, B, C, D)
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_prefill_packed(op, index_dtype):
    cu_seqlens = offsets([3, 0, 33, 1, 0, 64, 17, 0]).to(index_dtype)
    case = inputs(int(cu_seqlens[-1]))
    state = torch.randn(len(cu_seqlens) - 1, 2, 6, 9)
    before = state.clone()
    y, final = prefill(op, case, cu_seqlens, state)
    assert torch.equal(state, before), "the initial state must not be changed"
    for s, part in enumerate(slices(torch.arange(len(y)), cu_seqlens)):
        expected_y, expected_final = expected(*rows(case, part), state[s])
        assert_close(y[part], expected_y, "operator")
        assert_close(final[s], expected_final, "operator")


def test_prefill_nothing(op):
    state = torch.randn(2, 2, 6, 9)
    y, final = prefill(op, inputs(0), offsets([0, 0]), state)
    assert y.shape == (0, 2, 6)
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
    state = torch.randn(4, 2, 6, 9)
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
    x, logits, B, C, D = inputs(37)
    state = torch.randn(2, 2, 9, 6).mT  # [2, 2, 6, 9], N not innermost
    log_decay = non_contiguous(log_decay_of(logits))
    y, final = op.prefill(
        non_contiguous(x), log_decay, non_contiguous(B), non_contiguous(C), D[:1].expand(2),
        state, offsets([20, 17]),
    )  # fmt: skip
    for s, part in enumerate((slice(0, 20), slice(20, 37))):
        want_y, want_final = expected(*rows((x, logits, B, C, D[:1].expand(2)), part), state[s])
        assert_close(y[part], want_y, "operator")
        assert_close(final[s], want_final, "operator")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", [-104.0, -100.0, 100.0, "mixed"])
def test_extreme_decay_logits(op, dtype, logit):
    """Where the published form divides by a vanishing softplus; beside ordinary decays, too."""
    x, logits, B, C, D = inputs(70, dtype=dtype)
    if logit == "mixed":
        logits[::3], logits[1::7], logits[5::11] = -104.0, 100.0, -100.0
    else:
        logits[:] = logit
    case = x, logits, B, C, D
    # Remembering everything, the state sums 70 tokens; small steps show lost digits.
    state = torch.randn(1, 2, 6, 9)
    expected_y, expected_final = expected(*case, state[0])
    y, final = prefill(op, case, offsets([70]), state)
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")
    cache = torch.cat([torch.zeros_like(state), state])
    for t in range(10):
        y = op.decode(
            cache, torch.tensor([1]), x[t : t + 1], log_decay_of(logits[t : t + 1]),
            B[t : t + 1], C[t : t + 1], D,
        )  # fmt: skip
        assert_close(y[0], expected_y[t], "operator")


@pytest.mark.parametrize("log_decay", [-1e4, -1e30, float("-inf")])
def test_prefill_total_decay_beside_ordinary_decays(op, log_decay):
    """A token that wipes the state must not cost the tokens after it their digits."""
    x, logits, B, C, D = inputs(40)
    log_decays = log_decay_of(logits)
    log_decays[7] = log_decays[20, 1] = log_decay
    y, final = op.prefill(x, log_decays, B, C, D, torch.randn(1, 2, 6, 9), offsets([40]))
    logits[7] = logits[20, 1] = 1e9  # sigmoid(-1e9) is exactly 0
    expected_y, expected_final = expected(x, logits, B, C, D)
    assert_close(y[7:], expected_y[7:], "operator")
    assert_close(final[0], expected_final, "operator")


def test_prefill_very_small_steps(op):
    """Mamba-2 with dt near 0: x dt is tiny and the decay almost 1."""
    x, _, B, C, _ = inputs(129)
    dt = 1e-7 * torch.rand(129, 2)
    y, final = op.prefill(
        x * dt[..., None], -dt, B, C, None, torch.zeros(1, 2, 6, 9), offsets([129])
    )
    expected_y, expected_final = oracle.discrete_ssd(
        (x * dt[..., None]).double(), torch.exp(-dt.double()), B.double(), C.double()
    )
    assert_close(y, expected_y, "operator")
    assert_close(final[0], expected_final, "operator")


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_shapes(op, shape):
    H, P, _, N = shape
    case = inputs(3, shape)
    cache = torch.randn(5, H, P, N)
    before = cache.clone()
    slots = torch.tensor([4, 1, 2], dtype=torch.int32)
    x, logits, B, C, D = case
    y = op.decode(cache, slots, x, log_decay_of(logits), B, C, D)
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
    x, logits, B, C, D = case
    cache = paged_cache(torch.randn(6, 2, 6, 9).to(cache_dtype))
    before = cache.clone()
    slots = torch.tensor([[5, 9], [2, 9], [1, 9], [3, 9]])[:, 0]  # a column of a block table
    y = op.decode(
        cache, slots, non_contiguous(x), non_contiguous(log_decay_of(logits)),
        non_contiguous(B), non_contiguous(C), D,
    )  # fmt: skip
    assert y.dtype == dtype
    for s, slot in enumerate(slots.tolist()):
        row = slice(s, s + 1)
        expected_y, expected_state = expected(*rows(case, row), before[slot])
        assert_close(y[row], expected_y, "operator")
        assert_close(cache[slot], expected_state, "operator")
    assert torch.equal(cache[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("skip", ["none", "head"])
def test_decode_int8(op, shape, skip):
    """As with a float32 cache of the same states; what is written is off by less than a step."""
    x, logits, B, C, D = inputs(4, shape)
    arguments = (x, log_decay_of(logits), B, C, D if skip == "head" else None)
    check_decode_int8(op, torch.randn(6, *x.shape[1:], B.shape[-1]), arguments)


def test_decode_int8_rounds_by_element(op):
    """All heads and rows hold the same numbers, and still do not round the same way."""
    x, log_decay = torch.ones(1, 4, 8), torch.full((1, 4), -0.3)
    B = torch.linspace(0.1, 1, 16).expand(1, 1, 16)
    cache, scales = torch.zeros(2, 4, 8, 16, dtype=torch.int8), torch.zeros(2, 4, 8)
    op.decode(
        cache, torch.tensor([1]), x, log_decay, B, B, None, scales=scales, num_tokens=NUM_TOKENS[:1]
    )
    wanted, factors = state_codec.quantise(B.expand(1, 4, 8, 16), NUM_TOKENS[:1])
    assert torch.equal(cache[1], wanted[0])
    assert torch.equal(scales[1], factors[0])
    assert len({tuple(row) for row in cache[1].flatten(0, 1).tolist()}) > 16


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_decode_beyond_int32(op, index_dtype):
    """The offset of slot 3 is more than 2^31 elements."""
    case = inputs(1)
    x, logits, B, C, D = case
    cache = huge_cache(4, 2**30, torch.Size((2, 6, 9)))
    state = torch.randn(2, 6, 9).half()
    cache[3] = state
    y = op.decode(cache, torch.tensor([3], dtype=index_dtype), x, log_decay_of(logits), B, C, D)
    expected_y, expected_state = expected(*case, state)
    assert_close(y, expected_y, "operator")
    assert_close(cache[3], expected_state, "operator")


def test_decode_padding_rows(op):
    """Several padding rows share slot 0, whatever it and their inputs hold."""
    case = inputs(5)
    x, logits, B, C, D = case
    cache = torch.randn(4, 2, 6, 9)
    cache[0] = float("nan")
    before = cache.clone()
    slots = torch.tensor([0, 3, 0, 1, 0])
    x[[0, 2, 4]] = float("inf")
    y = op.decode(cache, slots, x, log_decay_of(logits), B, C, D)
    for s in (1, 3):
        row = slice(s, s + 1)
        expected_y, expected_state = expected(*rows(case, row), before[slots[s]])
        assert_close(y[row], expected_y, "operator")
        assert_close(cache[slots[s]], expected_state, "operator")
    assert torch.equal(cache[2], before[2])


def test_prefill_then_decode_equals_longer_prefill(op):
    lengths, steps = [30, 1, 17], 20
    cases = [inputs(n + steps, seed=n) for n in lengths]
    D = cases[0][4]
    packed = [torch.cat([c[i][:n] for c, n in zip(cases, lengths, strict=True)]) for i in range(4)]
    _, final = prefill(op, (*packed, D), offsets(lengths))
    cache, slots = torch.randn(4, 2, 6, 9), torch.tensor([2, 1, 3])
    cache[slots] = final
    outputs = []
    for t in range(steps):
        x, logits, B, C = (
            torch.stack([c[i][n + t] for c, n in zip(cases, lengths, strict=True)])
            for i in range(4)
        )
        outputs.append(op.decode(cache, slots, x, log_decay_of(logits), B, C, D))
    for s, n in enumerate(lengths):
        expected_y, expected_state = expected(*cases[s][:4], D)
        assert_close(torch.stack(outputs)[:, s], expected_y[n:], "operator")
        assert_close(cache[slots[s]], expected_state, "operator")


def test_decode_batch_order(op):
    x, logits, B, C, D = inputs(4)
    cache, slots, order = torch.randn(5, 2, 6, 9), torch.tensor([1, 2, 3, 4]), [3, 1, 0, 2]
    moved_cache = cache.clone()
    y = op.decode(cache, slots, x, log_decay_of(logits), B, C, D)
    moved_y = op.decode(
        moved_cache, slots[order], x[order], log_decay_of(logits)[order], B[order], C[order], D
    )
    assert_close(moved_y, y[order], "operator")
    assert_close(moved_cache, cache, "operator")


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    groups=st.integers(1, 2),
    heads_per_group=st.integers(1, 3),
    P=st.integers(1, 9),
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
    case = inputs(sum(lengths), (groups * heads_per_group, P, groups, N), seed=seed)
    state = torch.randn(len(lengths), groups * heads_per_group, P, N)
    y, final = prefill(op, case, offsets(lengths), state)
    for s, part in enumerate(slices(torch.arange(sum(lengths)), offsets(lengths))):
        expected_y, expected_final = expected(*rows(case, part), state[s])
        assert_close(y[part], expected_y, "operator")
        assert_close(final[s], expected_final, "operator")
