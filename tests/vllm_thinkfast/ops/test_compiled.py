"""The compiled CPU kernels as such; what they compute is tested with the operators."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.vllm_thinkfast.ops.data import paged_cache
from vllm_thinkfast.ops import compiled, cpu_kernels
from vllm_thinkfast.ops.backend import OPERATORS, load_operator

ROWS = {"discrete_ssd": (0, 1, 2, 3), "selective_scan": (0, 1, 3, 4), "causal_conv": (0,)}
"""Positions of a decode step's arguments with one row per sequence."""


@pytest.fixture
def fresh_choice():
    """No choice made before the test, none of the test's left behind."""
    compiled.find.cache_clear()
    yield
    compiled.find.cache_clear()


@pytest.fixture
def threads():
    """Restores their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("operator", OPERATORS)
def test_all_operators_have_one(fresh_choice, caplog, operator):
    with caplog.at_level(logging.INFO):
        assert compiled.implementation(operator) == "compiled"
        assert compiled.implementation(operator) == "compiled"
    assert [r.message for r in caplog.records] == [
        f"On CPU: using the compiled kernel of {operator}."
    ]


def test_without_numba(fresh_choice, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "vllm_thinkfast.ops.cpu_kernels")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled.implementation("causal_conv") == "torch"
    assert compiled.implementation("causal_conv") == "torch"
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "On CPU: causal_conv uses torch" in record.message
    assert "numba" in record.message


def test_with_numba_switched_off(tmp_path):
    """In a process of its own: numba reads the variable when it is imported."""
    code = "from vllm_thinkfast.ops import compiled\nprint(compiled.implementation('discrete_ssd'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split() == ["torch"]
    assert "numba does not compile" in result.stderr


def test_without_openmp(fresh_choice, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "_PARALLEL", "no_such_function")
    assert compiled.implementation("causal_conv") == "torch"
    assert "no_such_function" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no locator"), OSError(28, "No space"), EOFError()])
@pytest.mark.parametrize("step", ["__init__", "save_overload", "load_overload"])
def test_without_numbas_cache(monkeypatch, caplog, step, error):
    """Whatever keeps it from the disk, the kernel is compiled all the same, and a line says so."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(f"numba.core.caching.Cache.{step}", fail)

    def count(arguments):
        cpu_kernels._take_number(arguments)

    kernel = cpu_kernels._kernel(count)
    number = np.array([5])
    kernel.ctypes(number.ctypes.data)
    assert number[0] == 6
    [record] = caplog.records
    assert "count was compiled, but numba cannot keep it" in record.message
    assert type(error).__name__ in record.message


def test_states_on_another_device_are_left_to_torch():
    for operator in OPERATORS:
        assert compiled.find_for(operator, torch.empty(2, 3)) is not None
        assert compiled.find_for(operator, torch.empty(2, 3, device="meta")) is None
        assert compiled.find_for(operator, torch.empty(2, 3, dtype=torch.int8)) is None


def test_exponential():
    x = np.concatenate([np.linspace(-90, 89, 20_001), [0.0, -0.0, 1e-30, -1e-8]]).astype(np.float32)
    got = np.array([cpu_kernels._exp(v) for v in x])
    exact = np.exp(x.astype(np.float64))
    inside = (x >= -86) & (x <= 88)
    ulps = np.abs(got - exact)[inside] / np.spacing(exact[inside].astype(np.float32))
    assert ulps.max() < 2
    assert (got[x < -86] == 0).all()
    assert (got[x > 88] == np.inf).all()
    infinity = np.float32("inf")
    assert cpu_kernels._exp(-infinity) == 0
    for bits in (0x7FC00000, 0x7FFFFFFF, 0xFFC00001):
        assert np.isnan(cpu_kernels._exp(np.uint32(bits).view(np.float32)))


def test_softplus():
    x = np.concatenate([np.linspace(-80, 100, 20_001), [0.0, 1e-30, -1e-8]]).astype(np.float32)
    got = np.array([cpu_kernels._softplus(v) for v in x])
    exact = np.logaddexp(0, x.astype(np.float64))
    assert (np.abs(got - exact) / np.spacing(exact.astype(np.float32))).max() < 4
    assert np.isnan(cpu_kernels._softplus(np.float32("nan")))


