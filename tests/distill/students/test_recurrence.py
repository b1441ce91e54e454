"""The scans and their gradients against the recurrences, token by token in float64."""

import pytest
import torch

from thinkfast_distill.students.recurrence import (
    CHUNK,
    discrete_ssd,
    selective_scan,
    ssd_matrix,
)

LENGTHS = [1, 2, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Of the largest error, relative to the largest value."""


def sequential_ssd(x, log_decay, B, C, is_start):
    """One token after the other; arguments as in ``discrete_ssd``."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        decay = log_decay[:, t].exp() * ~is_start[:, t, None]
        added = x[:, t, :, :, None] * B[:, t, :, None, :]
        state = decay[..., None, None] * state + added
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def sequential_selective(x, dt, A, B, C, is_start):
    """One token after the other; arguments as in ``selective_scan``."""
    E = x.shape[2]
    B = B.repeat_interleave(E // B.shape[2], dim=2)
    C = C.repeat_interleave(E // C.shape[2], dim=2)
    state = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp() * ~is_start[:, t, None, None]
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1))
    return torch.stack(outputs, 1)


def random_starts(rows, length, generator):
    """Borders anywhere, also side by side; the first token always begins a document."""
    starts = torch.rand(rows, length, generator=generator) < min(0.5, 3 / length)
    starts[:, 0] = True
    return starts


def ssd_inputs(length, seed, rows=2, H=3, P=4, N=5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(rows, length, *shape, generator=generator, dtype=torch.float64)

    log_decay = torch.nn.functional.logsigmoid(3 * draw(H))
    starts = random_starts(rows, length, generator)
    return [draw(H, P), log_decay, draw(H, N), draw(H, N)], starts


def selective_inputs(length, seed, rows=2, G=2, H=4, P=3, N=5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(rows, length, *shape, generator=generator, dtype=torch.float64)

    A = -torch.rand(H * P, N, generator=generator, dtype=torch.float64) * 4
    dt = torch.nn.functional.softplus(draw(H * P))
    starts = random_starts(rows, length, generator)
    return [draw(H * P), dt, A, draw(G, N), draw(H, N)], starts


def assert_same(found, expected, what, dtype):
    found, expected = found.detach(), expected.detach()
    error = (found.double() - expected).abs()
    limit = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    assert error.isfinite().all(), f"{what}: not finite"
    assert error.max() <= limit, (
        f"{what}: max error {error.max():.2e} > {limit:.2e}, mean {error.mean():.2e}, "
        f"at {tuple(torch.unravel_index(error.argmax(), error.shape))}"
    )


def check(scan, oracle, inputs, starts, borders, dtype):
    """Outputs and gradients of ``scan`` in ``dtype`` against ``oracle`` in float64."""
    exact = [t.clone().requires_grad_() for t in inputs]
    ours = [t.to(dtype).requires_grad_() for t in inputs]
    expected = oracle(*exact, starts)
    found = scan(*ours, borders)
    assert found.dtype == dtype
    assert_same(found, expected, "y", dtype)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).double()
    expected_gradients = torch.autograd.grad((expected * weight).sum(), exact)
    found_gradients = torch.autograd.grad((found * weight.to(dtype)).sum(), ours)
    for i, (f, e) in enumerate(zip(found_gradients, expected_gradients, strict=True)):
        assert_same(f, e, f"gradient of input {i}", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_discrete_ssd(length, dtype):
    inputs, starts = ssd_inputs(length, seed=length)
    check(discrete_ssd, sequential_ssd, inputs, starts, starts.long().cumsum(1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan(length, dtype):
    inputs, starts = selective_inputs(length, seed=length)
    check(selective_scan, sequential_selective, inputs, starts, starts, dtype)


def test_discrete_ssd_without_borders():
    """State that crosses several chunks, which random borders rarely let through."""
    inputs, starts = ssd_inputs(5 * CHUNK + 3, seed=1)
    starts[:, 1:] = False
    inputs[1] = inputs[1] / 50
    check(discrete_ssd, sequential_ssd, inputs, starts, starts.long().cumsum(1), torch.float64)


def test_selective_scan_without_borders():
    inputs, starts = selective_inputs(150, seed=1)
    starts[:, 1:] = False
    inputs[1] = inputs[1] / 50
    check(selective_scan, sequential_selective, inputs, starts, starts, torch.float64)


@pytest.mark.parametrize("logit", [-100.0, 100.0, 1e4])
def test_discrete_ssd_extreme_decay(logit):
    """Every third token forgets everything, or nothing; the others keep all their digits."""
    (x, log_decay, B, C), starts = ssd_inputs(2 * CHUNK + 9, seed=5)
    log_decay[:, ::3] = torch.nn.functional.logsigmoid(torch.tensor(-logit, dtype=torch.float64))
    borders = starts.long().cumsum(1)
    check(discrete_ssd, sequential_ssd, [x, log_decay, B, C], starts, borders, torch.float32)


@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_selective_scan_extreme_decay(logit):
    (x, dt, A, B, C), starts = selective_inputs(75, seed=5)
    dt[:, ::3] = torch.nn.functional.softplus(torch.tensor(logit, dtype=torch.float64))
    check(selective_scan, sequential_selective, [x, dt, A, B, C], starts, starts, torch.float32)


def test_selective_scan_second_call_is_independent():
    """The backward pass computes states again; it must not write into what it was given."""
    inputs, starts = selective_inputs(40, seed=2)
    inputs = [t.requires_grad_() for t in inputs]
    copies = [t.detach().clone() for t in inputs]
    y = selective_scan(*inputs, starts)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    for t, copy, a, b in zip(inputs, copies, first, second, strict=True):
        assert torch.equal(t, copy)
        assert torch.equal(a, b)


def test_ssd_matrix():
    (x, log_decay, B, C), starts = ssd_inputs(CHUNK + 7, seed=3)
    segments = starts.long().cumsum(1)
    matrix = ssd_matrix(log_decay, B, C, segments)
    assert torch.equal(matrix, matrix.tril())
    y = torch.einsum("bhlm,bmhp->blhp", matrix, x)
    assert_same(y, sequential_ssd(x, log_decay, B, C, starts), "T x", torch.float64)


def test_autocast_leaves_the_scans_in_float32():
    inputs, starts = ssd_inputs(20, seed=4)
    inputs = [t.float() for t in inputs]
    plain = discrete_ssd(*inputs, starts.long().cumsum(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = discrete_ssd(*inputs, starts.long().cumsum(1))
    assert torch.equal(plain, cast)
