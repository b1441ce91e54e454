"""First weights: what is copied, what is refused, and that no layer replaced is the teacher."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.distill.students.models import packed, random_documents
from thinkfast_distill import students
from thinkfast_distill.init_from_teacher import (
    OPEN_GATE,
    expand_heads,
    initialise,
    slice_order,
)
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
EPS = 1e-5


def teacher_of(seed=0, model_type="llama", **changes):
    """A random Hugging Face model whose norms, biases and head are not trivial."""
    torch.manual_seed(seed)
    fields = {**SIZES, **HEADS, "rms_norm_eps": EPS, **changes}
    if model_type == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**fields))
    else:
        model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def llamba(**changes):
    fields = {"num_heads": 6, "n_groups": 6, "ssm_state_size": 8, **SIZES, **changes}
    return students.build(LlambaConfig(**fields))


def hybrid(version, **changes):
    """Mamba-2 with the attention's heads, or Mamba-1 with slices of 4 of its 8 channels."""
    heads = (6, 2, 8) if version == "mamba2" else (12, 4, 4)
    names = ("mamba_num_heads", "mamba_n_groups", "ssm_state_size")
    fields = {**SIZES, **HEADS, "rms_norm_eps": EPS, "mamba_version": version}
    fields.update(zip(names, heads, strict=True))
    return students.build(MambaInLlamaConfig(**{**fields, **changes}))


def mean_kl(student, teacher, documents):
    """KL(teacher || student) per token, the teacher on each document alone."""
    with torch.no_grad():
        logits = student(packed([documents]))[0]
        alone = [teacher(torch.tensor([document])).logits[0] for document in documents]
    q, p = logits.double().log_softmax(-1), torch.cat(alone).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


TEACHERS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "llama3_rope": {"rope_parameters": ROPE},
    "wide_heads": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
}


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_all_attention_is_the_teacher(name):
    """With no layer replaced, nothing may differ."""
    options = dict(TEACHERS[name])
    teacher = teacher_of(**options)
    is_qwen2 = options.pop("model_type", None) == "qwen2"
    if is_qwen2:
        options["attention_bias"] = True
    options.setdefault("rope_parameters", dict(teacher.config.rope_parameters))
    student = hybrid("mamba2", attention_layers=[0, 1, 2], **options)
    initialise(student, teacher)
    assert abs(mean_kl(student, teacher, random_documents([50, 1, 23], 1, 61))) < 1e-6


def test_untied_student_of_a_tied_teacher():
    teacher = teacher_of()
    student = hybrid("mamba2", attention_layers=[0, 1, 2], tie_word_embeddings=False)
    initialise(student, teacher)
    assert abs(mean_kl(student, teacher, random_documents([30], 1, 61))) < 1e-6


@pytest.mark.parametrize("how", ["mohawk", "qkvo", "random"])
@pytest.mark.parametrize("kind", ["llamba", "mamba1", "mamba2"])
def test_everything_but_mixers_is_copied(kind, how):
    teacher = teacher_of()
    student = llamba() if kind == "llamba" else hybrid(kind, attention_layers=[1])
    initialise(student, teacher, how=how, seed=1)
    given = teacher.state_dict()
    copied = 0
    for name, tensor in student.state_dict().items():
        if ".mixer." in name or ".mamba." in name:
            assert tensor.isfinite().all(), name
        else:
            assert torch.equal(tensor, given[name]), name
            copied += 1
    assert copied == 1 + 1 + 1 + 3 * 5 + (0 if kind == "llamba" else 4)


