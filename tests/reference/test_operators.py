"""Step 1 of the ladder: the oracles against closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from tests.reference.operators import causal_conv, discrete_ssd, gated_rms_norm, selective_scan
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_discrete_ssd_one_token():
    x, B, C, D = torch.randn(1, 3, 4), torch.randn(1, 3, 5), torch.randn(1, 3, 5), torch.randn(3)
    y, state = discrete_ssd(x, torch.rand(1, 3), B, C, D)
    assert_close(y, x * ((B * C).sum(-1, keepdim=True) + D[:, None]), "operator")
    assert_close(state, torch.einsum("hp,hn->hpn", x[0], B[0]), "operator")


def test_discrete_ssd_constant_decay():
    L, a = 50, 0.9
    x, B, C = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    y, state = discrete_ssd(
        x.expand(L, 2, 3), torch.full((L, 2), a), B.expand(L, 2, 4), C.expand(L, 2, 4)
    )
    series = (1 - a ** torch.arange(1, L + 1)) / (1 - a)
    assert_close(y, series[:, None, None] * x * (B * C).sum(-1, keepdim=True), "operator")
    assert_close(state, series[-1] * torch.einsum("hp,hn->hpn", x, B), "operator")


def test_discrete_ssd_no_decay_is_linear_attention():
    x, B, C = torch.randn(9, 1, 3), torch.randn(9, 1, 4), torch.randn(9, 1, 4)
    y, _ = discrete_ssd(x, torch.ones(9, 1), B, C)
    scores = torch.einsum("tgn,sgn->ts", C, B).tril()
    assert_close(y[:, 0], scores @ x[:, 0], "operator")


def test_discrete_ssd_full_decay_forgets():
    x, B, C = torch.randn(9, 2, 3), torch.randn(9, 2, 4), torch.randn(9, 2, 4)
    y, _ = discrete_ssd(x, torch.zeros(9, 2), B, C, initial_state=torch.randn(2, 3, 4))
    assert_close(y, x * (B * C).sum(-1, keepdim=True), "operator")


def test_discrete_ssd_decay_of_the_initial_state():
    decay, C, state = torch.rand(7, 2), torch.randn(7, 2, 4), torch.randn(2, 3, 4)
    y, final = discrete_ssd(torch.zeros(7, 2, 3), decay, torch.randn(7, 2, 4), C, None, state)
    product = decay.cumprod(0)
    assert_close(y, product[..., None] * torch.einsum("hpn,thn->thp", state, C), "operator")
    assert_close(final, product[-1, :, None, None] * state, "operator")


def test_discrete_ssd_consecutive_heads_share_a_group():
    B = torch.eye(2)[None]  # group 0 writes state column 0, group 1 column 1
    _, state = discrete_ssd(torch.ones(1, 6, 1), torch.ones(1, 6), B, B)
    assert state[:, 0].argmax(-1).tolist() == [0, 0, 0, 1, 1, 1]


def test_discrete_ssd_batch():
    x, decay = torch.randn(2, 3, 5, 2, 3), torch.rand(2, 3, 5, 2)
    B, C = torch.randn(2, 3, 5, 1, 4), torch.randn(2, 3, 5, 1, 4)
    y, state = discrete_ssd(x, decay, B, C)
    one_y, one_state = discrete_ssd(x[1, 2], decay[1, 2], B[1, 2], C[1, 2])
    assert torch.equal(y[1, 2], one_y)
    assert torch.equal(state[1, 2], one_state)


def test_selective_scan_one_token():
    x, dt, A, D = torch.randn(1, 6), torch.rand(1, 6), -torch.rand(6, 4), torch.randn(6)
    B, C = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    y, state = selective_scan(x, dt, A, B, C, D)
    assert_close(y, x * (dt * (B * C).sum() + D), "operator")
    assert_close(state, (dt * x)[0, :, None] * B[0], "operator")


def test_selective_scan_constant_step():
    L, dt = 40, 0.3
    x, A, B, C = torch.randn(2), -torch.rand(2, 4), torch.randn(4), torch.randn(4)
    y, _ = selective_scan(
        x.expand(L, 2), torch.full((L, 2), dt), A, B.expand(L, 1, 4), C.expand(L, 1, 4),
        torch.zeros(2),
    )  # fmt: skip
    q = torch.exp(dt * A)
    series = (1 - q ** torch.arange(1, L + 1)[:, None, None]) / (1 - q)  # [L, 2, 4]
    assert_close(y, dt * x * (series * B * C).sum(-1), "operator")


def test_selective_scan_zero_step_keeps_the_state():
    state = torch.randn(2, 4)
    _, final = selective_scan(
        torch.randn(5, 2), torch.zeros(5, 2), -torch.rand(2, 4), torch.randn(5, 1, 4),
        torch.randn(5, 1, 4), torch.zeros(2), state,
    )  # fmt: skip
    assert torch.equal(final, state)


def test_selective_scan_heads_and_groups():
    # 8 channels, 4 heads, 2 groups: channel 5 is in head 2 and group 1.
    B, C = torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)
    B[0, 1, 2], C[0, 2, 2] = 5.0, 7.0
    y, _ = selective_scan(
        torch.ones(1, 8), torch.ones(1, 8), -torch.ones(8, 3), B, C, torch.zeros(8)
    )
    assert y.tolist() == [[0, 0, 0, 0, 35, 35, 0, 0]]


def test_selective_scan_with_scalar_decay_is_discrete_ssd():
    L, H, P, N = 11, 3, 2, 4
    x, dt, a = torch.randn(L, H, P), torch.rand(L, H), -torch.rand(H)
    B, C = torch.randn(L, H, N), torch.randn(L, H, N)
    mamba2, _ = discrete_ssd(x * dt[..., None], torch.exp(dt * a), B, C)
    mamba1, _ = selective_scan(
        x.flatten(1), dt.repeat_interleave(P, 1), a.repeat_interleave(P)[:, None].expand(-1, N),
        B, C, torch.zeros(H * P),
    )  # fmt: skip
    assert_close(mamba1, mamba2.flatten(1), "operator")


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_causal_conv_against_torch(kernel):
    u, weight, bias = torch.randn(2, 9, 5), torch.randn(5, kernel), torch.randn(5)
    y, tail = causal_conv(u, weight, bias, "silu")
    padded = F.pad(u.mT, (kernel - 1, 0))
    assert_close(y, F.silu(F.conv1d(padded, weight[:, None], bias, groups=5)).mT, "operator")
    assert torch.equal(tail, padded.mT[:, 9:])


def test_causal_conv_impulse():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    u = torch.tensor([1.0, 0, 0, 0, 0])[:, None]
    assert causal_conv(u, weight)[0].flatten().tolist() == [4, 3, 2, 1, 0]


def test_causal_conv_continues_from_its_tail():
    u, weight = torch.randn(9, 5), torch.randn(5, 4)
    whole, tail = causal_conv(u, weight)
    first, between = causal_conv(u[:2], weight)
    second, end = causal_conv(u[2:], weight, tail=between)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(end, tail)


def test_gated_rms_norm_groups_and_order():
    y, gate, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    v = y * F.silu(gate)
    expected = torch.cat([F.rms_norm(v[:, :4], (4,), None, 1e-5),
                          F.rms_norm(v[:, 4:], (4,), None, 1e-5)], dim=1) * weight  # fmt: skip
    assert_close(gated_rms_norm(y, gate, weight, 2, 1e-5), expected, "operator")


def test_gated_rms_norm_constant():
    got = gated_rms_norm(torch.full((4,), 3.0), torch.full((4,), 100.0), torch.ones(4), 2, 0.0)
    assert_close(got, torch.ones(4), "operator")


def test_oracles_have_gradients():
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    gate = torch.rand(3, 2, requires_grad=True)
    assert gradcheck(
        discrete_ssd,
        (leaf(3, 2, 2), gate, leaf(3, 1, 2), leaf(3, 1, 2), leaf(2), leaf(2, 2, 2)),
    )
    assert gradcheck(
        selective_scan,
        (leaf(3, 2), gate, leaf(2, 2), leaf(3, 1, 2), leaf(3, 2, 2), leaf(2), leaf(2, 2)),
    )
    assert gradcheck(causal_conv, (leaf(3, 2), leaf(2, 4), leaf(2), "silu", leaf(3, 2)))
    assert gradcheck(gated_rms_norm, (leaf(3, 4), leaf(3, 4), leaf(4), 2, 1e-5))
