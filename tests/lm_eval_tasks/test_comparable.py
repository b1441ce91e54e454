"""Runs whose numbers must not stand beside each other are refused, by every command."""

import json
from pathlib import Path

import pytest
from synthetic_runs import make_run

from lm_eval_tasks.cli import main


def report(*folders: Path) -> list[str]:
    out = folders[0].parent / "report"
    options = ["--no-png", "--draws", "100", "--orders", "2", "--out", str(out)]
    return ["report", *map(str, folders), *options]


@pytest.mark.parametrize(("field", "value"), [("question", "another one"), ("gold", "99")])
def test_other_problems_of_one_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: str
) -> None:
    """Problems without an id are named by their place; a prompt may differ between models."""
    a = make_run(tmp_path / "a", num_problems=4, num_samples=4)
    b = make_run(tmp_path / "b", num_problems=4, num_samples=4, data_sha256="f" * 64)
    path = b / "problems.jsonl"
    rows = [
        json.loads(line) | {"prompt_sha256": "1" * 64} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(report(a, b)) == 0
    rows[2][field] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(report(a, b)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    old = {"question": "question p2", "gold": "7"}[field]
    assert f"{a} and {b}: p2 is another problem in each ({field} {old!r} and {value!r})" in error


@pytest.mark.parametrize("command", ["report", "score", "prm-study"])
def test_other_reward_of_one_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    a = make_run(tmp_path / "a", num_problems=4, num_samples=4, reward="x", reward_hash="one")
    b = make_run(tmp_path / "b", num_problems=4, num_samples=4, reward="x", reward_hash="two")
    options = {"report": ["--no-png"], "prm-study": ["--no-figure"]}.get(command, [])
    assert main([command, str(a), str(b), "--reward", "x", *options]) == 2
    captured = capsys.readouterr()
    assert "scores of different reward models under this name (hashes one and two" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["report", "score", "prm-study"])
def test_reward_that_scored_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    a = make_run(tmp_path / "a", num_problems=4, num_samples=4, reward="x")
    path = a / "scores" / "x.jsonl"
    rows = [
        json.loads(line) | {"step_scores": [], "unscored": "too_long"}
        for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"report": ["--no-png"], "prm-study": ["--no-figure"]}.get(command, [])
    assert main([command, str(a), "--reward", "x", *options]) == 2
    error = capsys.readouterr().err
    assert f"--reward x: none of the 16 samples of {a} that are compared has a score" in error
    assert "16 too long for the reward model" in error
