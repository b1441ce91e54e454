"""`lm_eval --model vllm --tasks gsm8k_passk` as a user types it, on a random checkpoint."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from scripted_lm import GSM8K_ROWS, write_jsonl
from tiny_checkpoint import build_checkpoint


def _missing() -> str | None:
    for name in ("thinkfast-lm-eval-index", "vllm"):
        try:
            version(name)
        except PackageNotFoundError:
            return f"distribution {name} is absent; `make` installs it"
    return None


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def _lm_eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    single = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | quiet | single,
        timeout=900,
    )


def _documented_command() -> str:
    """Return the first command of docs/evaluation.md."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    match = re.search(r"```console\n(lm_eval .*)\n```", text)
    assert match is not None
    return match[1]


@pytest.mark.engine
def test_vllm_model_without_further_flags(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    data = write_jsonl(tmp_path / "rows.jsonl", GSM8K_ROWS)
    command = _documented_command().replace("pretrained=MODEL", f"pretrained={checkpoint}")
    program, *arguments = shlex.split(command.replace("_path results", f"_path {tmp_path}/out"))
    assert program == "lm_eval"
    smaller = ["--metadata", "num_samples=4", f"data_file={data}", "--limit", "2"]
    done = _lm_eval(*arguments, *smaller, "--gen_kwargs", "max_gen_toks=24")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|gsm8k_passk|" in done.stdout
    # vLLM's own progress bar of one submission; lm-eval shows none when it sends one by one.
    assert re.search(r"Processed prompts: 100%\S* 8/8 \[", done.stderr)
    (path,) = (tmp_path / "out").glob("*/results_*.json")
    results = json.loads(path.read_text())
    found = results["results"]["gsm8k_passk"]
    assert {"pass@1,all", "pass@2,all", "pass@4,all", "pass@4_stderr,all"} <= set(found)
    assert found["n_distinct,all"] == 1.0
    assert 0 < found["gen_tokens,all"] <= 24
    assert 0 <= found["truncated,all"] <= 1
    metadata = results["configs"]["gsm8k_passk"]["metadata"]
    assert metadata["chat_template_applied_by"] == "task"
    (path,) = (tmp_path / "out").glob("*/samples_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(set(sample["resps"][0])) for sample in samples] == [4, 4]
    prompt = samples[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<|user|>" + GSM8K_ROWS[0]["question"])
    assert prompt.endswith("\\boxed{}.\n<|assistant|>")


@pytest.mark.slow
def test_a_bad_data_file_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "none"}\n')
    done = _lm_eval("--model", "dummy", "--tasks", "gsm8k_passk", "--metadata", f"data_file={path}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"error: {path}, line 1: field 'answer' must end in '#### <number>', got 'none'"
    )