def _decode_inputs(operator, num_sequences=3, conv_channels=4):
    """(cache values with two slots more, arguments behind the slots)."""
    torch.manual_seed(0)
    S, H, P, G, N = num_sequences, 4, 6, 2, 11
    B = torch.randn(S, G, N)
    if operator == "discrete_ssd":
        return torch.randn(S + 2, H, P, N), (
            torch.randn(S, H, P), -torch.rand(S, H), B, torch.randn(S, G, N), torch.randn(H, P),
        )  # fmt: skip
    if operator == "selective_scan":
        return torch.randn(S + 2, H * P, N), (
            torch.randn(S, H * P), torch.rand(S, H * P), -torch.rand(H * P, N), B,
            torch.randn(S, H, N), torch.randn(H * P),
        )  # fmt: skip
    C = conv_channels
    return torch.randn(S + 2, 3, C), (torch.randn(S, C), torch.randn(C, 4), torch.randn(C), "silu")


def _rows(operator, arguments, part):
    return [a[part] if i in ROWS[operator] else a for i, a in enumerate(arguments)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_decode_leaves_inputs_and_page_padding_alone(operator):
    """Pages hold other layers' data."""
    values, arguments = _decode_inputs(operator)
    cache = paged_cache(values)
    storage = torch.empty(0).set_(cache.untyped_storage())
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(cache.shape, cache.stride(), cache.storage_offset()).fill_(False)
    storage[outside] = 7.0
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    load_operator(operator, "cpu").decode(cache, torch.tensor([3, 1, 4]), *arguments)
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert (storage[outside] == 7.0).all()
    assert not torch.equal(cache[3], values[3])
    assert torch.equal(cache[2], values[2])


@pytest.mark.parametrize("operator", OPERATORS)
def test_decode_rows_depend_on_neither_neighbours_nor_threads(operator, threads, monkeypatch):
    """Bit for bit: scheduling must not change tokens. Slot 0 may come more than once."""
    monkeypatch.setattr(compiled, "_MIN_PARALLEL_WORK", 0)
    S = 40
    values, arguments = _decode_inputs(operator, S, conv_channels=1100)
    decode = load_operator(operator, "cpu").decode
    slots = torch.randperm(S + 1)[:S] + 1
    slots[[5, 30, 31]] = 0
    real = slots > 0
    alone = paged_cache(values)
    torch.set_num_threads(1)
    y_alone = torch.cat([
        decode(alone, slots[s : s + 1], *_rows(operator, arguments, slice(s, s + 1)))
        for s in range(S)
    ])  # fmt: skip
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        together = paged_cache(values)
        y = decode(together, slots, *arguments)
        assert torch.equal(y[real], y_alone[real])
        assert torch.equal(together, alone)
    assert torch.equal(alone[0], values[0])
    assert not torch.equal(alone[1:], values[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", ["discrete_ssd", "selective_scan"])
def test_half_precision_cache_is_rounded_to_nearest(operator, dtype):
    """The state is that of a float32 cache, rounded as torch rounds."""
    values, arguments = _decode_inputs(operator)
    values[1] *= 1e-6
    values[3, 0] = 1e4
    values[4].view(-1)[::7] = float("nan")
    half = paged_cache(values.to(dtype))
    full = paged_cache(values.to(dtype).float())
    decode, slots = load_operator(operator, "cpu").decode, torch.tensor([3, 1, 4])
    y_half, y_full = decode(half, slots, *arguments), decode(full, slots, *arguments)
    torch.testing.assert_close(y_half, y_full, equal_nan=True)
    for slot in (1, 3, 4):
        expected = full[slot].to(dtype)
        assert torch.equal(half[slot].isnan(), expected.isnan())
        assert torch.equal(half[slot].nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("operator", ["discrete_ssd", "selective_scan"])
def test_prefill_is_decode_token_by_token(operator):
    """Bit for bit, so that neither chunks nor a preempted sequence's recomputation change it."""
    T = 9
    values, arguments = _decode_inputs(operator, T)
    op = load_operator(operator, "cpu")
    initial = values[:2].clone()
    offsets = torch.tensor([0, 4, 9])
    y, final = op.prefill(*arguments, initial, offsets)
    cache = torch.cat([values[:1], initial])
    steps = []
    for s, (begin, end) in enumerate([(0, 4), (4, 9)]):
        for t in range(begin, end):
            row = _rows(operator, arguments, slice(t, t + 1))
            steps.append(op.decode(cache, torch.tensor([1 + s]), *row))
    assert torch.equal(torch.cat(steps), y)
    assert torch.equal(cache[1:], final)
    assert torch.equal(initial, values[:2])
