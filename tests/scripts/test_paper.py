"""``make paper`` end to end on scripted samples, killed and continued.

Engines, killed and continued, are tested in tests/lm_eval_tasks/sampling.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import paper
from scripts.tiny_models import ROOT
from tests.scripts.scripted_paper import install

SIZES = ["--problems", "6", "--latency-problems", "4", "--num-samples", "8"]
SIZES += ["--batch-sizes", "1", "4"]
NUM_SAMPLES = 3 * (6 + 4) * 8


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model with the embedded models' tokenizer."""
    from tests.lm_eval_tasks.rewards.tiny_rewards import BUILDERS

    return BUILDERS["prm-tiny"](tmp_path_factory.mktemp("reward") / "prm-tiny")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command in this process, with nothing left behind in it."""
    monkeypatch.chdir(ROOT)
    for name in paper.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    install(monkeypatch.setattr)
    return paper.main


def statistics(out: Path) -> dict[str, Any]:
    """All of a report that does not depend on time."""
    found: dict[str, Any] = {}
    for group in json.loads((out / "report" / "results.json").read_text())["groups"]:
        for one in group["runs"]:
            found[f"{group['regime']}/{one['name']}"] = one["metrics"]
        found[f"{group['regime']}/tokens"] = [c for c in group["curves"] if c["axis"] == "tokens"]
    return found


def test_continues_after_kill_9_with_the_same_statistics(
    run: Any, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--reward", str(reward), *SIZES]
    assert run([*options, "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    slowly = [sys.executable, "-m", "tests.scripts.scripted_paper", "0.01"]
    command = [*slowly, *options, "--out", str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while (drawn := num_drawn(killed)) < NUM_SAMPLES // 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert drawn < NUM_SAMPLES
    assert not (killed / "report").exists()
    kept = {path: path.read_bytes() for path in killed.glob("runs/*/*/samples.jsonl")}

    published = tmp_path / "published"
    assert run([*options, "--out", str(killed), "--results", str(published)]) == 0
    names = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    assert {"report.md", "report.html", "results.json", "points.csv"} <= names
    assert "figures/arith-saturated/majority-vs-k.png" in names
    assert not [name for name in names if "overview" in name]
    for path, content in kept.items():
        assert path.read_bytes().startswith(content.rpartition(b"\n")[0]), "drawn once"
    assert num_drawn(killed) == num_drawn(whole) == NUM_SAMPLES
    expected = statistics(whole)
    assert len(expected) == 2 * (3 + 1)
    assert statistics(killed) == expected
    for metrics in (expected["saturated/llama-tiny"], expected["latency/llamba-tiny"]):
        assert {"pass@8", "maj@4", "bon@4", "weighted_bon@4"} <= metrics.keys()

    # What is printed: a table for each regime, with the numbers of the report.
    assert printed.count("| model | pass@1 | pass@4 | maj@4 | weighted_bon@4 | tokens/s |") == 2
    teacher = expected["saturated/llama-tiny"]
    shown = " | ".join(f"{100 * teacher[key]['value']:.1f} %" for key in ("pass@1", "pass@4"))
    assert f"| llama-tiny | {shown} | " in printed
    assert (whole / "report" / "points.csv").read_text().count("\n") > 100
    names = {path.name for path in (whole / "report" / "figures").glob("*/*.png")}
    assert {
        "coverage-vs-k.png",
        "coverage-vs-seconds.png",
        "majority-vs-seconds.png",
        "weighted-bon-vs-seconds.png",
        "throughput-vs-batch.png",
    } <= names


def test_results_do_not_replace_the_report(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["--out", str(out), "--results", str(out / "report")]) == 2
    assert "that is the report's own folder" in capsys.readouterr().err
    assert not out.exists()


def test_samples_without_seeds(run: Any, reward: Path, tmp_path: Path) -> None:
    sizes = ["--problems", "2", "--latency-problems", "2", "--num-samples", "4", "--rounds", "2"]
    options = ["--reward", str(reward), "--batch-sizes", "1", "--out", str(tmp_path / "out")]
    assert run([*options, *sizes, "--seed", "-1"]) == 0
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    runs = [one for group in results["groups"] for one in group["runs"]]
    assert [one["facts"]["seed"] for one in runs] == [None] * 6
    seeds = [session["engine_seed"] for one in runs for session in one["sessions"]]
    assert len(set(seeds)) == len(seeds) == 12, "another one in each run and session"


def num_drawn(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs/*/*/samples.jsonl"))


def test_missing_models_are_named(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run(["--out", str(tmp_path / "out"), "--reward", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'none'}: there is no reward model")
    assert error.count("\n") == 1
    (tmp_path / "prm-tiny").mkdir()
    (tmp_path / "prm-tiny" / "config.json").write_text("{}")
    assert run(["--out", str(tmp_path / "out"), "--models", str(tmp_path)]) == 2
    assert "llama-tiny" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
