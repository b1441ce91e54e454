"""8-bit states: the codec in torch, and the same bits from Triton's functions."""

import numpy as np
import pytest
import torch

from tests.vllm_thinkfast.ops.conftest import INTERPRETED
from tests.vllm_thinkfast.ops.data import paged_cache
from vllm_thinkfast.ops.state_codec import reference as codec

HAS_TRITON = INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
ROWS = [  # H, P, N
    (2, 3, 16),
    (1, 1, 1),
    (3, 5, 7),  # nothing a power of two
    (4, 32, 64),
]
SPECIAL = {
    "zeros": [0.0, -0.0, 0.0, 0.0],
    "denormal": [1e-40, -1e-42, 0.0, 1e-45],
    "below the smallest": [7e-31, -7.8e-31, 1e-38, 0.0],
    "smallest": [2.0**-100, -(2.0**-101), 0.0, 1e-38],
    "largest": [3.4e38, -3.4e38, 1.0, 1e38],
    "one large": [1e30, 1e-30, -1.0, 0.0],
    "edge": [127.0, -127.0, 126.99999, -126.99999],
}


def python_noise(num_tokens: int, index: int) -> int:
    """The definition once more, in integers without a size."""
    h = (num_tokens ^ (index * 0x9E3779B1 % 2**32)) * 0x85EBCA6B % 2**32
    h ^= h >> 16
    return (h * 0xC2B2AE35 % 2**32) >> 16


def quantise(values, num_tokens=12):
    """All states with the same number of tokens."""
    return codec.quantise(values, torch.full((len(values),), num_tokens, device=values.device))


def wide_values(S, shape, seed=0):
    """States with rows of every magnitude."""
    torch.manual_seed(seed)
    return torch.randn(S, *shape) * torch.exp(8 * torch.randn(S, *shape[:-1], 1))


def test_noise_is_the_hash():
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int64).to(torch.int32)
    bits[:4] = torch.tensor([0, -1, -(2**31), 2**31 - 1], dtype=torch.int32)
    index = torch.randint(0, 2**24, (4000,), dtype=torch.int32)
    index[4:8] = torch.tensor([0, 1, 2**31 - 1, 2**16])
    wanted = [
        python_noise(b % 2**32, i) for b, i in zip(bits.tolist(), index.tolist(), strict=True)
    ]
    assert codec.noise(bits, index).tolist() == wanted


