"""Hidden-state alignment against the same loss written as one graph."""

import pytest
import torch

from tests.distill.stages import models
from thinkfast_distill import students
from thinkfast_distill.stages import build, normalised

STUDENTS = {
    "llamba": models.llamba,
    "mamba2": models.hybrid,
    "mamba1": lambda **changes: models.hybrid(version="mamba1", **changes),
}


def stage(student, teacher, **changes):
    return build(models.config("hidden_state", **changes), student, teacher)


def raw_states(teacher, row):
    """transformers' states (layers + 1, L, D), none normalised, and attention outputs, of a row.

    Each document is run alone.
    """
    states = torch.zeros(4, row.input_ids.shape[1], models.WIDTH).double()
    mixed = torch.zeros(3, row.input_ids.shape[1], models.WIDTH).double()
    model = teacher.model
    model.config.tie_last_hidden_states = False  # else the last one is after the final norm
    for document in range(int(row.document_ids.max()) + 1):
        index = (row.document_ids[0] == document).nonzero().flatten()
        seen = []

        def note(module, inputs, output, seen=seen):
            seen.append(output[0][0])

        handles = [layer.self_attn.register_forward_hook(note) for layer in model.model.layers]
        with torch.no_grad():
            output = model(row.input_ids[:, index], output_hidden_states=True)
        for handle in handles:
            handle.remove()
        for i, hidden in enumerate(output.hidden_states):
            states[i, index] = hidden[0]
        for i, hidden in enumerate(seen):
            mixed[i, index] = hidden
    return states, mixed


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("train", ["default", "all"])
@pytest.mark.parametrize("name", STUDENTS)
def test_backward_autograd(name, train, weight):
    """Loss and gradients are those of one graph over all layers and tokens."""
    teacher, student, batch = models.teacher(), STUDENTS[name](), models.batch()
    objective = stage(student, teacher, train=train, mixer_output_weight=weight)
    models.freeze(objective)
    number = objective.count(batch)
    assert number == batch.is_token().sum() == 25
    sums = objective.backward(batch, number)
    found = models.gradients(student)
    models.freeze(objective)
    parts = [raw_states(teacher, row) for row in batch.split(3)]
    states = torch.stack([s for s, _ in parts], 1)
    mixed = torch.stack([m for _, m in parts], 1)
    kinds = student.config.layers_block_type
    layers = [i for i in range(3) if kinds[i] == "mamba" or train == "all"]
    token = batch.is_token()  # taken first: the norm has no gradient at padding, which is zero
    loss = 0.0
    for i in layers:
        error = (student.layer(i, states[i], batch) - states[i + 1])[token]
        loss = loss + error.square().sum(-1).sqrt().mean()
        error = (student.mixer(i, states[i], batch) - mixed[i])[token]
        loss = loss + weight * error.square().sum(-1).sqrt().mean()
    loss.backward()
    assert sums["loss"] / number == pytest.approx(loss.item(), rel=1e-6)
    assert set(found) == set(objective.trainable_parameters())
    models.assert_same_gradients(found, models.gradients(student), rtol=1e-5, atol=1e-7)
    baselines = [(states[i + 1] - states[i])[batch.is_token()].norm(dim=-1).sum() for i in range(3)]
    for i in layers:
        assert sums[f"baseline_{i}"] == pytest.approx(baselines[i].item(), rel=1e-6)
    assert ("mixer_alignment" in sums) == (weight > 0)


@pytest.mark.parametrize("name", STUDENTS)
def test_trainable_parameters(name):
    teacher, student = models.teacher(), STUDENTS[name]()
    everything = stage(student, teacher, train="all")
    everything.backward(models.batch(), 25)  # nothing is frozen
    reached = [n for n, gradient in models.gradients(student).items() if gradient.any()]
    assert reached == everything.trainable_parameters()
    assert any(".mlp." in name for name in reached)
    mixers = [n for n in reached if ".mixer." in n or ".mamba." in n]
    assert stage(student, teacher).trainable_parameters() == mixers
    assert not stage(student, teacher).partly_trained_parameters()


