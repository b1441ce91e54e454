"""Stages in the precisions of real runs: bfloat16 autocast, bfloat16 teachers."""

import contextlib

import pytest
import torch

from tests.distill.stages import models
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
