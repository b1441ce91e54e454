"""Chunked losses against plain autograd over whole logits."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinkfast_distill.losses import KINDS, cross_entropy_loss, distillation_loss

ROWS, LENGTH, WIDTH, VOCAB = 3, 7, 5, 11
CASES = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.0),
    ("jsd", 0.2),
    ("jsd", 0.5),
    ("jsd", 0.9),
    ("jsd", 1.0),
]


def case(dtype=torch.float64, *, student_rows=VOCAB, seed=0, scale=1.0):
    """student hidden and head, teacher hidden and head (another width), ids, mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden = draw(ROWS, LENGTH, WIDTH).requires_grad_()
    head = draw(student_rows, WIDTH).requires_grad_()
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    mask = torch.rand(ROWS, LENGTH - 1, generator=generator) < 0.6
    return hidden, head, draw(ROWS, LENGTH, WIDTH + 1), draw(VOCAB, WIDTH + 1), ids, mask


def plain(hidden, head, teacher_hidden, teacher_head, ids, mask, *, kind, beta, ce_weight, tau):
    """The definition, written with whole logits: sum over tokens / their number."""
    logits = hidden[:, :-1] @ head[: teacher_head.shape[0]].T
    wanted = teacher_hidden[:, :-1] @ teacher_head.T
    q, p = (logits / tau).softmax(-1), (wanted / tau).softmax(-1)

    def divergence(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if kind == "jsd" and 0 < beta < 1:
        m = beta * p + (1 - beta) * q
        loss = beta * divergence(p, m) + (1 - beta) * divergence(q, m)
    elif kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        loss = divergence(q, p)
    else:
        loss = divergence(p, q)
    entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(loss.shape)
    return ((tau**2 * loss + ce_weight * entropy) * mask).sum() / mask.sum()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize(("ce_weight", "tau"), [(0.0, 1.0), (0.3, 1.0), (0.0, 2.5), (0.7, 0.4)])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_distillation_loss_autograd(kind, beta, ce_weight, tau, chunk_tokens):
    parts = case()
    hidden, head, mask = parts[0], parts[1], parts[-1]
    wanted = plain(*parts, kind=kind, beta=beta, ce_weight=ce_weight, tau=tau)
    found = distillation_loss(
        *parts,
        num_targets=int(mask.sum()),
        kind=kind,
        beta=beta,
        ce_weight=ce_weight,
        temperature=tau,
        chunk_tokens=chunk_tokens,
    )
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=1e-12)
    # A factor in front, so that the incoming gradient is not 1.
    for mine, theirs in zip(
        gradients(3 * found.loss, hidden, head),
        gradients(3 * wanted, hidden, head),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert theirs.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_loss_gradcheck(kind):
    hidden, head, teacher_hidden, teacher_head, ids, mask = case(seed=1)

    def loss(hidden, head):
        return distillation_loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            ids,
            mask,
            num_targets=5,
            kind=kind,
            beta=0.3,
            ce_weight=0.2,
            temperature=1.7,
            chunk_tokens=3,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_distillation_loss_metrics():
    hidden, head, teacher_hidden, teacher_head, ids, mask = parts = case()
    found = distillation_loss(*parts, num_targets=100, temperature=3.0, ce_weight=0.5)
    log_q = (hidden[:, :-1] @ head.T).log_softmax(-1)[mask].detach()
    log_p = (teacher_hidden[:, :-1] @ teacher_head.T).log_softmax(-1)[mask]
    index = ids[:, 1:][mask][:, None]
    expected = {
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(),
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(),
        "cross_entropy": -log_q.gather(1, index).sum(),
        "teacher_cross_entropy": -log_p.gather(1, index).sum(),
        "teacher_entropy": -(log_p.exp() * log_p).sum(),
        "top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).sum(),
        "num_targets": mask.sum(),
    }
    assert found.metrics == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-9)
    assert 0 < found.metrics["top1_agreement"] < found.metrics["num_targets"]


def test_distillation_loss_equal_models():
    """No divergence and no gradient when the student is the teacher, in float32 too."""
    for kind in KINDS:
        hidden, head, _, _, ids, mask = case(torch.float32, scale=2.0)
        found = distillation_loss(
            hidden, head, hidden, head, ids, mask, num_targets=int(mask.sum()), kind=kind
        )
        assert abs(found.loss.item()) < 1e-6
        for gradient in gradients(found.loss, hidden, head):
            assert gradient.abs().max() < 1e-6
        assert found.metrics["top1_agreement"] == found.metrics["num_targets"] == mask.sum()