def test_equal_models():
    """A hybrid that keeps all attention is the teacher: no loss in any layer, also in the last.

    The norm is not differentiable there, the gradients are finite nevertheless.
    """
    teacher = models.teacher()
    student = models.hybrid(range(3), source=teacher)
    objective = stage(student, teacher, train="all")
    models.freeze(objective)
    sums = objective.backward(models.batch(), 25)
    figures = normalised("hidden_state", sums)
    assert set(figures) >= {"alignment_0", "alignment_1", "alignment_2"}
    assert figures["loss"] < 1e-5 * figures["baseline"]
    found = models.gradients(student)
    assert found
    assert all(gradient.isfinite().all() for gradient in found.values())
    with pytest.raises(ValueError, match=r"hidden_state: nothing is trained: train=default"):
        stage(student, teacher)


def test_the_mixer_runs_once():
    """Also with ``mixer_output_weight``, which needs its output and the layer's."""
    student = models.llamba()
    calls = []
    for block in student.model.layers:
        block.mixer.register_forward_hook(lambda *_: calls.append(1))
    stage(student, models.teacher(), mixer_output_weight=1.0).backward(models.batch(), 25)
    assert len(calls) == len(student.model.layers)


def test_baseline():
    """A student whose layers add nothing has the loss ``baseline``."""
    teacher, student = models.teacher(), models.llamba()
    with torch.no_grad():
        for block in student.model.layers:
            block.mixer.out_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    objective = stage(student, teacher, mixer_output_weight=1.0)
    figures = normalised("hidden_state", objective.evaluate(models.batch()))
    assert figures["alignment"] == pytest.approx(figures["baseline"], rel=1e-9)
    assert figures["mixer_alignment"] == pytest.approx(figures["mixer_baseline"], rel=1e-9)
    assert figures["loss"] == pytest.approx(figures["baseline"] + figures["mixer_baseline"])
    assert figures["num_tokens"] == 25


def test_targets_do_not_matter():
    """Prompts are aligned too: the loss mask of completions plays no part, padding none either."""
    teacher, student = models.teacher(), models.llamba()
    objective = stage(student, teacher)
    short, long = models.batch(padding=1), models.batch(padding=5)
    long.input_ids[:, :10] = short.input_ids
    wanted = objective.evaluate(short)
    assert objective.evaluate(long) == pytest.approx(wanted, rel=1e-9)
    long.loss_mask[:] = False
    assert objective.evaluate(long) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", STUDENTS)
def test_micro_batches(name):
    objective = stage(STUDENTS[name](), models.teacher(), mixer_output_weight=0.3)
    models.check_micro_batches(objective, models.batch())
    models.check_evaluate(objective, models.batch())


@pytest.mark.parametrize("name", STUDENTS)
def test_training(name):
    objective = stage(STUDENTS[name](), models.teacher(), mixer_output_weight=0.3)
    losses = models.train(objective, models.batch())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("train", ["mixers", "all"])
def test_memory(train):
    """What autograd holds at once does not grow with the depth."""
    peaks = [
        models.saved_bytes(
            stage(
                models.llamba(num_hidden_layers=layers),
                models.teacher(num_hidden_layers=layers),
                train=train,
            ),
            models.batch(),
        )
        for layers in (2, 6)
    ]
    assert peaks[0] == peaks[1] > 0


def test_trainable_parameters_without_weights():
    with torch.device("meta"):
        student = students.build(models.hybrid(version="mamba1").config)
    names = stage(student, None).trainable_parameters()
    assert names == stage(models.hybrid(version="mamba1"), models.teacher()).trainable_parameters()
    assert not any(name.startswith("model.layers.1.") for name in names)  # keeps its attention
