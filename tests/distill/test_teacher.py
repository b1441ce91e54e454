"""The teacher run layer by layer against transformers' own forward pass."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.teacher import Teacher

SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama3-tied": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**SIZES, head_dim=10, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=3),
}


def model(name, dtype=torch.float64):
    """A random model whose biases and norms are not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = copy.deepcopy(CONFIGS[name])  # a model changes its configuration
        made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.to(dtype).eval()


def packed(lengths=((5, 4), (9,)), padding=2, seed=0):
    """Rows of documents of these lengths, then padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), sum(lengths[0]) + padding)
    positions = torch.zeros(shape, dtype=torch.int64)
    documents = torch.full(shape, -1, dtype=torch.int32)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for number, length in enumerate(row_lengths):
            positions[row, start : start + length] = torch.arange(length)
            documents[row, start : start + length] = number
            start += length
    return PackedBatch(
        input_ids=torch.randint(29, shape, generator=generator),
        position_ids=positions,
        document_ids=documents,
        loss_mask=documents >= 0,
        sample_ids=[[f"text:{row}.{n}" for n in range(len(r))] for row, r in enumerate(lengths)],
    )


def single(ids):
    """A batch of one document."""
    shape = ids.shape
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(shape[1]).expand(shape).clone(),
        document_ids=torch.zeros(shape, dtype=torch.int32),
        loss_mask=torch.ones(shape, dtype=torch.bool),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_huggingface(name):
    """States, attention weights and logits of a document are those of transformers."""
    reference = model(name)
    teacher = Teacher(model(name))
    ids = torch.randint(29, (2, 11), generator=torch.Generator().manual_seed(1))
    reference.config.tie_last_hidden_states = False  # else the last state is after the norm
    with torch.no_grad():
        matrices = reference(ids, output_attentions=True).attentions
        # transformers' eager softmax is float32 whatever the model's dtype is.
        reference.set_attn_implementation("sdpa")
        wanted = reference(ids, output_hidden_states=True)
        mixed = []
        for layer in reference.model.layers:
            layer.self_attn.register_forward_hook(lambda m, a, out: mixed.append(out[0]))
        reference(ids)
    batch = single(ids)
    seen = []
    for i, before, mixer_output, after in teacher.layers(batch):
        seen.append(i)
        torch.testing.assert_close(before, wanted.hidden_states[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after, wanted.hidden_states[i + 1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mixer_output, mixed[i], rtol=1e-10, atol=1e-10)
        matrix = teacher.attention_matrix(i, before, batch)
        torch.testing.assert_close(matrix, matrices[i], rtol=1e-4, atol=1e-6)
        assert not after.requires_grad
        assert torch.is_grad_enabled()
    assert seen == [0, 1, 2]
    logits = teacher.final_hidden(batch) @ teacher.head_weight().T
    torch.testing.assert_close(logits, wanted.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_packed(name):
    """A document in a packed row has the states it has alone; padding has no influence."""
    teacher = Teacher(model(name))
    batch = packed()
    final = teacher.final_hidden(batch)
    packed_layers = list(teacher.layers(batch))
    for row, part in ((0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 9))):
        alone = single(batch.input_ids[row : row + 1, part])
        torch.testing.assert_close(
            teacher.final_hidden(alone)[0], final[row, part], rtol=1e-10, atol=1e-10
        )
        layers = zip(packed_layers, teacher.layers(alone), strict=True)
        for (i, before, mixed, after), (_, *wanted) in layers:
            for mine, theirs in zip((before, mixed, after), wanted, strict=True):
                torch.testing.assert_close(mine[row, part], theirs[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                teacher.attention_matrix(i, before, batch)[row, :, part, part],
                teacher.attention_matrix(i, wanted[0], alone)[0],
                rtol=1e-10,
                atol=1e-10,
            )


def test_attention_matrix_packed():
    """Rows sum to one inside a document, zero everywhere else and on padding."""
    teacher = Teacher(model("llama3-tied"))
    batch = packed()
    for i, before, _, _ in teacher.layers(batch):
        matrix = teacher.attention_matrix(i, before, batch)
        assert matrix.shape == (2, 4, 11, 11)
        is_token = batch.is_token()
        allowed = batch.same_document() & is_token[:, :, None]
        assert matrix.masked_fill(allowed[:, None], 0.0).eq(0).all()
        torch.testing.assert_close(
            matrix.sum(-1), is_token[:, None].to(matrix.dtype).expand(2, 4, 11)
        )


def test_attention_matrix_bfloat16():
    """A bfloat16 teacher gives float32 matrices, and takes a student's float32 states."""
    teacher = Teacher(model("llama-head-dim", torch.bfloat16))
    exact = Teacher(model("llama-head-dim", torch.bfloat16).double())
    batch = packed()
    for i, before, _, after in teacher.layers(batch):
        assert after.dtype == torch.bfloat16
        matrix = teacher.attention_matrix(i, before.float(), batch)
        assert matrix.dtype == torch.float32
        wanted = exact.attention_matrix(i, before.double(), batch)
        assert (matrix - wanted).abs().max() < 0.05


def test_teacher_frozen():
    teacher = Teacher(model("qwen2"))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    names = [name for name, _ in teacher.named_parameters()]
    assert "model.model.layers.0.self_attn.q_proj.bias" in names
    assert (teacher.num_layers, teacher.num_heads) == (3, 4)


def test_layers_not_finite():
    """A NaN names the samples of its rows, and only those."""
    broken = model("llama3-tied")
    broken.model.embed_tokens.weight.data[28] = torch.nan
    teacher = Teacher(broken)
    batch = packed()
    batch.input_ids.clamp_(max=27)
    assert teacher.final_hidden(batch).isfinite().all()
    batch.input_ids[1, 3] = 28
    with pytest.raises(ValueError, match=r"not finite for samples text:1\.0; use"):
        teacher.final_hidden(batch)


@pytest.mark.parametrize("name", ["llama3-tied", "qwen2"])
def test_from_folder(name, tmp_path):
    saved = model(name, torch.float32)
    saved.save_pretrained(tmp_path)
    batch = packed()
    found = Teacher.from_folder(tmp_path, torch.float64)
    wanted = Teacher(saved.double())
    torch.testing.assert_close(found.final_hidden(batch), wanted.final_hidden(batch))
    assert torch.equal(found.head_weight(), wanted.head_weight())
    half = Teacher.from_folder(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_from_folder_missing_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    model("qwen2", torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, for example model\.layers\.1\.mlp"):
        Teacher.from_folder(tmp_path, torch.float32)


def test_from_folder_other_architecture(tmp_path):
    Qwen3Config(**SIZES).save_pretrained(tmp_path)
    message = "model_type 'qwen3' cannot be a teacher; accepted: llama, mistral, qwen2"
    with pytest.raises(ValueError, match=message):
        Teacher.from_folder(tmp_path, torch.float32)
