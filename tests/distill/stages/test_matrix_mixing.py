"""Matrix orientation against the same loss written as one graph."""

import pytest
import torch

from tests.distill.stages import models
from thinkfast_distill import students
from thinkfast_distill.stages import build, normalised

STUDENTS = {
    "llamba": models.llamba,
    "llamba-groups": lambda **changes: models.llamba(n_groups=2, use_bias=True, **changes),
    "hybrid": models.hybrid,
}


def stage(student, teacher, **changes):
    return build(models.config("matrix_mixing", **changes), student, teacher)


def attentions(teacher, row):
    """transformers' attention matrices of a row: layer -> (H, L, L), each document alone."""
    found = [torch.zeros(models.HEADS, *[row.input_ids.shape[1]] * 2).double() for _ in range(3)]
    teacher.model.set_attn_implementation("eager")
    for document in range(int(row.document_ids.max()) + 1):
        index = (row.document_ids[0] == document).nonzero().flatten()
        with torch.no_grad():
            output = teacher.model(row.input_ids[:, index], output_attentions=True)
        for i, matrix in enumerate(output.attentions):
            found[i][:, index[0] : index[-1] + 1, index[0] : index[-1] + 1] = matrix[0]
    teacher.model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("name", STUDENTS)
def test_backward_autograd(name):
    """Loss and gradients are those of one graph over all rows, heads and layers."""
    teacher, student, batch = models.teacher(), STUDENTS[name](), models.batch()
    objective = stage(student, teacher)
    models.freeze(objective)
    sums = objective.backward(batch, objective.count(batch))
    found = models.gradients(student)
    models.freeze(objective)
    layers = [i for i in range(3) if student.config.layers_block_type[i] == "mamba"]
    inputs = [before for _, before, _, _ in teacher.layers(batch)]
    made = {i: student.mixer_matrix(i, inputs[i], batch) for i in layers}
    norms = {i: [] for i in layers}
    for row, part in enumerate(batch.split(3)):
        wanted = attentions(teacher, part)
        is_seen = part.same_document()[0] & part.is_token()[0][:, None]
        for i in layers:
            difference = (made[i][row] - wanted[i]) * is_seen
            norms[i].append(difference.square().sum((-2, -1)).sqrt().mean())
    loss = sum(sum(n) for n in norms.values()) / 3
    loss.backward()
    assert sums["loss"] / sums["num_rows"] == pytest.approx(loss.item(), rel=1e-6)
    assert sums["num_rows"] == 3
    for i in layers:
        assert sums[f"alignment_{i}"] == pytest.approx(sum(norms[i]).item(), rel=1e-6)
    assert set(found) == set(objective.trainable_parameters())
    # transformers' softmax is float32.
    models.assert_same_gradients(found, models.gradients(student), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STUDENTS)
def test_trainable_parameters(name):
    """With ``train: all`` exactly the parameters that the loss reaches; by default mixers only."""
    teacher, student, batch = models.teacher(), STUDENTS[name](), models.batch()
    everything = stage(student, teacher, train="all")
    everything.backward(batch, 3)  # nothing is frozen
    reached = [n for n, gradient in models.gradients(student).items() if gradient.any()]
    assert reached == everything.trainable_parameters()
    norms = [n for n in reached if "input_layernorm" in n]
    assert norms
    default = stage(student, teacher).trainable_parameters()
    assert default == stage(student, teacher, train="mixers").trainable_parameters()
    assert set(reached) - set(default) == set(norms)


@pytest.mark.parametrize("name", STUDENTS)
def test_frozen_rows(name):
    """After steps with weight decay x and z are bit-equal; B, C, dt and the rest have moved."""
    teacher, student, batch = models.teacher(), STUDENTS[name](), models.batch()
    objective = stage(student, teacher)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    models.train(objective, batch, num_steps=3)
    trained = objective.trainable_parameters()
    for name, parameter in student.named_parameters():
        moved = (parameter != before[name]).flatten(1).any(1) if parameter.ndim > 1 else None
        if name not in trained:
            assert torch.equal(parameter, before[name]), name
        elif name.endswith("in_proj.weight"):
            mixer = student.get_submodule(name.removesuffix(".in_proj.weight"))
            for part, rows in mixer.rows().items():
                is_reached = part in ("B", "C", "dt")
                assert moved[rows].any() == moved[rows].all() == is_reached, (name, part)
        else:
            assert (parameter != before[name]).any(), name


