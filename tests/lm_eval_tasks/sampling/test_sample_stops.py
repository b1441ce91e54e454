"""``thinkfast-eval sample --stop-error`` from the command line, on a scripted engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_tasks.cli import main
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.sampling import vllm_backend
from tests.scripts.scripted_paper import ScriptedEngine

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ["sample", "--model", str(ROOT / "thinkfast" / "llama-tiny"), "--task", "arith"]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    started: list[ScriptedEngine] = []

    def start(*_: Any) -> ScriptedEngine:
        started.append(ScriptedEngine("llama-tiny", 0.0))
        return started[-1]

    monkeypatch.setattr(vllm_backend, "start_vllm", start)
    return started


def test_sample_with_early_stops(
    engines: list[ScriptedEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, uniform = tmp_path / "stopped", tmp_path / "uniform"
    command = [*SAMPLE, "--limit", "6", "--num-samples", "32"]
    stops = ["--stop-error", "0.05", "--stop-every", "4", "--out", str(folder)]
    assert main([*command, *stops]) == 0
    said = capsys.readouterr()
    assert "0 samples are there, 6 of 6 problems are open" in said.err
    config = SampleStore(folder).config()
    assert (config["stop_error"], config["stop_every"]) == (0.05, 4)
    assert config["name"] == "llama-tiny-arith-t0.7-stop0.05"
    texts = {record.key: record.text for record in SampleStore(folder).records()}
    assert 6 * 4 <= len(texts) < 6 * 32
    assert f"{len(texts)} samples of 6 problems; this session drew {len(texts)} in" in said.out
    assert [row["num_judged"] for row in map(json.loads, (folder / "grading.jsonl").open())] == [
        None
    ]

    assert main([*command, *stops]) == 0
    assert f"{len(texts)} samples are there, 0 of 6 problems are open" in capsys.readouterr().err
    assert len(engines) == 1, "nothing to draw, no engine"

    # The same seeds as a uniform run: its samples begin with these.
    assert main([*command, "--out", str(uniform)]) == 0
    rest = {record.key: record.text for record in SampleStore(uniform).records()}
    assert texts.items() <= rest.items()
    assert "stop_error" not in SampleStore(uniform).config()
    assert main(["score", str(uniform)]) == 0
    capsys.readouterr()
    report = ["adaptive", str(folder), "--against", str(uniform), "--draws", "100", "--json"]
    assert main(report) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == len(texts)
    assert found["against"]["k"] == 32
    assert found["against"]["samples_saved"]["value"] == pytest.approx(1 - len(texts) / (6 * 32))
    assert found["idle_s"] >= 0

    # Other stop settings, or none, do not go on here.
    for changed, message in (
        (["--stop-error", "0.1", "--stop-every", "4"], "stop_error is 0.05 there and 0.1 now"),
        (["--stop-error", "0.05"], "stop_every is 4 there and 8 now"),
        ([], "stop_error is 0.05 there and null now"),
    ):
        assert main([*command, *changed, "--out", str(folder)]) == 2
        lines = capsys.readouterr().err.splitlines()
        (error,) = [line for line in lines if line.startswith("error:")]
        assert message in error
    assert main([*command[:-1], "16", *stops]) == 2
    assert "--num-samples 16: " in (error := capsys.readouterr().err)
    assert "begun with at most 32 samples of a problem" in error
    assert main([*command, *stops[:4], "--out", str(uniform)]) == 2
    assert "stop_error is null there and 0.05 now" in capsys.readouterr().err
    assert texts == {record.key: record.text for record in SampleStore(folder).records()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stop-error", "0.5"], "--stop-error 0.5: need 0 or more and below 0.5"),
        (["--stop-error", "-0.1"], "--stop-error -0.1: need 0 or more"),
        (["--stop-error", "nan"], "--stop-error nan: need 0 or more"),
        (["--stop-every", "4"], "--stop-every 4: needs the level of --stop-error LEVEL"),
        (["--stop-error", "0.1", "--stop-every", "0"], "--stop-every 0: need a whole number"),
        (
            ["--stop-error", "0.1", "--regime", "latency"],
            "--stop-error needs --regime saturated: one problem at a time",
        ),
    ],
)
def test_bad_stops(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SAMPLE, "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
