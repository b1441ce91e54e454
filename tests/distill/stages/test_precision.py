"""Stages in the precisions of real runs: bfloat16 autocast, bfloat16 teachers."""

import contextlib

import pytest
import torch

from tests.distill.stages import models
from thinkfast_distill import parts
from thinkfast_distill.stages import build, normalised

KINDS = ("matrix_mixing", "hidden_state", "end_to_end", "sft")


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_autocast", [False, True])
@pytest.mark.parametrize("name", ["llamba", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_bfloat16(kind, name, use_autocast, teacher_dtype):
    """Figures near those of float64; parameters and gradients stay float32."""
    batch, source = models.batch(), models.teacher()
    student = getattr(models, name)()
    settings = models.config(kind, mixer_output_weight=0.5 * (kind == "hidden_state"))
    wanted = normalised(kind, build(settings, student, source).evaluate(batch))
    objective = build(settings, student.float(), source.to(teacher_dtype))
    models.freeze(objective)
    context = torch.autocast("cpu", torch.bfloat16) if use_autocast else contextlib.nullcontext()
    with context:
        found = normalised(kind, objective.backward(batch, objective.count(batch)))
    assert found.keys() == wanted.keys()
    for key in wanted:
        if key.startswith("top1"):
            assert found[key] == pytest.approx(wanted[key], abs=0.2), key
        else:
            assert found[key] == pytest.approx(wanted[key], rel=0.03), key
    gradients = models.gradients(student)
    assert set(gradients) == set(objective.trainable_parameters())
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llamba", "hybrid"])
def test_backward_pass_leaves_autocast(kind, name):
    student = getattr(models, name)().float()
    objective = build(models.config(kind), student, models.teacher().float())
    models.freeze(objective)
    is_inside = []
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _: is_inside.append(torch.is_autocast_enabled("cpu")))
    batch = models.batch()
    with torch.autocast("cpu", torch.bfloat16):
        objective.backward(batch, objective.count(batch))
    assert is_inside
    assert not any(is_inside)


@pytest.mark.parametrize("version", ["mamba1", "mamba2"])
def test_recurrences_are_differentiated_in_float32(version):
    """Gradients in a stage's autocast are those of a backward pass that never saw it."""
    student, batch = models.hybrid(version=version).float(), models.batch()
    objective = build(models.config("sft"), student, None)
    models.freeze(objective)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective._loss(batch, batch.num_targets()).loss
    loss.backward()
    wanted = models.gradients(student)
    models.freeze(objective)
    with torch.autocast("cpu", torch.bfloat16):
        objective.backward(batch, batch.num_targets())
    models.assert_same_gradients(models.gradients(student), wanted, rtol=0, atol=0)


def test_recomputation_is_in_autocast():
    """Its gradients are those without, to the last bit."""
    batch, found = models.batch(), []
    for is_recomputed in (False, True):
        student = models.llamba().float()
        if is_recomputed:
            parts.checkpoint_blocks(student)
        objective = build(models.config("sft"), student, None)
        with torch.autocast("cpu", torch.bfloat16):
            objective.backward(batch, batch.num_targets())
        found.append(models.gradients(student))
    models.assert_same_gradients(*found, rtol=0, atol=0)
