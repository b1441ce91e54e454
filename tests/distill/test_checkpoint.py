import json
import shutil

import pytest
import torch

from tests.distill import stand_ins
from thinkfast_distill import optimiser
from thinkfast_distill.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Progress,
    check_same_recipe,
    read,
)
from thinkfast_distill.config import RunConfig
from thinkfast_distill.distributed import World
from thinkfast_distill.recipe import RecipeError, parse


@pytest.fixture
def config():
    return parse(RunConfig, stand_ins.RECIPE, "r")


@pytest.fixture
def saved(config, tmp_path):
    """A store with checkpoints after steps 1, 2 and 3 of which two are kept, and its model."""
    torch.manual_seed(0)
    student = stand_ins.Model()
    frozen = "model.embed_tokens.weight"
    dict(student.named_parameters())[frozen].requires_grad_(False)
    optimizer = optimiser.build(config.stages[0], optimiser.named_trainable(student))
    store = CheckpointStore(tmp_path, 2, World())
    for step in (1, 2, 3):
        for parameter in optimiser.named_trainable(student).values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        store.save(config, Progress(step=step, stage_step=step), student, optimizer)
    return store, student, optimizer


def test_save_keeps_the_newest(saved):
    store, _, _ = saved
    assert sorted(f.name for f in store.folder.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000003",
    ]
    assert store.latest().progress == Progress(step=3, stage_step=3)


def test_an_optimizer_before_its_first_step_stays_so(config, tmp_path):
    """torch makes a state of one step for it, which would shift the bias correction by one."""
    student = stand_ins.Model()
    optimizer = optimiser.build(config.stages[0], optimiser.named_trainable(student))
    store = CheckpointStore(tmp_path, 2, World())
    store.save(config, Progress(step=1, stage_step=1), student, optimizer)
    assert not optimizer.state
    fresh = optimiser.build(config.stages[0], optimiser.named_trainable(student))
    store.load_optimizer(store.latest(), student, fresh)
    assert not fresh.state


def test_load_restores_student_and_optimizer_bit_by_bit(saved, config):
    store, student, optimizer = saved
    other = stand_ins.Model()
    dict(other.named_parameters())["model.embed_tokens.weight"].requires_grad_(False)
    fresh = optimiser.build(config.stages[0], optimiser.named_trainable(other))
    assert store.load_student(store.latest(), other) == []
    store.load_optimizer(store.latest(), other, fresh)
    for name, value in student.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    pairs = zip(optimizer.state.values(), fresh.state.values(), strict=True)
    for old, new in pairs:
        assert old.keys() == new.keys() >= {"exp_avg", "exp_avg_sq", "step"}
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_latest_without_or_with_a_stale_pointer(saved):
    store, _, _ = saved
    (store.folder / "latest").write_text("step_00000001\n")  # removed by keep
    assert store.latest().progress.step == 3
    (store.folder / "latest").unlink()
    assert store.latest().progress.step == 3
    (store.folder / "latest").write_text("step_00000002\n")
    assert store.latest().progress.step == 2
    shutil.rmtree(store.folder)
    assert store.latest() is None


def test_unfinished_checkpoint_is_no_checkpoint(saved, config):
    store, student, optimizer = saved
    partial = store.folder / ".partial-step_00000004"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    assert store.latest().progress.step == 3
    store.save(config, Progress(step=5), student, optimizer)
    assert not partial.exists()


def test_load_student_of_another_shape(saved):
    store, _, _ = saved
    other = stand_ins.Model()
    other.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"does not hold extra.weight and 1 more tensors"):
        store.load_student(store.latest(), other)
    before = other.extra.weight.clone()
    assert store.load_student(store.latest(), other, only_common=True) == [
        "extra.weight",
        "extra.bias",
    ]
    assert torch.equal(other.extra.weight, before)


def test_damaged_checkpoint_is_named(saved):
    store, student, _ = saved
    folder = store.latest_folder()
    (shard,) = folder.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"step_00000003: cannot be loaded"):
        store.load_student(store.latest(), student)
    state = folder / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99 is not 1"):
        read(folder)
    state.write_text("{")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read(folder)


def test_check_same_recipe(saved, config):
    checkpoint = saved[0].latest()
    check_same_recipe(checkpoint, config)
    config.checkpoint.every_steps = 77
    config.compute.prefetch_batches = 0
    check_same_recipe(checkpoint, config)
    config.student.init = "random"
    with pytest.raises(RecipeError, match=r"student.init \('mohawk' -> 'random'\)"):
        check_same_recipe(checkpoint, config)
