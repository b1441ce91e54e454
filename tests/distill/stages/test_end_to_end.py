"""End-to-end distillation against the same loss written with whole logits."""

import pytest
import torch

from tests.distill.stages import models
from thinkfast_distill.config import LossConfig
from thinkfast_distill.stages import build, normalised

STUDENTS = {
    "llamba": models.llamba,
    "llamba-tied-padded": lambda: models.llamba(
        tie_word_embeddings=True, vocab_size=models.VOCAB + 5
    ),
    "mamba2": models.hybrid,
    "mamba1": lambda: models.hybrid(version="mamba1"),
}


def stage(student, teacher, *, freeze=(), train="default", **loss):
    settings = models.config("end_to_end", train=train, loss=LossConfig(**loss))
    return build(settings, student, teacher, freeze=freeze)


def teacher_logits(teacher, batch):
    """transformers' logits, documents alone."""
    found = torch.zeros(*batch.shape, models.VOCAB).double()
    for row in range(batch.shape[0]):
        for document in range(int(batch.document_ids[row].max()) + 1):
            index = (batch.document_ids[row] == document).nonzero().flatten()
            with torch.no_grad():
                found[row, index] = teacher.model(batch.input_ids[row : row + 1, index]).logits[0]
    return found


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("name", STUDENTS)
def test_backward_autograd(name, kind):
    """Loss and gradients of all parameters are those of whole logits, in any chunking."""
    teacher, student, batch = models.teacher(), STUDENTS[name](), models.batch()
    objective = stage(student, teacher, kind=kind, ce_weight=0.25, chunk_tokens=5)
    models.freeze(objective)
    number = objective.count(batch)
    sums = objective.backward(batch, number)
    found = models.gradients(student)
    models.freeze(objective)
    logits = student(batch)[..., : models.VOCAB]
    log_q, log_p = logits.log_softmax(-1), teacher_logits(teacher, batch).log_softmax(-1)
    first, second = (log_q, log_p) if kind == "reverse_kl" else (log_p, log_q)
    divergence = (first.exp() * (first - second)).sum(-1)
    loss, counted = 0.0, 0
    for row in range(3):
        for t in range(batch.shape[1] - 1):
            target = batch.input_ids[row, t + 1]
            is_same = batch.document_ids[row, t] == batch.document_ids[row, t + 1]
            if is_same and batch.loss_mask[row, t + 1]:
                loss = loss + divergence[row, t] - 0.25 * log_q[row, t, target]
                counted += 1
    (loss / counted).backward()
    assert counted == number == sums["num_targets"] > 10
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert set(found) == {n for n, _ in student.named_parameters()}
    wanted = models.gradients(student)
    models.assert_same_gradients(found, wanted, rtol=1e-5, atol=1e-7)
    assert all(gradient.any() for gradient in found.values())


def test_equal_models():
    """A hybrid that keeps all attention, with the teacher's weights, has no divergence."""
    teacher = models.teacher()
    student = models.hybrid(range(3), source=teacher)
    objective = stage(student, teacher)
    models.freeze(objective)
    sums = objective.backward(models.batch(), 11)
    figures = normalised("end_to_end", sums)
    assert abs(figures["reverse_kl"]) < 1e-6
    assert abs(figures["forward_kl"]) < 1e-6
    assert figures["top1_agreement"] == 1
    assert figures["cross_entropy"] == pytest.approx(figures["teacher_cross_entropy"], rel=1e-5)
    found = models.gradients(student)
    assert len(found) == len(list(student.named_parameters()))
    assert max(float(gradient.abs().max()) for gradient in found.values()) < 1e-5


@pytest.mark.parametrize("name", STUDENTS)
def test_micro_batches(name):
    objective = stage(STUDENTS[name](), models.teacher(), kind="jsd", beta=0.3, ce_weight=0.1)
    models.check_micro_batches(objective, models.batch())
    models.check_evaluate(objective, models.batch())


def test_no_targets():
    """A micro-batch without targets takes part with zero gradients: other ranks wait for it."""
    student, batch = models.llamba(), models.batch()
    objective = stage(student, models.teacher())
    models.freeze(objective)
    batch.loss_mask[:] = False
    sums = objective.backward(batch, 40)
    assert set(sums.values()) == {0.0}
    found = models.gradients(student)
    assert set(found) == set(objective.trainable_parameters())
    assert not any(gradient.any() for gradient in found.values())
    assert normalised("end_to_end", sums) == {}


@pytest.mark.parametrize("name", STUDENTS)
def test_training(name):
    """One batch is learned; the divergence falls with it."""
    objective = stage(STUDENTS[name](), models.teacher())
    batch = models.batch()
    before = normalised("end_to_end", objective.evaluate(batch))
    losses = models.train(objective, batch, num_steps=40)
    after = normalised("end_to_end", objective.evaluate(batch))
    assert losses[-1] < 0.5 * losses[0]
    assert after["forward_kl"] < before["forward_kl"]
    assert after["loss"] == pytest.approx(after["reverse_kl"])


def test_trainable_parameters():
    teacher, student = models.teacher(), models.hybrid()
    names = [n for n, _ in student.named_parameters()]
    assert stage(student, teacher).trainable_parameters() == names
    mixers = stage(student, teacher, train="mixers").trainable_parameters()
    assert mixers == [n for n in names if ".mamba." in n]
    frozen = stage(student, teacher, freeze=["*.mlp.*", "lm_head.*"])
    wanted = [n for n in names if ".mlp." not in n and not n.startswith("lm_head.")]
    assert frozen.trainable_parameters() == wanted != names
    models.freeze(frozen)
    frozen.backward(models.batch(), 11)
    assert list(models.gradients(student)) == wanted


def test_build_bad_input():
    teacher = models.teacher()
    message = r"teacher's vocabulary has 23 tokens, the student's only 20.*vocab_size=23"
    with pytest.raises(ValueError, match=message):
        stage(models.llamba(vocab_size=20), teacher)
    with pytest.raises(ValueError, match=r"freeze: '\*\.mpl\.\*' matches no parameter"):
        stage(models.llamba(), teacher, freeze=["*.mpl.*"])
    with pytest.raises(ValueError, match=r"head has a bias.*lm_head_bias=False"):
        stage(models.llamba(lm_head_bias=True), teacher)