def test_distillation_loss_surplus_rows():
    """Rows of the student beyond the teacher's vocabulary play no part."""
    parts = case(student_rows=VOCAB + 5)
    hidden, head, rest = parts[0], parts[1], parts[2:]
    found = distillation_loss(hidden, head, *rest, num_targets=9, ce_weight=0.5)
    cut = distillation_loss(hidden, head[:VOCAB], *rest, num_targets=9, ce_weight=0.5)
    assert found.loss.item() == cut.loss.item()
    assert found.metrics == cut.metrics
    gradient = gradients(found.loss, head)[0]
    assert gradient[VOCAB:].eq(0).all()
    assert gradient[:VOCAB].ne(0).all()


def test_distillation_loss_uneven_micro_batches():
    """Gradients of parts with different numbers of targets add up to those of the whole."""
    hidden, head, teacher_hidden, teacher_head, ids, mask = case()
    mask[0], mask[1, 2:] = False, False  # no target, few targets, many targets
    options = {"num_targets": int(mask.sum()), "ce_weight": 0.1}
    whole = distillation_loss(hidden, head, teacher_hidden, teacher_head, ids, mask, **options)
    wanted = gradients(whole.loss, hidden, head)
    found = [torch.zeros_like(hidden), torch.zeros_like(head)]
    loss = 0.0
    for row in range(ROWS):
        r = slice(row, row + 1)
        part = distillation_loss(
            hidden[r], head, teacher_hidden[r], teacher_head, ids[r], mask[r], **options
        )
        loss += part.loss.item()
        for total, gradient in zip(found, gradients(part.loss, hidden, head), strict=True):
            total += gradient
    assert loss == pytest.approx(whole.loss.item(), rel=1e-12)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_distillation_loss_mask():
    """What stands at positions that do not count, NaN included, changes nothing."""
    hidden, head, teacher_hidden, teacher_head, ids, mask = case()
    number = int(mask.sum())
    clean = distillation_loss(
        hidden, head, teacher_hidden, teacher_head, ids, mask, num_targets=number
    )
    keep = torch.cat([mask, torch.zeros(ROWS, 1, dtype=torch.bool)], dim=1)
    dirty, dirty_teacher = hidden.detach().clone(), teacher_hidden.clone()
    dirty[~keep], dirty_teacher[~keep] = math.nan, math.nan
    dirty.requires_grad_()
    found = distillation_loss(
        dirty, head, dirty_teacher, teacher_head, ids, mask, num_targets=number
    )
    assert found == clean
    gradient = gradients(found.loss, dirty)[0]
    assert gradient[~keep].eq(0).all()
    assert torch.equal(gradient, gradients(clean.loss, hidden)[0])


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_distillation_loss_extreme_logits(kind, beta):
    """Logits of +-1e4, in agreement and against each other: finite, and right in size."""
    head = torch.eye(4, requires_grad=True)
    states = torch.full((1, 5, 4), -1e4)
    states[0, :, 0] = 1e4
    teacher = states.clone()
    teacher[0, 2:] = teacher[0, 2:].flip(-1)
    hidden = states.requires_grad_()
    found = distillation_loss(
        hidden,
        head,
        teacher,
        head,
        torch.zeros(1, 5, dtype=torch.int64),
        torch.ones(1, 4, dtype=torch.bool),
        num_targets=4,
        kind=kind,
        beta=beta,
        ce_weight=0.1,
    )
    assert found.loss.isfinite()
    assert all(math.isfinite(value) for value in found.metrics.values())
    assert all(gradient.isfinite().all() for gradient in gradients(found.loss, hidden, head))
    # Two of four positions disagree by 2e4 nats.
    assert found.metrics["reverse_kl"] == pytest.approx(4e4)
    assert found.metrics["forward_kl"] == pytest.approx(4e4)
    assert found.metrics["top1_agreement"] == 2