@pytest.mark.parametrize("what", ["tokens", "elements", "both"])
def test_noise_is_uniform(what):
    """From one token or element to the next: mean, spread and neighbours."""
    n = 2**17
    counted = torch.arange(n, dtype=torch.int32)
    one = torch.tensor([5], dtype=torch.int32)
    if what == "tokens":
        noise = codec.noise(counted, one)
    elif what == "elements":
        noise = codec.noise(one, counted)
    else:
        noise = codec.noise(counted[:512, None], counted[: n // 512]).flatten()
    noise = noise.double()
    assert 0 <= noise.min() <= noise.max() < 2**16
    standard_error = 2**16 / 12**0.5 / n**0.5
    assert abs(noise.mean() - (2**16 - 1) / 2) < 5 * standard_error
    counts = torch.bincount((noise / 2**10).long(), minlength=64)
    chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    centred = noise - noise.mean()
    neighbours = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert abs(neighbours) < 5 / n**0.5


@pytest.mark.parametrize("shape", ROWS)
def test_round_trip(shape):
    """Off by less than a step, and the largest value of a row by a float's rounding only."""
    values = wide_values(5, shape)
    codes, scales = quantise(values)
    assert (codes.dtype, codes.shape) == (torch.int8, values.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, values.shape[:-1])
    assert codes.min() >= -127
    found = codec.dequantise(codes, scales)
    assert found.dtype == torch.float32
    assert ((found - values).abs() < 1.0001 * scales[..., None]).all()
    peak, where = values.abs().max(-1, keepdim=True)
    largest = found.gather(-1, where).abs()
    assert ((largest - peak).abs() <= 3e-7 * peak).all()
    assert torch.equal(codes.abs().amax(-1), torch.full(scales.shape, 127, dtype=torch.int8))


def test_rounding_is_unbiased():
    """In every part of the way from one code to the next, and for either sign."""
    torch.manual_seed(1)
    values = 2 * torch.rand(64, 4, 32, 64) - 1
    values[..., 0] = 1.0
    codes, scales = quantise(values)
    steps = values.double() / scales.double()[..., None]
    steps, errors = steps[..., 1:], (codes.double() - steps)[..., 1:]
    n = errors.numel()
    assert abs(errors.mean()) < 5 * (1 / 6 / n) ** 0.5
    assert abs(errors.square().mean() - 1 / 6) < 5 * (1 / 6 / n) ** 0.5
    for sign in (-1, 1):
        for k in range(10):
            part = ((steps - steps.floor()) * 10).floor() == k
            chosen = errors[part & (steps.sign() == sign)]
            assert abs(chosen.mean()) < 5 * 0.5 / len(chosen) ** 0.5, (sign, k)


def test_small_changes_are_not_lost():
    """0.02 steps a token: to nearest, a state would stay where it is for ever."""
    state = torch.zeros(1, 40, 64)
    state[..., 0] = 127.0
    for t in range(500):
        state[..., 1:] += 0.02
        state = codec.dequantise(*quantise(state, t))
    grown = state[..., 1:].double()
    spread = (500 * 0.02 * 0.98) ** 0.5
    assert abs(grown.mean() - 10.0) < 5 * spread / grown.numel() ** 0.5
    assert 0.8 * spread < grown.std() < 1.2 * spread


@pytest.mark.parametrize("name", SPECIAL)
def test_special_rows(name):
    values = torch.tensor([SPECIAL[name], [1.0, -0.5, 0.25, 0.0]])[None]
    codes, scales = quantise(values)
    found = codec.dequantise(codes, scales)
    assert found.isfinite().all()
    assert (scales[0, 0] == 0) == (name in ("zeros", "denormal", "below the smallest"))
    assert ((found - values).abs() <= 1.0001 * scales[..., None].clamp_min(1e-30)).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_rows_that_are_not_finite_stay_so(bad):
    """An error must be seen, not become a number; and only in its own row."""
    values = torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]])[None]
    codes, scales = quantise(values)
    assert not codec.dequantise(codes, scales)[0, 0].isfinite().any()
    alone = quantise(torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])[None])
    assert torch.equal(codes[0, 1], alone[0][0, 1])
    assert scales[0, 1] == alone[1][0, 1]


def test_rounding_depends_on_value_element_and_tokens_only():
    values, tokens = wide_values(6, (2, 8, 16)), torch.tensor([4, 4, 4, 9, 9, 70])
    codes, scales = codec.quantise(values, tokens)
    order = [3, 0, 5]
    moved = codec.quantise(values[order], tokens[order])
    assert torch.equal(moved[0], codes[order])
    assert torch.equal(moved[1], scales[order])
    transposed = codec.quantise(values.mT.contiguous().mT, tokens)
    assert torch.equal(transposed[0], codes)
    assert not torch.equal(codec.quantise(values, tokens + 1)[0], codes)
    other_element = codec.quantise(values.roll(1, dims=2), tokens)[0].roll(-1, dims=2)
    assert not torch.equal(other_element, codes)


def test_last_bits_hardly_matter():
    """Else a matrix product of another batch size would round every element anew."""
    values = torch.randn(4, 8, 32, 64)
    nudged = values * (1 + 1e-7 * torch.randn(values.shape))
    differs = quantise(values)[0] != quantise(nudged)[0]
    assert differs.float().mean() < 1e-4


