"""Tiny teacher, real students and packed batches for the tests of the stages, all in float64."""

import weakref

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from thinkfast_distill import students
from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.config import StageConfig
from thinkfast_distill.teacher import Teacher
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

VOCAB, WIDTH, HEADS, HEAD_DIM, LAYERS = 23, 16, 4, 4, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-5,
}
ATTENTION = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "max_position_embeddings": 64,
}


def teacher(seed=0, **changes):
    """A random Llama."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **ATTENTION, **changes}))
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return Teacher(model.double())


def _filled(student, seed):
    """Gives every parameter a value that is nothing special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise + float("norm" in name))
    return student.double()


def llamba(seed=1, **changes):
    """A Llamba with as many heads as the teacher."""
    layout = {"num_heads": HEADS, "n_groups": HEADS, "ssm_state_size": HEAD_DIM, "chunk_size": 4}
    return _filled(students.build(LlambaConfig(**{**SIZES, **layout, **changes})), seed)


def hybrid(attention_layers=(1,), version="mamba2", seed=1, *, source=None, **changes):
    """A MambaInLlama; with ``source`` all weights that the teacher has too are the teacher's."""
    layout = {
        "attention_layers": list(attention_layers),
        "mamba_version": version,
        "mamba_num_heads": HEADS,
        "mamba_n_groups": 2,
        "ssm_state_size": HEAD_DIM,
        "chunk_size": 4,
    }
    config = MambaInLlamaConfig(**{**SIZES, **ATTENTION, **layout, **changes})
    student = _filled(students.build(config), seed)
    if source is not None:
        own = student.state_dict()
        student.load_state_dict({k: source.model.state_dict().get(k, v) for k, v in own.items()})
    return student


def batch(lengths=((5, 4), (9,), (2, 2, 3)), padding=2, seed=0):
    """Rows of documents of these lengths, padded; some tokens are no targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(sum(row) for row in lengths) + padding)
    positions = torch.zeros(shape, dtype=torch.int64)
    documents = torch.full(shape, -1, dtype=torch.int32)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for number, length in enumerate(row_lengths):
            positions[row, start : start + length] = torch.arange(length)
            documents[row, start : start + length] = number
            start += length
    return PackedBatch(
        input_ids=torch.randint(VOCAB, shape, generator=generator),
        position_ids=positions,
        document_ids=documents,
        loss_mask=(documents >= 0) & (torch.rand(shape, generator=generator) < 0.7),
        sample_ids=[[f"text:{row}.{n}" for n in range(len(r))] for row, r in enumerate(lengths)],
        source_tokens={"text": int((documents >= 0).sum())},
    )


def config(kind, **changes):
    """A stage of a recipe."""
    sizes = {"data": "text", "tokens": 8, "batch_tokens": 8, "seq_len": 8, "lr": 1e-2}
    return StageConfig(kind=kind, **sizes, **changes)


def freeze(stage):
    """Does what the loop does before a stage."""
    names = set(stage.trainable_parameters())
    for name, parameter in stage.student.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None


def gradients(student):
    """Name -> gradient, for parameters that have one."""
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def assert_same_gradients(found, wanted, **tolerance):
    """Compares two results of ``gradients``."""
    assert found.keys() == wanted.keys()
    tolerance = {"rtol": 1e-8, "atol": 1e-11, **tolerance}
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, wanted[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_micro_batches(stage, whole):
    """Sums and gradients of unequal parts add up to those of the whole batch."""
    freeze(stage)
    number = stage.count(whole)
    sums = stage.backward(whole, number)
    wanted = gradients(stage.student)
    freeze(stage)
    added = dict.fromkeys(sums, 0.0)
    for part in whole.split(len(whole.input_ids)):
        for name, value in stage.backward(part, number).items():
            added[name] += value
    for name, value in sums.items():
        assert abs(added[name] - value) <= 1e-8 * (1 + abs(value)), name
    assert_same_gradients(gradients(stage.student), wanted)
    return sums


def check_evaluate(stage, whole):
    """``evaluate`` gives the sums of ``backward`` and leaves no gradient."""
    freeze(stage)
    measured = stage.evaluate(whole)
    assert not gradients(stage.student)
    sums = stage.backward(whole, stage.count(whole))
    assert measured.keys() == sums.keys()
    for name, value in sums.items():
        assert abs(measured[name] - value) <= 1e-9 * (1 + abs(value)), name


def train(stage, whole, num_steps=25, lr=1e-2):
    """A few AdamW steps as the loop makes them; the losses before each."""
    freeze(stage)
    names = set(stage.trainable_parameters())
    partly = set(stage.partly_trained_parameters())
    parameters = {n: p for n, p in stage.student.named_parameters() if n in names}
    groups = [
        {"params": [p for n, p in parameters.items() if n not in partly], "weight_decay": 0.1},
        {"params": [p for n, p in parameters.items() if n in partly], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    losses = []
    for _ in range(num_steps):
        number = stage.count(whole)
        losses.append(stage.backward(whole, number)["loss"] / number)
        optimizer.step()
        optimizer.zero_grad()
    return losses


class SavedBytes:
    """Most bytes that autograd held for backward passes at any time."""

    class _Box:
        def __init__(self, tensor):
            self.tensor = tensor

    def __enter__(self):
        self.now = self.peak = 0

        def pack(tensor):
            box = self._Box(tensor)
            size = tensor.numel() * tensor.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(box, self._free, size)
            return box

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor)
        self._hooks.__enter__()
        return self

    def _free(self, size):
        self.now -= size

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


def saved_bytes(stage, whole):
    """Peak of ``SavedBytes`` in one backward call."""
    freeze(stage)
    with SavedBytes() as held:
        stage.backward(whole, stage.count(whole))
    return held.peak
