"""Students against the published models' oracle, packed against separate, and their methods."""

import pytest
import torch

from tests.distill.students.models import (
    config_of,
    load_student,
    packed,
    random_documents,
    random_student,
)
from tests.reference.published_models import reference_logits
from tests.reference.random_checkpoints import VARIANTS, write_checkpoint
from thinkfast_distill import students
from thinkfast_distill.students.attention import masked_attention
from thinkfast_distill.students.borders import Boundaries
from vllm_thinkfast.checkpoints.reader import house_shapes

KINDS = ["llamba", "mamba1", "mamba2"]

ODD = {
    "llamba": {"conv_kernel": 3, "use_bias": True, "mlp_bias": True, "lm_head_bias": True,
               "tie_word_embeddings": False, "mixer_activation": "silu", "expand": 2},
    "mamba1": {"repeat_kv_before_conv": False, "proj_x_bias": True, "proj_z_bias": True,
               "out_proj_bias": True, "attention_bias": True, "mlp_bias": True},
    "mamba2": {"repeat_kv_before_conv": True, "d_has_head_dim": True, "norm_before_gate": True,
               "time_step_limit": [0.01, 0.5], "use_bias": True, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_logits_are_the_published_models(name, tmp_path):
    """Every option of every published format, in float32, one token to several chunks long."""
    fmt, options = VARIANTS[name]
    folder = write_checkpoint(tmp_path / "ckpt", fmt, seed=3, **options)
    student = load_student(folder, torch.float32)
    documents = random_documents([1, 40, 87], seed=2, vocab_size=150)
    with torch.no_grad():
        found = student(packed([documents]))[0].split([1, 40, 87])
    for document, logits in zip(documents, found, strict=True):
        error = (logits.double() - reference_logits(folder, document)).abs()
        assert error.max() <= 1e-4, f"{len(document)} tokens: max error {error.max():.2e}"


@pytest.mark.parametrize("name", ["llamba_grouped", "mamba1_pure", "mamba2_pure_no_groups"])
def test_logits_are_the_published_models_float64(name, tmp_path):
    """Without RoPE, whose tables transformers keeps in float32, nothing but rounding is left."""
    fmt, options = VARIANTS[name]
    folder = write_checkpoint(tmp_path / "ckpt", fmt, seed=4, **options)
    (document,) = random_documents([150], seed=3, vocab_size=150)
    with torch.no_grad():
        found = load_student(folder)(packed([[document]]))[0]
    error = (found - reference_logits(folder, document)).abs()
    # Beyond 20, torch's softplus is the identity: 2e-9.
    assert error.max() <= 5e-8, f"max error {error.max():.2e}"


@pytest.mark.parametrize("changes", [{}, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_separate(kind, changes):
    """Logits, and gradients of all parameters."""
    changes = changes.get(kind, {})
    student = random_student(kind, **changes)
    rows = [random_documents(lengths, seed=1) for lengths in ([70, 1, 2, 60], [3, 5], [128])]
    batch = packed(rows, pad_to=140)
    logits = student(batch)
    loss = logits.new_zeros(())
    for row, row_logits, ids in zip(rows, logits, batch.document_ids, strict=True):
        for d in range(len(row)):
            loss = loss + row_logits[ids == d].square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    loss = logits.new_zeros(())
    for row, row_logits, ids in zip(rows, logits, batch.document_ids, strict=True):
        for d, document in enumerate(row):
            alone = student(packed([[document]]))[0]
            torch.testing.assert_close(row_logits[ids == d], alone, atol=1e-5, rtol=0)
            loss = loss + alone.square().mean()
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad.abs().sum() > 0, f"{name}: no gradient"
        scale = max(1.0, float(parameter.grad.abs().max()))
        error = (gradients[name] - parameter.grad).abs().max()
        assert error <= 1e-5 * scale, f"{name}: max error {error:.2e}, largest {scale:.2e}"


@pytest.mark.parametrize("changes", [{}, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_house_shapes(kind, changes):
    config = config_of(kind, **changes.get(kind, {}))
    student = students.build(config)
    found = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    assert found == house_shapes(config)
    if config.tie_word_embeddings:
        assert student.head_weight() is student.model.embed_tokens.weight
        assert "lm_head.weight" not in dict(student.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer(kind):
    """``embed`` and ``layer`` make ``hidden``; ``mixer`` is the first half of ``layer``."""
    student = random_student(kind)
    batch = packed([random_documents([20, 9], seed=3)])
    hidden = student.embed(batch.input_ids)
    for i in range(student.num_layers):
        block = student.model.layers[i]
        middle = hidden + student.mixer(i, hidden, batch)
        after = middle + block.mlp(block.post_attention_layernorm(middle))
        mixed, both = student.mixer_and_layer(i, hidden, batch)
        assert torch.equal(mixed, student.mixer(i, hidden, batch))
        hidden = student.layer(i, hidden, batch)
        assert torch.equal(both, hidden)
        torch.testing.assert_close(hidden, after)
    normed = student.hidden(batch)
    torch.testing.assert_close(normed, student.model.norm(hidden))
    torch.testing.assert_close(normed @ student.head_weight().T, student(batch))
    assert [student.is_attention(i) for i in range(student.num_layers)] == [
        kind != "llamba" and i == 1 for i in range(student.num_layers)
    ]


def test_repeated_heads_attend_as_groups():
    """The form for CUDA against the one for CPUs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, dtype=torch.float64) for heads in (6, 2, 2))
    visible = packed([random_documents([7, 5], seed=1)] * 2).same_document()[:, None]
    grouped, repeated = (
        masked_attention(q, k, v, visible, repeat_heads=repeat) for repeat in (False, True)
    )
    assert grouped.shape == q.shape
    torch.testing.assert_close(repeated, grouped)


@pytest.mark.parametrize("kind", ["llamba", "mamba2"])
def test_mixer_matrix_makes_the_mixer(kind):
    """The mixer is out_proj of gate(T x) with the matrix that stage 1 compares."""
    student = random_student(kind)
    batch = packed([random_documents([30, 41, 5], seed=4)], pad_to=80)
    hidden = student.embed(batch.input_ids)
    matrix = student.mixer_matrix(0, hidden, batch)
    assert matrix.shape == (1, 4, 80, 80)
    assert matrix.masked_select(~batch.same_document()[:, None]).abs().sum() == 0
    block = student.model.layers[0]
    mixer = block.get_submodule(block.mixer_name)
    x, *rest = mixer._project(block.input_layernorm(hidden), Boundaries(batch))
    if kind == "mamba2":
        z, x = x, rest[0]
    else:
        z = rest[2] + mixer.z_bias
    y = torch.einsum("bhlm,bmhp->blhp", matrix, x)
    gate = torch.nn.functional.silu(z).unflatten(-1, y.shape[2:])
    y = mixer.norm(y * gate) if kind == "mamba2" else y * gate
    torch.testing.assert_close(mixer.out_proj(y.flatten(2)), student.mixer(0, hidden, batch))


def test_mixer_matrix_refuses_what_has_none():
    batch = packed([random_documents([5], seed=5)])
    student = random_student("mamba1")
    hidden = student.embed(batch.input_ids)
    with pytest.raises(ValueError, match="Mamba-1 decays every channel"):
        student.mixer_matrix(0, hidden, batch)
    with pytest.raises(ValueError, match="keeps attention"):
        student.mixer_matrix(1, hidden, batch)
    student = random_student("mamba2", d_has_head_dim=True)
    with pytest.raises(ValueError, match="d_has_head_dim"):
        student.mixer_matrix(0, hidden, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_decay_logits_are_finite(kind):
    student = random_student(kind, dtype=torch.float32)
    batch = packed([random_documents([150], seed=6)])
    mixer = student.model.layers[0].get_submodule("mixer" if kind == "llamba" else "mamba")
    with torch.no_grad():
        mixer.in_proj.weight[mixer.rows()["dt"]] *= 200
    student(batch).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_bfloat16_autocast_keeps_the_recurrence():
    """Matrix products are rounded; a long memory is not lost."""
    student = random_student("llamba", dtype=torch.float32)
    batch = packed([random_documents([100], seed=7)])
    with torch.no_grad():
        plain = student(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = student(batch)
    error = (cast.float() - plain).norm() / plain.norm()
    assert error < 0.03, f"relative error {error:.3f}"


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_follow_the_seed(kind):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(students.build(config_of(kind)).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_build_on_meta_has_no_weights():
    with torch.device("meta"):
        student = students.build(config_of("mamba2"))
    assert all(p.is_meta for p in student.parameters())
