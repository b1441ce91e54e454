"""Decode steps of whole mixers against the operators' references, put together by hand."""

import pytest
import torch
import torch.nn.functional as F

from tests.vllm_thinkfast.ops.data import non_contiguous, paged_cache
from vllm_thinkfast.ops import compiled, fused_decode
from vllm_thinkfast.ops.causal_conv import reference as conv
from vllm_thinkfast.ops.discrete_ssd import reference as ssd
from vllm_thinkfast.ops.selective_scan import reference as scan

SLOTS = torch.tensor([3, 0, 1, 4], dtype=torch.int64)
REAL = SLOTS > 0
S = len(SLOTS)


def check(states, expected_states, y, expected):
    torch.testing.assert_close(y[REAL], expected[REAL], rtol=2e-5, atol=2e-5)
    for state, expected_state in zip(states, expected_states, strict=True):
        torch.testing.assert_close(state[1:], expected_state[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("H", "G", "P", "N", "K"), [(4, 2, 6, 11, 4), (1, 1, 1, 1, 1), (6, 6, 16, 16, 3)]
)
def test_conv_ssd(H, G, P, N, K, has_bias, activation):
    torch.manual_seed(0)
    C = H * P + 2 * G * N
    u, logits = torch.randn(S, C), 3 * torch.randn(S, H)
    logits[2, 0] = -50.0
    weight, D = torch.randn(C, K), torch.randn(H)
    bias = torch.randn(C) if has_bias else None
    states = [torch.randn(6, K - 1, C), torch.randn(6, H, P, N)]
    expected_states = [state.clone() for state in states]
    states = [paged_cache(state) for state in states]
    slots = SLOTS.to(torch.int32)
    xBC = conv.decode(expected_states[0], slots, u, weight, bias, activation)
    x, B, C_rows = xBC.split([H * P, G * N, G * N], dim=-1)
    expected = ssd.decode(
        expected_states[1], slots, x.view(S, H, P), F.logsigmoid(-logits),
        B.view(S, G, N), C_rows.view(S, G, N), D,
    )  # fmt: skip
    y = torch.full((S, H * P), float("nan"))
    assert fused_decode.can_run(*states, weight, bias, D)
    fused_decode.conv_ssd(
        *states, SLOTS, non_contiguous(u), weight, bias, activation, non_contiguous(logits), D, y
    )
    assert y[~REAL].isnan().all()
    check(states, expected_states, y, expected.flatten(1))


@pytest.mark.parametrize("repeats_before_conv", [True, False])
@pytest.mark.parametrize(("H", "G", "N", "K"), [(4, 2, 11, 4), (1, 1, 1, 2), (6, 1, 16, 4)])
def test_conv_scan(H, G, N, K, repeats_before_conv):
    torch.manual_seed(1)
    E, X = H * N, H if repeats_before_conv else G
    x, B, C = torch.randn(S, X * N), torch.randn(S, G * N), torch.randn(S, E)
    weight, bias, D = torch.randn(X * N, K), torch.randn(X * N), torch.randn(E)
    A, dt, dt_bias = -torch.rand(E, N), 4 * torch.randn(S, E), torch.randn(E)
    dt[2, 0], dt[3, 0] = 60.0, -60.0
    states = [torch.randn(6, K - 1, X * N), torch.randn(6, E, N)]
    expected_states = [state.clone() for state in states]
    states = [paged_cache(state) for state in states]
    convolved = conv.decode(expected_states[0], SLOTS, x, weight, bias, "silu")
    repeated = convolved.view(S, X, N).repeat_interleave(H // X, dim=1).flatten(1)
    expected = scan.decode(
        expected_states[1], SLOTS, repeated, F.softplus(dt + dt_bias), A,
        B.view(S, G, N), C.view(S, H, N), D,
    )  # fmt: skip
    y = torch.full((S, E), float("nan"))
    assert fused_decode.can_run(*states, weight, bias, dt_bias, A, D)
    fused_decode.conv_scan(
        *states, SLOTS, non_contiguous(x), weight, bias, "silu", non_contiguous(dt), dt_bias, A,
        non_contiguous(B), non_contiguous(C), D, y,
    )  # fmt: skip
    assert y[~REAL].isnan().all()
    check(states, expected_states, y, expected)


def test_can_run(monkeypatch):
    conv, ssm, w = torch.ones(3, 3, 4), torch.ones(3, 2, 2), torch.ones(5, 4)
    assert fused_decode.can_run(conv, ssm, None, w, w[0])
    assert fused_decode.can_run(conv.mT, ssm)
    for other in (torch.ones(3, 3, 4).bfloat16(), conv.to("meta")):
        assert not fused_decode.can_run(other, other)
    assert not fused_decode.can_run(conv.bfloat16(), ssm)
    assert not fused_decode.can_run(conv, ssm.mT)
    assert not fused_decode.can_run(conv, ssm, w.bfloat16())
    assert not fused_decode.can_run(conv, ssm, w[:, :2])
    assert not fused_decode.can_run(conv, ssm, w[:, 0])
    monkeypatch.setattr(compiled, "find", lambda operator: None)
    assert not fused_decode.can_run(conv, ssm)
