"""Cross-entropy stages against transformers' loss."""

import pytest
import torch
from transformers import LlamaConfig

from tests.distill.stages import models
from thinkfast_distill.llama_student import LlamaStudent
from thinkfast_distill.stages import build, normalised


def llama():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return LlamaStudent(LlamaConfig(**models.SIZES, **models.ATTENTION)).double()


CASES = {
    "sft-llamba": ("sft", models.llamba),
    "sft-hybrid": ("sft", lambda: models.hybrid(version="mamba1")),
    "pretrain": ("pretrain", llama),
}


@pytest.fixture(params=CASES)
def stage(request):
    kind, make = CASES[request.param]
    return build(models.config(kind), make(), None)


def test_backward_autograd(stage):
    """Only completion tokens whose predecessor is of the same document count."""
    batch, student = models.batch(), stage.student
    models.freeze(stage)
    number = stage.count(batch)
    sums = stage.backward(batch, number)
    found = models.gradients(student)
    models.freeze(stage)
    logits = student.hidden(batch) @ student.head_weight().T
    labels = batch.input_ids.masked_fill(~batch.loss_mask | (batch.position_ids == 0), -100)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    loss.backward()
    assert number == (labels[:, 1:] != -100).sum() == 11
    assert sums["loss"] / number == pytest.approx(loss.item(), rel=1e-9)
    assert set(found) == {n for n, _ in student.named_parameters()}
    models.assert_same_gradients(found, models.gradients(student))


def test_micro_batches(stage):
    models.check_micro_batches(stage, models.batch())
    models.check_evaluate(stage, models.batch())


def test_training(stage):
    batch = models.batch()
    before = normalised(stage.kind, stage.evaluate(batch))
    losses = models.train(stage, batch, num_steps=40)
    after = normalised(stage.kind, stage.evaluate(batch))
    assert losses[-1] < 0.5 * losses[0]
    assert after["loss"] == after["cross_entropy"] < before["cross_entropy"]
    assert after["top1_accuracy"] > max(before["top1_accuracy"], 0.5)
