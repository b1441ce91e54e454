"""The command line: bad input is one clear line and exit code 2; a second run is kept out."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from demo import engine
from demo import run as demo_run
from demo.contenders import MODELS, find_contenders
from demo.engine import EngineError, EngineProcess
from demo.errors import InputError
from demo.settings import Settings, resolved
from demo.store import PhaseStore, lock_folder

GOOD = json.dumps({"question": "1 + 1?", "answer": "#### 2"})


def _fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the demo, checks how it ends, and returns its one line."""
    assert demo_run.main(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in err + out
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--num-samples", "0"], "'0' is not a whole number of at least 1"),
        (["--num-samples", "many"], "'many' is not a whole number"),
        (["--num-s", "3"], "unrecognized arguments"),
        (["--speed-rounds", "2"], "--speed-rounds 2: at least 3"),
        (["--max-tokens", "5000"], "--max-tokens 5000: at most 1024"),
        (["--seed", "-1"], "--seed -1: need a whole number from 0"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_main_refuses_options(
    capfd: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in _fails(capfd, *arguments)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("", "no rows"),
        (GOOD + "\n{broken", "line 2: not JSON"),
        (GOOD + "\n[1]", "line 2: need a JSON object"),
        ('{"question": "Q?"}', "line 1: no field 'answer'"),
        ('{"question": 3, "answer": "#### 2"}', "line 1: field 'question' must be of type str"),
        (GOOD + '\n{"question": "Q?", "answer": "two"}', "line 2: 'answer' must end in '####"),
    ],
)
def test_main_refuses_data(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, expected: str
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    message = _fails(capfd, "--data", str(data), "--out", str(tmp_path / "out"))
    assert expected in message
    assert str(data) in message
    assert not (tmp_path / "out").exists()


def test_main_refuses_a_folder_that_cannot_be_written(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for name, why in (("file", "a file is in the way"), ("file/below", "Not a directory")):
        message = _fails(capfd, "--out", str(tmp_path / name))
        assert f"{name}: cannot write there ({why}); give another folder" in message


def test_main_names_missing_packages(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = {"matplotlib", "math_verify"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    message = _fails(capfd)
    assert "missing: math_verify, matplotlib" in message
    assert 'pip install "math-verify[antlr4_13_2]>=0.9" matplotlib' in message


def test_main_keeps_a_second_run_out(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        message = _fails(capfd, "--out", str(tmp_path))
    assert "another demo is running" in message
    lock_folder(tmp_path).close()  # free again


def test_parse_defaults() -> None:
    settings, out, is_fresh = demo_run.parse([])
    assert settings == Settings()
    assert out.name == "demo-results"
    assert not is_fresh


def test_store_refuses_a_damaged_file(tmp_path: Path) -> None:
    store = PhaseStore(tmp_path)
    store.save("phase", "key", {"a": 1})
    assert store.load("phase", "key") == {"a": 1}
    assert store.load("phase", "other") is None
    store.path("phase", "key").write_text('{"a"')
    with pytest.raises(InputError, match=r"not readable.*--fresh"):
        store.load("phase", "key")
    store.clear()
    assert store.load("phase", "key") is None


def test_find_contenders_reads_the_folders(tmp_path: Path) -> None:
    configs = {
        "llama-tiny": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3},
        "llamba-tiny": {"architectures": ["LlambaForCausalLM"], "num_hidden_layers": 3},
        "mambainllama-tiny": {
            "architectures": ["MambaInLlamaForCausalLM"],
            "num_hidden_layers": 3,
            "attention_layers": [1],
        },
    }
    for name, config in configs.items():
        with pytest.raises(InputError, match=rf"{name}/config\.json: no such file.*make tiny"):
            find_contenders(tmp_path)
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / name / file).write_text(json.dumps(config))
    found = find_contenders(tmp_path)
    assert [c.name for c in found] == list(configs)
    assert [c.attention_layers for c in found] == ["3 of 3", "0 of 3", "1 of 3"]
    (tmp_path / "llamba-tiny" / "model.safetensors").write_text("other weights")
    assert find_contenders(tmp_path)[1].identity != found[1].identity
    assert find_contenders(tmp_path)[2].identity == found[2].identity


def test_identity_of_a_contender(tmp_path: Path) -> None:
    """The chat template and every file of the tokenizer change answers; the card does not."""
    shutil.copytree(MODELS, tmp_path, dirs_exist_ok=True)
    before = find_contenders(tmp_path)[1].identity
    for name in ("README.md", "thinkfast_export.json"):
        (tmp_path / "llamba-tiny" / name).write_text("{}")
        assert find_contenders(tmp_path)[1].identity == before
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        with (tmp_path / "llamba-tiny" / name).open("a") as file:
            file.write(" ")
        now = find_contenders(tmp_path)[1].identity
        assert now != before
        before = now


def test_engine_process_reports_a_failed_start(tmp_path: Path) -> None:
    """The real worker with a folder that is no model: one line that names the log."""
    log = tmp_path / "engines.log"
    with pytest.raises(EngineError, match=r"start: .*details in .*engines\.log"):
        EngineProcess(tmp_path / "absent", {}, log)
    assert "Traceback" in log.read_text()


def test_engine_process_has_the_settings_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU vLLM prefers VLLM_CPU_KVCACHE_SPACE to kv_cache_memory_bytes."""
    found: list[Any] = []

    class Started:
        def __init__(self, *arguments: Any) -> None:
            found.append(arguments[2])

        def ask(self, *_: Any, **__: Any) -> dict[str, float]:
            return {"engine_start_s": 0.0}

    monkeypatch.setattr(engine, "Worker", Started)
    EngineProcess(tmp_path, {}, tmp_path / "log")
    assert found[0]["VLLM_CPU_KVCACHE_SPACE"] is None


@pytest.mark.engine
def test_engine_process_measures_speed(tmp_path: Path) -> None:
    """Prompts that come twice, in a batch or in two rounds, are prefilled each time.

    The worker itself checks that nothing came from the prefix cache and that one step did it all.
    """
    settings = resolved(Settings(max_num_seqs=8, max_model_len=128, kv_cache_bytes=2**26))
    process = EngineProcess(MODELS / "llamba-tiny", settings, tmp_path / "engines.log")
    prompts = ["Anna has 5 books.", "Hugo has 28 eggs. In January Hugo sells 7.", "Ben has 3 pens."]
    for _ in range(2):
        found = process.ask("speed", prompts=prompts, num_sequences=8, num_tokens=4)
        assert found["prefill_tokens_per_s"] > 0
        assert found["decode_tokens_per_s"] > 8 * 3 / found["seconds"]
    process.close()