def test_read_and_write_pages(monkeypatch):
    """Through views into pages, in several blocks; other slots and the padding stay."""
    monkeypatch.setattr(codec, "_BLOCK_BYTES", 1)
    values = wide_values(3, (2, 4, 8))
    state = paged_cache(torch.zeros(5, 2, 4, 8, dtype=torch.int8))
    scales = paged_cache(torch.ones(5, 2, 4))
    slots = torch.tensor([4, 1, 2], dtype=torch.int32)
    tokens = torch.tensor([3, 2**31 - 1, 0])
    codec.write(state, scales, slots, values, tokens)
    codes, wanted = codec.quantise(values, tokens)
    assert torch.equal(codec.read(state, scales, slots), codec.dequantise(codes, wanted))
    assert (state[[0, 3]] == 0).all()
    assert (scales[[0, 3]] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_and_write_floats(dtype):
    values, state = torch.randn(2, 3, 4), torch.zeros(4, 3, 4, dtype=dtype)
    slots = torch.tensor([3, 1])
    codec.write(state, None, slots, values, None)
    found = codec.read(state, None, slots)
    assert found.dtype == torch.float32
    assert torch.equal(found, values.to(dtype).float())
    found.zero_()
    assert state[3].any(), "a copy"


if HAS_TRITON:
    import triton
    import triton.language as tl

    from vllm_thinkfast.ops.state_codec import triton as in_triton

    @triton.jit
    def _noise_kernel(bits_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        bits = tl.load(bits_ptr + i).to(tl.uint32, bitcast=True)
        index = tl.load(index_ptr + i).to(tl.uint32, bitcast=True)
        tl.store(out_ptr + i, in_triton.noise(bits, index))

    @triton.jit
    def _quantise_kernel(
        state_ptr, codes_ptr, scales_ptr, num_tokens, num_rows, rows_per_state, N,
        BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        n = tl.arange(0, BLOCK_N)
        mask = (row < num_rows)[:, None] & (n < N)[None, :]
        offsets = row[:, None] * N + n[None, :]
        state = tl.load(state_ptr + offsets, mask=mask, other=0.0)
        index = (row % rows_per_state)[:, None] * N + n[None, :]
        codes, scales = in_triton.quantise(state, num_tokens, index)
        tl.store(codes_ptr + offsets, codes, mask=mask)
        tl.store(scales_ptr + row, scales, mask=row < num_rows)


def quantise_in_triton(values):
    """``quantise`` by a kernel."""
    N = values.shape[-1]
    rows = values.numel() // N
    codes = torch.zeros(values.shape, dtype=torch.int8, device=values.device)
    scales = torch.zeros(values.shape[:-1], device=values.device)
    _quantise_kernel[(triton.cdiv(rows, 8),)](
        values, codes, scales, 12, rows, rows // len(values), N,
        BLOCK_R=8, BLOCK_N=triton.next_power_of_2(N),
    )  # fmt: skip
    return codes, scales


@pytest.mark.skipif(not HAS_TRITON, reason="test_triton_interpreter.py runs this")
def test_triton_noise_is_the_same():
    torch.manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32).to(DEVICE)
    index = torch.randint(0, 2**31 - 1, (4096,), dtype=torch.int32, device=DEVICE)
    out = torch.zeros_like(bits)
    _noise_kernel[(1,)](bits, index, out, BLOCK=4096)
    assert torch.equal(out, codec.noise(bits, index))


@pytest.mark.skipif(not HAS_TRITON, reason="test_triton_interpreter.py runs this")
@pytest.mark.parametrize("shape", ROWS)
def test_triton_codes_are_the_same(shape):
    values = wide_values(5, shape).to(DEVICE)
    for found, wanted in zip(quantise_in_triton(values), quantise(values), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(not HAS_TRITON, reason="test_triton_interpreter.py runs this")
@pytest.mark.parametrize("name", SPECIAL)
def test_triton_special_rows_are_the_same(name):
    values = torch.tensor([SPECIAL[name], [1.0, -0.5, 0.25, 0.0]], device=DEVICE)[None]
    for found, wanted in zip(quantise_in_triton(values), quantise(values), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(not HAS_TRITON, reason="test_triton_interpreter.py runs this")
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_triton_rows_that_are_not_finite_stay_so(bad):
    values = torch.tensor([[1.0, bad, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]], device=DEVICE)[None]
    codes, scales = quantise_in_triton(values)
    wanted = quantise(values)
    assert torch.equal(codes, wanted[0])
    np.testing.assert_array_equal(scales.cpu().numpy(), wanted[1].cpu().numpy())
