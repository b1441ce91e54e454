import json

import pytest

from tests.distill.tiny_run import write_recipe, write_teacher
from thinkfast_distill.plot import draw, held_out
from thinkfast_distill.recipe import RecipeError
from thinkfast_distill.run_log import LOG_FILE


def _run(tmp_path, name, records):
    """A run folder with a resolved recipe and this log."""
    folder = tmp_path / name
    folder.mkdir()
    recipe = write_recipe(tmp_path, write_teacher(tmp_path / f"teacher-{name}"))
    (folder / "config.yaml").write_text(recipe.read_text())
    (folder / LOG_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def _eval(stage, stage_step, tokens, kl):
    return {
        "event": "eval", "stage": f"stage{stage}", "stage_index": stage, "stage_step": stage_step,
        "step": stage_step, "tokens": tokens, "reverse_kl": kl, "top1_agreement": 1 / (1 + kl),
    }  # fmt: skip


RECORDS = [
    {"event": "session", "step": 0},
    _eval(0, 0, 0, 8.0),
    {"event": "train", "stage_index": 0, "stage_step": 1, "step": 1, "loss": 1.0},
    _eval(0, 2, 512, 4.0),
    _eval(1, 0, 512, 4.5),
    _eval(0, 2, 512, 3.0),  # measured again after a kill
    _eval(1, 3, 1280, 0.5),
]


def test_held_out_orders_and_keeps_the_newest(tmp_path):
    found = held_out(_run(tmp_path, "one", RECORDS))
    assert [(r["tokens"], r["reverse_kl"]) for r in found] == [
        (0, 8.0), (512, 3.0), (512, 4.5), (1280, 0.5),
    ]  # fmt: skip


def test_draw_one_and_two_runs(tmp_path):
    one = _run(tmp_path, "one", RECORDS)
    draw([one], tmp_path / "one.png")
    draw([one, one], tmp_path / "two.svg")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "two.svg").read_text()


def test_draw_refuses(tmp_path):
    with pytest.raises(RecipeError, match="no run folder"):
        draw([tmp_path], tmp_path / "x.png")
    with pytest.raises(RecipeError, match="nothing measured on held-out data yet"):
        draw([_run(tmp_path, "empty", RECORDS[:1])], tmp_path / "x.png")
    with pytest.raises(RecipeError, match=r"x\.nonsense"):
        draw([_run(tmp_path, "one", RECORDS)], tmp_path / "x.nonsense")
