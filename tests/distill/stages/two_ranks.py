"""Run on two ranks by test_two_ranks: every stage on shards, compared with one process.

Each rank has other rows, with other numbers of targets; student and teacher are sharded.
"""

import torch

from tests.distill.stages import models
from thinkfast_distill import distributed
from thinkfast_distill.config import ComputeConfig
from thinkfast_distill.parts import ROOT_METHODS
from thinkfast_distill.stages import build

STUDENTS = {
    "llamba": lambda: models.llamba(tie_word_embeddings=True),
    "hybrid": models.hybrid,
}


def stage(kind, name, teacher):
    changes = {"mixer_output_weight": 0.5} if kind == "hidden_state" else {}
    return build(models.config(kind, **changes), STUDENTS[name](), teacher)


def compare(kind, name, world):
    """Gradients and sums of both ranks together against those of the whole batch."""
    whole = models.batch(lengths=((5, 4), (9,), (2, 2, 3), (3, 1)))
    alone = stage(kind, name, models.teacher())
    models.freeze(alone)
    number = alone.count(whole)
    wanted_sums = alone.backward(whole, number)
    wanted = models.gradients(alone.student)

    teacher = models.teacher()
    distributed.shard(teacher, teacher.blocks(), (), world)
    sharded = stage(kind, name, teacher)
    models.freeze(sharded)
    distributed.shard(sharded.student, list(sharded.student.model.layers), ROOT_METHODS, world)
    rows = list(whole.split(4))[:3] if world.rank == 0 else list(whole.split(4))[3:]
    # Ranks make the same number of calls, as the loop does: the short one repeats an empty row.
    rows += [models.batch(lengths=((),), padding=11)] * (3 - len(rows))
    sums = dict.fromkeys(wanted_sums, 0.0)
    for part in rows:
        for key, value in sharded.backward(part, number).items():
            sums[key] += value
    for key, value in wanted_sums.items():
        total = world.sum_(torch.tensor(sums[key], dtype=torch.float64)).item()
        assert abs(total - value) <= 1e-8 * (1 + abs(value)), (kind, name, key, total, value)
    found = {
        n: p.grad.full_tensor() for n, p in sharded.student.named_parameters() if p.grad is not None
    }
    models.assert_same_gradients(found, wanted)
    gathered = [
        one.unsharded_param
        for group in sharded.student._get_fsdp_state()._fsdp_param_groups
        for one in group.fsdp_params
        if hasattr(one, "_unsharded_param")
    ]
    assert not any(one._backward_hooks for one in gathered), "a hook stays in every micro-batch"
    layer = next(teacher.blocks()[0].parameters())
    assert layer.to_local().numel() <= layer.numel() // 2 + layer.numel() // len(layer), "not freed"


def main(words):
    """Prints a line per stage and student; returns the exit code."""
    torch.set_num_threads(1)
    world = distributed.start(ComputeConfig(device="cpu"))
    for kind in ("matrix_mixing", "hidden_state", "end_to_end", "sft"):
        for name in STUDENTS:
            compare(kind, name, world)
            if world.is_main:
                print(kind, name, "agree")  # noqa: T201
    distributed.stop(world)
    return 0
