"""Backends are chosen by name, refused in words, and agree with the reference where they run."""

import importlib.util

import pytest
import torch

from tests.distill.students.models import config_of, packed, random_documents
from thinkfast_distill import students
from thinkfast_distill.students import backends
from thinkfast_distill.students.backends import selective_scan_backend, ssd_backend
from thinkfast_distill.students.borders import Boundaries

ACCEPTED = [("llamba", "fla"), ("mamba2", "fla"), ("mamba1", "mamba_ssm")]


@pytest.mark.parametrize(("kind", "backend"), ACCEPTED)
def test_missing_package(kind, backend):
    if importlib.util.find_spec(backend) is not None:
        pytest.skip(f"{backend} is installed")
    with pytest.raises(ImportError, match=rf"backend='{backend}'.*install it with: pip install"):
        students.build(config_of(kind), backend=backend)


@pytest.mark.parametrize(
    ("kind", "backend", "message"),
    [
        ("llamba", "mamba_ssm", "does not have a scan with one decay.*accepted: reference, fla"),
        ("mamba1", "fla", "does not have the selective scan.*accepted: reference, mamba_ssm"),
        ("llamba", "cuda", "backend='cuda'; accepted: reference, fla, mamba_ssm"),
    ],
)
def test_refused(kind, backend, message):
    with pytest.raises(ValueError, match=message):
        students.build(config_of(kind), backend=backend)


def test_document_rows():
    """Documents as rows, and back; nothing between documents, padding at the ends."""
    batch = packed([random_documents([3, 1, 4], 1), random_documents([2, 5], 2)], pad_to=9)
    layout = backends._DocumentRows(Boundaries(batch))
    t = torch.randn(2, 9, 3)
    rows = layout.spread(t)
    assert rows.shape == (7, 5, 3)  # padding counts as a document
    assert torch.equal(rows[2, :4], t[0, 4:8])
    assert rows[2, 4:].abs().sum() == 0
    assert torch.equal(layout.gather(rows), t)


def test_cu_seqlens():
    batch = packed([random_documents([3, 1, 4], 1), random_documents([2, 5], 2)], pad_to=9)
    found = backends._cu_seqlens(Boundaries(batch))
    assert found.tolist() == [0, 3, 4, 8, 9, 11, 16, 18]


def _gpu_inputs(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).cuda().requires_grad_() for shape in shapes]


def _assert_parity(reference, other, inputs):
    expected, found = reference(*inputs), other(*inputs)
    weight = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    )
    for ours, theirs in [(found, expected), *pairs]:
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 2e-2, f"relative error {error:.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fla_is_the_reference():
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    batch = packed([random_documents([70, 100, 30], 1), random_documents([200], 2)]).to("cuda")
    borders = Boundaries(batch)
    x, a, B, C = _gpu_inputs([(2, 200, 4, 64), (2, 200, 4), (2, 200, 4, 64), (2, 200, 4, 64)])

    def run(backend):
        scan = ssd_backend(backend)
        return lambda x, a, B, C: scan(x, torch.nn.functional.logsigmoid(-a), B, C, borders)

    _assert_parity(run("reference"), run("fla"), [x, a, B, C])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mamba_ssm_is_the_reference():
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed")
    batch = packed([random_documents([70, 100, 30], 1), random_documents([200], 2)]).to("cuda")
    borders = Boundaries(batch)
    shapes = [(2, 200, 64), (2, 200, 64), (64, 16), (2, 200, 2, 16), (2, 200, 4, 16)]

    def run(backend):
        scan = selective_scan_backend(backend)
        return lambda x, dt, A, B, C: scan(
            x, torch.nn.functional.softplus(dt), -A.exp(), B, C, borders
        )

    _assert_parity(run("reference"), run("mamba_ssm"), _gpu_inputs(shapes))