def test_distillation_loss_no_targets():
    hidden, head, teacher_hidden, teacher_head, ids, mask = case()
    for number in (0, 17):  # nowhere, or only on other ranks
        found = distillation_loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            ids,
            torch.zeros_like(mask),
            num_targets=number,
        )
        assert found.loss.item() == 0
        assert set(found.metrics.values()) == {0.0}
        for gradient in gradients(found.loss, hidden, head):
            assert gradient.eq(0).all()


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_distillation_loss_memory(kind):
    """Nothing of the size tokens x vocabulary is ever made, forward or backward."""
    length, vocabulary, width, chunk = 257, 509, 8, 16
    hidden = torch.randn(1, length, width, requires_grad=True)
    head = torch.randn(vocabulary, width, requires_grad=True)
    ids = torch.randint(vocabulary, (1, length))
    mask = torch.ones(1, length - 1, dtype=torch.bool)
    options = {"num_targets": length - 1, "chunk_tokens": chunk}
    with _Largest() as watch:
        if kind is None:
            found = cross_entropy_loss(hidden, head, ids, mask, **options)
        else:
            other = torch.randn_like(hidden)
            found = distillation_loss(
                hidden, head, other, head, ids, mask, kind=kind, ce_weight=0.5, **options
            )
        found.loss.backward()
    assert chunk * vocabulary == watch.elements
    assert watch.elements < (length - 1) * vocabulary / 10


def test_distillation_loss_bfloat16_states():
    """bfloat16 states and autocast: logits are still float32 products of the rounded states."""
    parts = case(torch.bfloat16)
    number = int(parts[-1].sum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_loss(*parts, num_targets=number)
    exact = distillation_loss(
        *(p.double() if p.is_floating_point() else p for p in parts), num_targets=number
    )
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    for gradient, wanted in zip(
        gradients(found.loss, *parts[:2]), gradients(exact.loss, *parts[:2]), strict=True
    ):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), wanted.double(), rtol=1e-2, atol=1e-4)


def test_distillation_loss_frozen_inputs():
    """A frozen head, a frozen body, and no gradient at all give the same loss."""
    hidden, head, *rest = case()
    whole = distillation_loss(hidden, head, *rest, num_targets=9)
    wanted = gradients(whole.loss, hidden, head)
    body = distillation_loss(hidden, head.detach(), *rest, num_targets=9)
    assert torch.equal(gradients(body.loss, hidden)[0], wanted[0])
    only_head = distillation_loss(hidden.detach(), head, *rest, num_targets=9)
    assert torch.equal(gradients(only_head.loss, head)[0], wanted[1])
    with torch.no_grad():
        measured = distillation_loss(hidden, head, *rest, num_targets=9)
    assert not measured.loss.requires_grad
    assert body.loss == only_head.loss == measured.loss == whole.loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind: 'kl' is unknown; accepted: reverse_kl, forward_kl, jsd"),
        ({"beta": 1.5}, "beta: 1.5 must lie between"),
        ({"temperature": 0.0}, "temperature: 0.0 must be > 0"),
        ({"chunk_tokens": 0}, "chunk_tokens: 0 must be >= 1"),
        ({"num_targets": 0}, "num_targets: 0, but the mask counts"),
    ],
)
def test_distillation_loss_bad_option(change, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(*case(), **{"num_targets": 9, **change})


def test_distillation_loss_bad_vocabulary():
    parts = list(case(student_rows=VOCAB - 2))
    message = f"teacher's head has {VOCAB} rows, the student's only {VOCAB - 2}.*vocab_size={VOCAB}"
    with pytest.raises(ValueError, match=message):
        distillation_loss(*parts, num_targets=9)
    parts = list(case(student_rows=VOCAB + 2))
    parts[4] = torch.full_like(parts[4], VOCAB)
    with pytest.raises(ValueError, match=f"token {VOCAB} lies outside of the vocabulary"):
        distillation_loss(*parts, num_targets=9)
    with pytest.raises(ValueError, match="mask: shape"):
        distillation_loss(*case()[:5], torch.ones(ROWS, LENGTH, dtype=torch.bool), num_targets=9)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_cross_entropy_loss(chunk_tokens):
    hidden, head, _, _, ids, mask = case(student_rows=VOCAB + 3)
    number = int(mask.sum()) + 4  # others on another rank
    logits = (hidden[:, :-1] @ head.T)[mask]
    targets = ids[:, 1:][mask]
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    found = cross_entropy_loss(
        hidden, head, ids, mask, num_targets=number, chunk_tokens=chunk_tokens
    )
    torch.testing.assert_close(found.loss, wanted / number, rtol=1e-12, atol=0)
    for mine, theirs in zip(
        gradients(found.loss, hidden, head),
        gradients(wanted / number, hidden, head),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert found.metrics == {
        "cross_entropy": pytest.approx(wanted.item()),
        "top1_accuracy": float((logits.argmax(-1) == targets).sum()),
        "num_targets": float(mask.sum()),
    }
