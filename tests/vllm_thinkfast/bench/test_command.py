"""``thinkfast bench`` from the command line, without an engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_thinkfast.bench.scripted import Stage, settings
from vllm_thinkfast import cli
from vllm_thinkfast.bench import environment
from vllm_thinkfast.bench import run as bench_run

SMALL = ["--preset", "tiny", "--models", "llama,llamba", "--batch-sizes", "1,4"]
SMALL += ["--lengths", "8+4", "--num-samples", "", "--rounds", "2", "--kv-cache-gib", "0.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--threads", "-1"], "--threads -1: must be at least 1"),
        (["--preset", "7b"], "--preset 7b: accepted are tiny, 30m, 135m, 1b, 3b"),
        (["--models", "gpt"], "--models gpt: accepted are llama"),
        (["--lengths", "12"], "--lengths 12: need PROMPT+GENERATED"),
        (["--kv-cache-gib", "0"], "--kv-cache-gib 0.0: must be a number above 0"),
        (["--kv-cache-gib", "nan"], "--kv-cache-gib nan: must be a number above 0"),
        (["--kv-cache-gib", "inf"], "--kv-cache-gib inf: must be a number above 0"),
        (["--kv-cache-gib", "1e300"], "--kv-cache-gib 1e+300: must be a number above 0"),
        (["--kv-cache-gib", "1e-300"], "--kv-cache-gib 1e-300: must be a number above 0"),
        (["--seed", "-1"], "--seed -1: must be from 0 to 4294967295"),
        (["--seed", "4294967296"], "--seed 4294967296: must be from 0 to 4294967295"),
        (["--max-num-batched-tokens", "8"], "--max-num-batched-tokens 8: vLLM needs at least"),
        (["--engines", "together"], "say how much cache each gets with --kv-cache-gib"),
        (["--engine-options", "x"], "--engine-options 'x' is no JSON"),
        (["--engine-options", '{"dtype": "float16"}'], "dtype: leave it out, and use --dtype"),
    ],
)
def test_bad_input(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing written."""
    assert cli.main(["bench", "--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("")
    assert cli.main(["bench", "--out", str(tmp_path / "run")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["bench", *SMALL, "--out", str(out), "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["settings"]["cells"] == ["1 x 8+4", "4 x 8+4"]
    assert config["settings"]["engines"] == "together"
    assert config["llm_options"]["max_model_len"] == 12
    assert config["llm_options"]["max_num_seqs"] == 4
    assert not out.exists()


def test_command_line_is_light() -> None:
    """``thinkfast --help`` and mistakes need neither torch nor transformers nor vllm."""
    code = (
        "import sys, vllm_thinkfast.cli; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = environment.environment_of_runs(settings(kv_cache_bytes=None))
    assert "VLLM_API_KEY" not in found
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Scripted engines in place of vLLM's."""
    stage = Stage()

    class ScriptedRun(bench_run.Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, stage.start)

    monkeypatch.setattr(bench_run, "Run", ScriptedRun)
    return stage


def test_files(stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["bench", *SMALL, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert (out / "report.txt").read_text() == printed.out
    assert "[8/8] round 2" in printed.err
    results = json.loads((out / "results.json").read_text())
    for field in ("command", "settings", "versions", "git_commit", "hardware", "machine"):
        assert field in results
    assert len(results["cells"]) == 4
    assert (out / "bench.png").is_file()
    config = json.loads((out / "models" / "tiny-llamba" / "config.json").read_text())
    assert config["model_type"] == "llamba"


def test_second_call_measures_nothing(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", *SMALL, "--out", str(tmp_path), "--no-figure", "--json"]
    assert cli.main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    asked = len(stage.calls)
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == first["cells"]
    assert len(stage.calls) == asked
    assert cli.main([*arguments, "--fresh"]) == 0
    assert len(stage.measured) == 16


def test_roofline_that_fails(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.failing = ("roofline",)
    assert cli.main(["bench", *SMALL, "--out", str(tmp_path), "--no-figure"]) == 1
    assert "thinkfast bench: roofline: no memory" in capsys.readouterr().err


def test_failure_is_exit_code_1(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.failing = ("llamba 4",)
    assert cli.main(["bench", *SMALL, "--out", str(tmp_path), "--no-figure"]) == 1
    assert "4 x 8+4, llamba: llamba: IndexError" in capsys.readouterr().out
