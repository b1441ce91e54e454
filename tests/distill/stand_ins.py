"""The smallest parts that satisfy what the loop asks of models, stages and data.

They let the loop's own promises (resume, ranks, borders, non-finite steps) be tested in seconds and
without depending on the mathematics of students and losses, which have tests of their own. ``main``
trains one recipe with them through the command line: tests kill it, or start it on two ranks.
"""

import contextlib
import dataclasses
import functools
import os
import resource
import signal
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import LlamaConfig

from thinkfast_distill import cli, loop, parts

WIDTH, VOCAB, LAYERS = 8, 11, 3


@dataclasses.dataclass
class Batch:
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    sample_ids: list[list[str]]
    source_tokens: dict[str, int]

    def num_targets(self):
        return int(self.loss_mask[:, 1:].sum())

    def to(self, device):
        return dataclasses.replace(
            self, input_ids=self.input_ids.to(device), loss_mask=self.loss_mask.to(device)
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(WIDTH)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        mixed = self.mixer(self.input_layernorm(hidden)).cumsum(1) / 4
        return hidden + self.mlp(torch.tanh(mixed))


class Model(nn.Module):
    """Student and teacher: tied head, blocks under model.layers."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.model.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.model.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, input_ids):
        return self.model.embed_tokens(input_ids)

    def layer(self, i, hidden, batch):
        return self.model.layers[i](hidden)

    def hidden(self, batch):
        hidden = self.model.embed_tokens(batch.input_ids)
        for block in self.model.layers:
            hidden = block(hidden)
        return self.model.norm(hidden)

    def head_weight(self):
        return self.lm_head.weight

    def noting_not_finite(self):
        return contextlib.nullcontext([])


class Objective:
    def __init__(self, student, teacher):
        self.student, self.teacher = student, teacher

    def count(self, batch):
        return batch.num_targets()

    def partly_trained_parameters(self):
        return []


class HiddenState(Objective):
    """Per-layer losses and per-layer backward passes, mixers only."""

    def trainable_parameters(self):
        return [n for n, _ in self.student.named_parameters() if ".mixer." in n]

    def _losses(self, batch):
        hidden = self.teacher.embed(batch.input_ids)
        weight = batch.loss_mask.float()
        for i in range(LAYERS):
            after = self.teacher.layer(i, hidden, batch)
            error = (self.student.layer(i, hidden, batch) - after).square().mean(-1)
            yield (error * weight).sum()
            hidden = after

    def backward(self, batch, num_targets_global):
        total = 0.0
        for loss in self._losses(batch):
            (loss / num_targets_global).backward()
            total += loss.item()
        return {"loss": total, "num_targets": float(batch.num_targets())}

    def evaluate(self, batch):
        total = sum(loss.item() for loss in self._losses(batch))
        return {"loss": total, "num_targets": float(batch.num_targets())}


class EndToEnd(Objective):
    def trainable_parameters(self):
        return [n for n, _ in self.student.named_parameters()]

    def _loss(self, batch):
        with torch.no_grad():
            target = self.teacher.hidden(batch) @ self.teacher.head_weight().T
        found = self.student.hidden(batch) @ self.student.head_weight().T
        p, q = target.log_softmax(-1), found.log_softmax(-1)
        kl = (q.exp() * (q - p)).sum(-1)[:, :-1]
        loss = (kl * batch.loss_mask[:, 1:]).sum()
        if os.environ.get("STAND_IN_NAN") and any("data:5" in row for row in batch.sample_ids):
            loss = loss * float("nan")
        return loss

    def backward(self, batch, num_targets_global):
        loss = self._loss(batch)
        (loss / num_targets_global).backward()
        return {"loss": loss.item(), "num_targets": float(batch.num_targets())}

    def evaluate(self, batch):
        return {"loss": self._loss(batch).item(), "num_targets": float(batch.num_targets())}


class Loader:
    """Batch s is a function of (seed, s); its state is s.

    ``limit``, which is the source's ``num``, ends the data early.
    """

    def __init__(self, seed, seq_len, batch_rows, state, limit=None):
        self.seed, self.seq_len, self.batch_rows = seed, seq_len, batch_rows
        self.limit = limit
        self.step = 0 if state is None else state["step"]

    def next(self, rank, world_size):
        if self.limit is not None and self.step >= self.limit:
            raise ValueError("data.jsonl: ends after 3 batches, the budget needs more")
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.step)
        shape = (self.batch_rows, self.seq_len)
        ids = torch.randint(VOCAB, shape, generator=generator)
        mask = torch.rand(shape, generator=generator) < 0.7  # uneven over rows and ranks
        rows = range(rank, self.batch_rows, world_size)
        names = [[f"data:{self.step}", f"data:{self.step}.{row}"] for row in rows]
        self.step += 1
        part = slice(rank, None, world_size)
        return Batch(ids[part], mask[part], names, {"data": ids[part].numel()})

    def state(self):
        return {"step": self.step}

    def report(self, state):
        dropped = {"exact": 0, "ngram": state["step"], "long": 0}
        return {"sources": [{"name": "data", "dropped": dropped}]}


def install():
    """Puts the stand-ins in the place of the real parts."""

    def teacher(config):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return Model().requires_grad_(False)

    def loader(config, tokenizer, *, data, seq_len, batch_rows, purpose, state):
        limit = next((s.get("num") for s in config.data[data].sources), None)
        return Loader(parts.seed_for(config.seed, purpose), seq_len, batch_rows, state, limit)

    def micro_batches(batch, rows):
        rows = rows or len(batch.input_ids)
        for i in range(0, len(batch.input_ids), rows):
            part = slice(i, i + rows)
            yield Batch(batch.input_ids[part], batch.loss_mask[part], batch.sample_ids[part], {})

    def normalised(kind, sums):
        return {"loss": sums["loss"] / sums["num_targets"]} if sums else {}

    def stage(config, index, student, teacher):
        kind = config.stages[index].kind
        return (HiddenState if kind == "hidden_state" else EndToEnd)(student, teacher)

    sizes = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    parts.teacher_config = lambda config: sizes
    parts.tokenizer = lambda config: None
    parts.load_teacher = teacher
    parts.place_teacher = lambda teacher, config, world: None
    parts.build_student = lambda config, backend="reference": Model()
    parts.initialise = lambda config, student, teacher, seed, **_: None
    parts.build_stage = stage
    parts.end_to_end_objective = lambda stage, student, teacher: EndToEnd(student, teacher)
    parts.loader = loader
    parts.micro_batches = micro_batches
    parts.normalised = normalised


RECIPE = {
    "name": "stand-in",
    "teacher": {"model": "none"},
    "student": {"kind": "llamba"},
    "data": {"text": {"sources": [{"kind": "arith"}]}},
    "stages": [
        {
            "kind": "hidden_state",
            "data": "text",
            "tokens": 6 * 32,
            "batch_tokens": 32,
            "seq_len": 8,
            "micro_batch_rows": 1,
            "lr": 0.01,
        },
        {
            "kind": "end_to_end",
            "data": "text",
            "tokens": 6 * 32,
            "batch_tokens": 32,
            "seq_len": 8,
            "lr": 0.02,
            "clip_norm": 0.05,
        },
    ],
    "evaluation": {
        "data": "text",
        "every_steps": 3,
        "num_batches": 2,
        "batch_rows": 2,
        "seq_len": 8,
    },
    "checkpoint": {"every_steps": 2},
    "logging": {"peak_flops_per_s": 1e9},
}


def write_recipe(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def main(words):
    """RECIPE RUN [kill-at STEP | stop-at STEP] [max-steps STEP] [file-bytes N]: an exit code."""
    install()
    torch.set_num_threads(1)
    options = dict(zip(words[2::2], map(int, words[3::2]), strict=True))

    def on_step(progress):
        if progress.step == options.get("kill-at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if progress.step == options.get("stop-at"):
            os.kill(os.getpid(), signal.SIGTERM)

    if "file-bytes" in options:  # a write fails half-way, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file-bytes"],) * 2)
    loop.Trainer = functools.partial(loop.Trainer, on_step=on_step)
    arguments = ["run", words[0], "--run-dir", words[1], "--quiet"]
    if "max-steps" in options:
        arguments += ["--max-steps", str(options["max-steps"])]
    return cli.main(arguments)


def main_with_broken_teacher(words):
    """The real parts, but on rank 1 a bfloat16 teacher overflows from the third batch on."""
    load = parts.load_teacher

    def load_teacher(config):
        teacher = load(config)
        calls = []

        def overflow(module, inputs, output):
            calls.append(None)
            return output * float("nan") if len(calls) > 2 else output

        if os.environ["RANK"] == "1" and config.teacher.dtype == "bfloat16":
            teacher.model.model.embed_tokens.register_forward_hook(overflow)
        return teacher

    parts.load_teacher = load_teacher
    torch.set_num_threads(1)
    return cli.main(words)