def test_baseline():
    """A mixer of zeros has the loss ``baseline``, which is the norm of the attention."""
    teacher, student, batch = models.teacher(), models.llamba(), models.batch()
    with torch.no_grad():
        for i in range(3):
            mixer = student.model.layers[i].mixer
            mixer.D.zero_()
            mixer.in_proj.weight[mixer.rows()["C"]] = 0
            mixer.conv1d.bias.zero_()
    figures = normalised("matrix_mixing", stage(student, teacher).evaluate(batch))
    assert figures["loss"] == pytest.approx(figures["baseline"], rel=1e-9)
    assert figures["alignment"] == figures["loss"]
    assert figures["baseline"] == pytest.approx(sum(figures[f"baseline_{i}"] for i in range(3)))
    # Between the norm of uniform attention and that of attention to one token.
    assert 3 * 1 < figures["baseline"] < 3 * 9**0.5


def test_equal_matrices():
    """Zero loss has a finite gradient: the norm is not differentiable there."""
    teacher, student, batch = models.teacher(), models.llamba(), models.batch()
    objective = stage(student, teacher)
    models.freeze(objective)

    def matrix(i, hidden, batch):
        zero = 0.0 * sum(p.sum() for p in student.parameters() if p.requires_grad)
        return teacher.attention_matrix(i, hidden, batch) + zero

    student.mixer_matrix = matrix
    sums = objective.backward(batch, 3)
    assert sums["loss"] == 0
    assert all(gradient.eq(0).all() for gradient in models.gradients(student).values())


def test_padding():
    """More padding, and what stands on it, changes nothing; a row of padding is no row."""
    teacher, student = models.teacher(), models.llamba()
    objective = stage(student, teacher)
    short, long = models.batch(padding=1), models.batch(padding=5)
    long.input_ids[:, :10] = short.input_ids
    wanted, found = objective.evaluate(short), objective.evaluate(long)
    assert found == pytest.approx(wanted, rel=1e-9)
    long.document_ids[2] = -1
    assert objective.count(long) == 2
    first = objective.evaluate(next(long.split(3)))["loss"]
    second = objective.evaluate(list(long.split(3))[1])["loss"]
    assert objective.evaluate(long)["loss"] == pytest.approx(first + second)


@pytest.mark.parametrize("name", STUDENTS)
def test_micro_batches(name):
    sums = models.check_micro_batches(stage(STUDENTS[name](), models.teacher()), models.batch())
    assert sums["loss"] > 0
    models.check_evaluate(stage(STUDENTS[name](), models.teacher()), models.batch())


@pytest.mark.parametrize("name", STUDENTS)
def test_training(name):
    losses = models.train(stage(STUDENTS[name](), models.teacher()), models.batch())
    assert losses[-1] < 0.8 * losses[0]


def test_memory():
    """What autograd holds at once does not grow with the depth."""
    peaks = [
        models.saved_bytes(
            stage(
                models.llamba(num_hidden_layers=layers),
                models.teacher(num_hidden_layers=layers),
            ),
            models.batch(),
        )
        for layers in (2, 6)
    ]
    assert peaks[0] == peaks[1] > 0


def test_frozen_layer_is_left_out():
    teacher, student, batch = models.teacher(), models.llamba(), models.batch()
    objective = build(models.config("matrix_mixing"), student, teacher, freeze=["model.layers.1.*"])
    models.freeze(objective)
    assert objective.compared_layers() == [0, 2]
    sums = objective.backward(batch, objective.count(batch))
    assert "alignment_1" not in sums
    assert "alignment_2" in sums
    assert set(models.gradients(student)) == set(objective.trainable_parameters())


def test_build_bad_input():
    with pytest.raises(ValueError, match="matrix_mixing: a Mamba-1 mixer has a matrix per channel"):
        stage(models.hybrid(version="mamba1"), models.teacher())
    message = "mixers have 2 heads, the teacher's attention 4; set num_heads to 4"
    with pytest.raises(ValueError, match=message):
        stage(models.llamba(num_heads=2, n_groups=2), models.teacher())
    message = "num_hidden_layers of the student is 2, of the teacher 3"
    with pytest.raises(ValueError, match=message):
        stage(models.llamba(num_hidden_layers=2), models.teacher())


def test_trainable_parameters_without_weights():
    """Names are known before there are weights or a teacher, as ``--dry-run`` needs."""
    with torch.device("meta"):
        student = students.build(models.llamba().config)
    names = stage(student, None).trainable_parameters()
    assert names == stage(models.llamba(), models.teacher()).trainable_parameters()
