from itertools import pairwise

import pytest

from thinkfast_distill.config import StageConfig
from thinkfast_distill.schedule import learning_rate


def stage(**fields):
    given = {"tokens": 100, "batch_tokens": 1, "seq_len": 1, "lr": 2.0, **fields}
    return StageConfig(kind="sft", data="d", **given)


def rates(one):
    return [learning_rate(one, step) for step in range(one.num_steps)]


def test_wsd_warms_up_stays_and_decays():
    found = rates(stage(warmup_fraction=0.1, decay_fraction=0.2))
    assert found[:10] == pytest.approx([2.0 * (i + 1) / 11 for i in range(10)])
    assert found[10:80] == [2.0] * 70
    falls = [a - b for a, b in pairwise(found[79:])]
    assert falls == pytest.approx([2.0 / 21] * 20)
    assert found[-1] > 0


def test_cosine_meets_its_middle_and_floor():
    found = rates(stage(schedule="cosine", warmup_fraction=0.0, min_lr_ratio=0.1))
    assert found[0] == 2.0
    assert found[50] == pytest.approx(2.0 * 0.55)
    assert found[-1] == pytest.approx(0.2, abs=0.01)
    assert found == sorted(found, reverse=True)


def test_constant():
    assert rates(stage(schedule="constant", warmup_fraction=0.0)) == [2.0] * 100


def test_one_step_moves():
    for schedule in ("wsd", "cosine", "constant"):
        only = stage(tokens=1, schedule=schedule)
        assert only.num_steps == 1
        assert learning_rate(only, 0) > 0


def test_num_steps_rounds_up():
    assert stage(tokens=101, batch_tokens=10, seq_len=5).num_steps == 11
    assert stage(tokens=101, batch_tokens=10, seq_len=5).batch_rows == 2