@pytest.mark.parametrize("how", ["mohawk", "qkvo", "random"])
def test_seed(how):
    teacher, found = teacher_of(), []
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        student = hybrid("mamba1")
        torch.set_rng_state(before)
        initialise(student, teacher, how=how, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_expand_heads_repeats_heads_not_rows():
    """Query head h shares the keys of key/value head h // groups."""
    head_dim, kv_heads, num_heads = 4, 2, 6
    keys = torch.randn(kv_heads * head_dim, 5)
    expanded = expand_heads(keys, head_dim, num_heads)
    for h in range(num_heads):
        kv = h // (num_heads // kv_heads)
        ours = expanded[h * head_dim : (h + 1) * head_dim]
        assert torch.equal(ours, keys[kv * head_dim : (kv + 1) * head_dim])
    assert not torch.equal(expanded, keys.repeat_interleave(num_heads // kv_heads, dim=0))


def test_slice_order():
    """Consecutive slices share a key/value slice: of the same head, at the same place."""
    heads, kv_heads, head_dim, width = 6, 2, 8, 4
    order = slice_order(heads, kv_heads, head_dim, width)
    assert sorted(order.tolist()) == list(range(heads * head_dim))
    times = heads // kv_heads
    for place, channel in enumerate(order.tolist()):
        kv_slice, (head, inside) = place // width // times, divmod(channel, head_dim)
        assert (head // times, inside // width) == divmod(kv_slice, head_dim // width)
        assert inside % width == place % width
    assert torch.equal(slice_order(heads, kv_heads, head_dim, head_dim), torch.arange(48))


def linear_attention(teacher, hidden):
    """The teacher's attention of layer 0 with neither softmax, RoPE nor forgetting, [L, D]."""
    block = teacher.model.layers[0]
    u = block.input_layernorm(hidden)
    attention = block.self_attn
    heads, head_dim = teacher.config.num_attention_heads, attention.head_dim
    q = attention.q_proj(u).unflatten(-1, (heads, head_dim))
    k, v = (
        p(u).unflatten(-1, (-1, head_dim)).repeat_interleave(heads // 2, dim=1)
        for p in (attention.k_proj, attention.v_proj)
    )
    scores = torch.einsum("lhd,mhd->hlm", q, k).tril() * head_dim**-0.5
    return attention.o_proj(torch.einsum("hlm,mhd->lhd", scores, v).flatten(1))


LINEAR_ATTENTION = {
    "llama": ({}, {}),
    "qwen2": ({"model_type": "qwen2"}, {}),
    "biases": ({"attention_bias": True}, {"use_bias": True}),
}
"""Changes to the teacher and to the student."""


@pytest.mark.parametrize("name", sorted(LINEAR_ATTENTION))
def test_qkvo_llamba_is_linear_attention(name):
    """Where nothing is forgotten and D is 0, the copied mixer is attention without softmax."""
    of_teacher, of_student = LINEAR_ATTENTION[name]
    teacher = teacher_of(**of_teacher)
    student = llamba(**of_student)
    initialise(student, teacher, how="qkvo", seed=3)
    mixer = student.blocks()[0].mixer
    batch = packed([random_documents([20], 2, 61)])
    with torch.no_grad():
        hidden = student.embed(batch.input_ids)
        mixer.D.zero_()
        never_forgets = torch.full((1, 20, 6), -1e-9)
        x, B, C, z, _ = mixer._project(student.blocks()[0].input_layernorm(hidden), _borders(batch))
        y = mixer._ssd(x, never_forgets, B, C, _borders(batch)).flatten(2)
        z = z if mixer.z_bias is None else z + mixer.z_bias
        found = mixer.out_proj(y * torch.nn.functional.silu(z))[0]
        expected = linear_attention(teacher, hidden[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def _borders(batch):
    from thinkfast_distill.students.borders import Boundaries

    return Boundaries(batch)


@pytest.mark.parametrize("full_groups", [False, True])
@pytest.mark.parametrize("version", ["mamba1", "mamba2"])
def test_qkvo_hybrid_pairs_slices_of_the_same_head(version, full_groups):
    """x, B, C and out_proj of one slice belong to one head of the teacher."""
    teacher = teacher_of()
    changes = {"mamba_n_groups": 12 if version == "mamba1" else 6} if full_groups else {}
    student = hybrid(version, **changes)
    initialise(student, teacher, how="qkvo", seed=3)
    mixer, attention = student.blocks()[0].mamba, teacher.model.layers[0].self_attn
    rows, width = mixer.rows(), mixer.ssm_state_size
    x, B, C = (mixer.in_proj.weight[rows[part]].unflatten(0, (-1, width)) for part in "xBC")
    out = mixer.out_proj.weight.T.unflatten(0, (-1, width))
    q, k, v = (
        p.weight.unflatten(0, (-1, width)) for p in (attention.q_proj, attention.k_proj,
                                                     attention.v_proj)
    )  # fmt: skip
    o = attention.o_proj.weight.T.unflatten(0, (-1, width))
    slices, times = 8 // width, C.shape[0] // x.shape[0]
    seen = set()
    for place in range(C.shape[0]):
        source = next(i for i in range(len(q)) if torch.equal(C[place], q[i] * 8**-0.5))
        head, inside = divmod(source, slices)
        shared = head // 3 * slices + inside  # three query heads share keys and values
        assert torch.equal(x[place // times], v[shared])
        assert torch.equal(B[place // times], k[shared])
        assert torch.equal(out[place], o[source])
        seen.add(source)
    assert len(seen) == C.shape[0]


def test_mohawk_llamba():
    student = llamba()
    initialise(student, teacher_of(), how="mohawk", seed=1)
    for block in student.blocks():
        mixer = block.mixer
        u = torch.randn(1, 9, mixer.conv1d.weight.shape[0])
        batch = packed([random_documents([9], 1)])
        assert torch.equal(mixer.conv1d(u, _borders(batch)), u)
        assert mixer.in_proj.weight[mixer.rows()["z"]].abs().max() == 0
        assert torch.nn.functional.silu(mixer.z_bias[0]).item() == pytest.approx(1, abs=1e-6)
        assert (mixer.D == 1).all()
        rest = mixer.in_proj.weight[: mixer.rows()["z"].start]
        assert rest.std().item() == pytest.approx(48**-0.5 / 3**0.5, rel=0.05)


def test_mohawk_llamba_with_projection_biases():
    student = llamba(use_bias=True)
    initialise(student, teacher_of(), how="mohawk", seed=1)
    mixer = student.blocks()[0].mixer
    assert (mixer.in_proj.bias[mixer.rows()["z"]] == OPEN_GATE).all()


@pytest.mark.parametrize("kind", ["llamba", "mamba2"])
def test_qkvo_keeps_all_biases_of_a_llama(kind):
    """attention_bias: in the rows of the projections, q with the scale of the attention."""
    teacher = teacher_of(attention_bias=True)
    student = llamba(use_bias=True) if kind == "llamba" else hybrid("mamba2", use_bias=True)
    initialise(student, teacher, how="qkvo", seed=1)
    for block, given in zip(student.blocks(), teacher.model.layers, strict=True):
        mixer, attention = block.token_mixer, given.self_attn
        rows, bias = mixer.rows(), mixer.in_proj.bias
        groups = 6 if kind == "llamba" else 2
        assert torch.equal(mixer.out_proj.bias, attention.o_proj.bias)
        assert torch.equal(bias[rows["x"]], expand_heads(attention.v_proj.bias, 8, groups))
        assert torch.equal(bias[rows["B"]], expand_heads(attention.k_proj.bias, 8, groups))
        assert torch.equal(bias[rows["C"]], attention.q_proj.bias * 8**-0.5)


def test_fresh_recurrence_is_the_published():
    """A, D and step sizes of hybrids, whatever the projections start from."""
    for how in ("random", "mohawk", "qkvo"):
        mamba1, mamba2 = hybrid("mamba1"), hybrid("mamba2")
        for student in (mamba1, mamba2):
            initialise(student, teacher_of(), how=how, seed=1)
        one, two = mamba1.blocks()[0].mamba, mamba2.blocks()[0].mamba
        torch.testing.assert_close(one.A_log.exp(), torch.arange(1.0, 5.0).expand(48, 4))
        steps = torch.nn.functional.softplus(one.dt_proj.bias)
        assert steps.min() >= 1e-3 * 0.999
        assert steps.max() <= 1e-1 * 1.001
        assert one.dt_proj.weight.abs().max() <= 3**-0.5  # rank ceil(48 / 16)
        assert two.A_log.exp().min() >= 1
        assert two.A_log.exp().max() <= 16
        steps = torch.nn.functional.softplus(two.dt_bias)
        assert steps.min() >= 1e-3 * 0.999
        assert steps.max() <= 1e-1 * 1.001
        assert (one.D == 1).all()
        assert (two.D == 1).all()


def test_qwen2_biases_reach_mamba2():
    """What the convolution makes of biased projections, away from the start of a document."""
    teacher = teacher_of(model_type="qwen2")
    for repeat in (False, True):
        student = hybrid("mamba2", repeat_kv_before_conv=repeat)
        initialise(student, teacher, how="qkvo", seed=1)
        conv = student.blocks()[2].mamba.conv1d
        attention = teacher.model.layers[2].self_attn
        x, B, C = attention.v_proj.bias, attention.k_proj.bias, attention.q_proj.bias * 8**-0.5
        if repeat:
            x, B = expand_heads(x, 8, 6), expand_heads(B, 8, 6)
        biased = torch.cat([x, B, C]).expand(1, 9, -1)
        found = conv(torch.zeros(1, 9, biased.shape[-1]), _borders(packed([[[5] * 9]])))
        teacher_without = teacher_of(model_type="qwen2")
        for layer in teacher_without.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj,
                               layer.self_attn.v_proj):  # fmt: skip
                projection.bias.data.zero_()
        plain = hybrid("mamba2", repeat_kv_before_conv=repeat)
        initialise(plain, teacher_without, how="qkvo", seed=1)
        expected = plain.blocks()[2].mamba.conv1d(biased, _borders(packed([[[5] * 9]])))
        torch.testing.assert_close(found[:, 3:], expected[:, 3:])


@pytest.mark.parametrize(
    ("make", "teacher", "how", "message"),
    [
        (lambda: llamba(hidden_size=96), {}, "mohawk", "hidden_size: the student has 96"),
        (lambda: llamba(num_hidden_layers=2), {}, "mohawk", "num_hidden_layers: the student has 2"),
        (lambda: llamba(vocab_size=64), {}, "mohawk", "vocab_size: the student has 64"),
        (llamba, {"tie_word_embeddings": False}, "mohawk", "tie_word_embeddings"),
        (llamba, {"mlp_bias": True}, "mohawk", "mlp.*no place"),
        (lambda: llamba(ssm_state_size=16), {}, "qkvo", "needs a Llamba mixer.*mohawk"),
        (lambda: llamba(n_groups=2), {}, "qkvo", "needs a Llamba mixer"),
        (llamba, {"head_dim": 16}, "qkvo", "needs a Llamba mixer"),
        (llamba, {"attention_bias": True}, "qkvo", "o_proj.bias has no place.*use_bias: true"),
        (lambda: hybrid("mamba2"), {"attention_bias": True}, "qkvo", "use_bias: true"),
        (lambda: hybrid("mamba1"), {"attention_bias": True}, "qkvo",
         "o_proj.bias has no place.*mamba2"),
        (lambda: llamba(use_conv_bias=False), {"model_type": "qwen2"}, "qkvo", "no place"),
        (lambda: hybrid("mamba1"), {"model_type": "qwen2"}, "qkvo", "no place"),
        (lambda: hybrid("mamba2", ssm_state_size=16, mamba_num_heads=3, mamba_n_groups=1), {},
         "qkvo", "divides head_dim=8"),
        (lambda: hybrid("mamba2", attention_layers=[0]), {"rope_parameters": ROPE}, "mohawk",
         "rope_parameters"),
        (lambda: hybrid("mamba2", attention_layers=[0], num_key_value_heads=3), {}, "mohawk",
         "num_key_value_heads"),
        (lambda: hybrid("mamba2", attention_layers=[0]), {"model_type": "qwen2"}, "mohawk",
         "no place for.*attention_bias"),
        (llamba, {}, "copy", "accepted: mohawk, qkvo, random"),
    ],
)  # fmt: skip
def test_refused(make, teacher, how, message):
    with pytest.raises(ValueError, match=message):
        initialise(make(), teacher_of(**teacher), how=how)
