"""The command line: help, lazy imports, bad input of the sample command."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_tasks import cli
from lm_eval_tasks.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, text in COMMANDS.items():
        assert f"{name} {text}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"lm_eval_tasks.commands.{name.replace('-', '_')}")
    assert callable(module.run)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: thinkfast-eval {name}" in capsys.readouterr().out


def test_commands_import_engines_only_when_they_run() -> None:
    """Help appears at once: neither torch nor vllm nor lm-eval is imported for it."""
    script = (
        "import sys\n"
        "from lm_eval_tasks.cli import main\n"
        "try:\n"
        "    main(['sample', '--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'vllm', 'lm_eval', 'transformers', 'datasets', 'aiohttp'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out[0].isdigit()


@pytest.mark.parametrize("arguments", [[], ["samples"], ["sample"], ["sample", "--modle", "x"]])
def test_misspelt(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval_tasks.commands import sample

    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "run", interrupted)
    assert main(["sample", "--model", "m", "--task", "arith"]) == 130
    assert "interrupted; what was finished is kept" in capsys.readouterr().err


# -- sample ---------------------------------------------------------------------------------------

SERVER = ["--server", "http://localhost:1/v1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-samples", "0"], "--num-samples 0: need a whole number of at least 1"),
        (["--limit", "-3"], "--limit -3: need"),
        (["--max-tokens", "0"], "--max-tokens 0: need"),
        (["--seed", "-2"], "--seed -2: need a whole number of at least -1"),
        (["--seed", "-1", "--engine-args", "seed=5"], "another seed in every session"),
        ([*SERVER, "--seed", "-1"], "give a --seed of 0 or more with --server"),
        (
            [*SERVER, "--api", "completions", "--chat-template-args", "x=1"],
            "--chat-template-args x=1: no chat template is applied",
        ),
        (["--temperature", "-0.5"], "--temperature -0.5: need 0 or more"),
        (["--temperature", "nan"], "--temperature nan: need 0 or more"),
        (["--temperature", "0"], "draws the same text 64 times"),
        (["--top-p", "1.5"], "--top-p 1.5: need more than 0 and at most 1"),
        (["--data-file", "no.jsonl"], "--data-file no.jsonl: there is no such file"),
        (["--server", "localhost:8000"], "need a URL such as http"),
        ([*SERVER, "--engine-args", "dtype=float32"], "give them to the server instead"),
        ([*SERVER, "--tokenizer", "x"], "--tokenizer is for --api completions"),
        ([*SERVER, "--chat-template", "off"], "needs --api completions"),
        ([*SERVER, "--revision", "r1"], "--revision r1: a server has its model"),
        ([*SERVER, "--timeout", "0"], "--timeout 0.0: need more than 0"),
        (["--api", "completions"], "name it with --server URL"),
        (["--engine-args", "dtype"], "--engine-args dtype: need KEY=VALUE"),
        # Which checkpoint is drawn is recorded from the options, and its template is applied.
        (["--engine-args", "model=x"], "--engine-args model=...: not accepted; give --model"),
        (["--engine-args", "tokenizer=x"], "tokenizer=...: not accepted; give --tokenizer"),
        (["--engine-args", "dtype=auto", "revision=x"], "not accepted; give --revision"),
        (["--engine-args", "tokenizer-revision=x"], "tokenizer_revision=...: not accepted; give"),
        (["--engine-args", "trust_remote_code=true"], "not accepted; give --trust-remote-code"),
        (["--engine-args", "disable_log_stats=true"], "disable_log_stats=...: not accepted; leave"),
        (["--engine-args", "dtype=a", "dtype=b"], "--engine-args dtype: given twice"),
        (
            ["--engine-args", "dtype=" + "[" * 100_000],
            "--engine-args dtype: the value is nested too",
        ),
        (["--limit", "301", *SERVER], "--limit 301: arith has 300 problems"),
    ],
)
def test_bad_options(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["sample", "--model", "m", "--task", "arith", *more], capsys)


def test_tokenizer_that_cannot_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the run folder is made; --revision is that of the tokenizer."""
    from transformers import AutoTokenizer

    asked: list[object] = []

    def load(source: str, **options: object) -> None:
        asked.append((source, options["revision"]))
        raise OSError("some/tok is not a folder\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    out = tmp_path / "run"
    command = ["sample", "--model", "m", "--task", "arith", "--out", str(out), *SERVER]
    command += ["--api", "completions", "--tokenizer", "some/tok", "--revision", "r1"]
    said = refused([*command, "--chat-template", "off"], capsys)
    assert said == "error: --tokenizer some/tok: cannot be loaded (some/tok is not a folder)"
    said = refused(command, capsys)
    assert "cannot load the tokenizer of some/tok" in said
    assert "with --tokenizer, or sample the bare prompt with --chat-template off" in said
    assert "--metadata" not in said
    assert asked == [("some/tok", "r1")] * 2
    assert not out.exists()
    assert main([*command, "--chat-template", "off", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"]["tokenizer"] == "some/tok@r1"


def test_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["sample", "--model", "m", "--task", "aime"], capsys)
    assert "--task aime: unknown; accepted are arith" in said


def test_bad_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    asked = ["sample", "--model", "m", "--task", "arith", "--data-file", str(file), *SERVER]
    row = {"id": "a", "question": "1 + 1?", "answer": "#### 2"}
    for rows, message in (
        ([row | {"answer": "2"}], "line 1: field 'answer' must end in '#### <number>'"),
        ([row | {"answer": ""}], "line 1: field 'answer' must end in '#### <number>'"),
        ([row, row | {"question": "2 + 0?"}], "two problems named arith/a"),
        ([], "no rows"),
    ):
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
        assert message in refused(asked, capsys)


def test_messages_name_options_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task classes are those of lm-eval, where the options have other names."""
    from lm_eval.api.task import ConfigurableTask

    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xff\xfe")
    asked = ["sample", "--model", "m", "--task", "gsm8k", *SERVER]
    said = refused([*asked, "--data-file", str(file)], capsys)
    assert f"error: --data-file {file}: cannot be read" in said

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(ConfigurableTask, "download", offline)
    said = refused(asked, capsys)
    assert "(no network); without a network, give the same rows with --data-file FILE" in said
    models = ["--model", "a", "--model", "b"]
    said = refused(["compare", *models, "--task", "gsm8k", "--limit", "4"], capsys)
    assert "with --data-file FILE" in said


def test_dry_run_shows_the_settings_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["sample", "--model", "some/model", "--task", "arith", "--dry-run", *SERVER]
    assert main([*asked, "--temperature", "0.5", "--regime", "latency"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["name"] == "model-arith-t0.5-latency"
    assert config["temperature"] == 0.5
    assert config["top_p"] == 1.0, "the task's default"
    assert config["command"].startswith("thinkfast-eval sample --model some/model")
    assert list(tmp_path.iterdir()) == []
    hashes = {config["config_hash"]}
    for more in (
        ["--temperature", "0.6"],
        ["--seed", "7"],
        ["--max-tokens", "9"],
        ["--top-p", ".9"],
    ):
        main([*asked, *more])
        hashes.add(json.loads(capsys.readouterr().out)["config_hash"])
    assert len(hashes) == 5
    main(
        [
            *asked,
            "--temperature",
            "0.5",
            "--regime",
            "latency",
            "--num-samples",
            "9",
            "--limit",
            "5",
        ]
    )
    assert json.loads(capsys.readouterr().out)["config_hash"] == config["config_hash"]


def test_module_can_be_run() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            cli.__name__,
            "sample",
            "--model",
            "m",
            "--task",
            "arith",
            "--seed=-2",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr == "error: --seed -2: need a whole number of at least -1\n"
