"""The study of state dtypes: drift against the closed form, agreement, tables; no engine here."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts import state_drift, state_study, state_study_engine


def constant_inputs(num_tokens: int, decay: float) -> state_drift.Inputs:
    """One layer, two heads, the same input for every token."""
    ones = torch.ones(num_tokens, 1, 2, 4)
    log_decay = torch.full((num_tokens, 1, 2), math.log(decay))
    return state_drift.Inputs(ones, log_decay, ones, ones)


def test_drift_of_float32_and_bfloat16() -> None:
    """h = 1 + h / 2 comes to 2, which both hold; h = 1 + 0.999 h stops growing in bfloat16."""
    for found in state_drift.drift(constant_inputs(64, 0.5), (32, 64)):
        if found["store"] in ("float32", "bfloat16", "float16"):
            assert max(found["state"][0]) < 5e-3
    slow = {
        e["store"]: e["state"][0][0]
        for e in state_drift.drift(constant_inputs(2000, 0.999), (2000,))
    }
    assert slow["float32"] < 1e-4
    assert slow["bfloat16"] > 0.3


def test_drift_of_int8() -> None:
    """To nearest loses small inputs altogether; at random does not, on average."""
    torch.manual_seed(0)
    inputs = state_drift.slow_inputs(1000, seed=1, size=16)
    errors = {e["store"]: e for e in state_drift.drift(inputs, (500, 1000)) if e["tokens"] == 1000}
    assert errors["float32"]["state"][0][0] < 1e-5 < errors["float16"]["state"][0][0]
    assert errors["float16"]["output"][0][0] < errors["int8"]["output"][0][0] < 1
    assert len(errors["int8"]["state"][0]) == len(state_drift.TIME_CONSTANTS)


def test_to_nearest() -> None:
    state = torch.tensor([[[127.0, 1.4, -1.6, 0.4], [0.0, 0.0, 0.0, 0.0]]])
    wanted = torch.tensor([[[127.0, 1.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert torch.allclose(state_drift.to_nearest(state, 5), wanted)


def test_time_constants() -> None:
    found = state_drift.time_constants(state_drift.slow_inputs(10, size=2))
    assert torch.allclose(found, torch.tensor([state_drift.TIME_CONSTANTS]).double())


def test_agreement() -> None:
    found = state_study.agreement([[1, 2, 3], [1, 9, 3], [4]], [[1, 2, 3], [1, 2, 3], [4, 5]])
    assert found == {"same_answers": 1 / 3, "before_difference": 5 / 8}


def engine_result(store: str, tokens: list[int]) -> dict[str, Any]:
    return {
        "git_commit": state_study.git_commit(),
        "identity": "now",
        "model": "thinkfast/x",
        "store": store,
        "bytes_per_state": 1024,
        "pass@1": 0.5,
        "pass@1_stderr": 0.01,
        "sampled_s": 1.0,
        "greedy": [tokens],
    }


def write_engine_results(out: Path, num_tokens: int) -> list[str]:
    """Results of all engines; returns the options of the study that finds them."""
    for name in state_study.MODELS:
        inputs = state_drift.slow_inputs(num_tokens, size=4)
        torch.save(vars(inputs), out / f"{name}-3x2-inputs.pt")
        for store in state_study.ENGINE_STORES:
            result = engine_result(store, [1, 2] if store == "int8" else [1, 3])
            (out / f"{name}-{store}-3x2.json").write_text(json.dumps(result))
    return ["--problems", "3", "--samples", "2", "--tokens", str(num_tokens), "--out", str(out)]


@pytest.mark.parametrize(("num_tokens", "shown"), [(64, [64]), (80, [64, 80])])
def test_study(
    num_tokens: int, shown: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the engines, whose results are there already."""
    monkeypatch.setattr(state_study, "identity", lambda model: "now")
    assert state_study.main(write_engine_results(tmp_path, num_tokens)) == 0
    found = json.loads((tmp_path / "study.json").read_text())
    for errors in found["drift"].values():
        assert sorted({e["tokens"] for e in errors["errors"]}) == shown
    assert len(found["engines"]) == 8
    text = (tmp_path / "tables.md").read_text()
    assert "| x | int8 | 1,024 | 0.000 | 0.500 | 0.500 ± 0.010 |" in text
    assert "| 16,384 | output |" in text
    assert (tmp_path / "drift.png").stat().st_size > 1000


def test_engines_of_other_sources_are_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is the same, "-dirty" or not. Nor does an old result stay beside new inputs."""
    options = write_engine_results(tmp_path, 64)
    monkeypatch.setattr(state_study, "identity", lambda model: "another")
    monkeypatch.setattr(state_study.sys, "executable", "false")
    assert state_study.main(options) == 2
    assert not (tmp_path / "llamba-tiny-float32-3x2.json").exists()


def test_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    found = [state_study_engine.identity(model), state_study_engine.identity(model)]
    (model / "chat_template.jinja").write_text("{}")
    found.append(state_study_engine.identity(model))
    monkeypatch.setattr(state_study_engine, "code_hash", lambda: "another")
    found.append(state_study_engine.identity(model))
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_median_of_an_even_number_of_heads() -> None:
    assert state_study._median_and_worst([[1.0, 2.0], [4.0, 9.0]]) == "3.0e+00 (9.0e+00)"


class OneLayerEngine:
    """What ``record_inputs`` sees of an engine: a prompt that is cached is not computed."""

    def __init__(self) -> None:
        operator = SimpleNamespace(decode=None, prefill=lambda *inputs: None)
        self.mixer = SimpleNamespace(scan_op=operator)
        context = {"layer": self.mixer}
        config = SimpleNamespace(static_forward_context=context)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=config))
        self.cached = True

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(
            apply_chat_template=lambda turns, tokenize: turns[0]["content"],
            encode=lambda text, add_special_tokens: list(text.encode()),
        )

    def reset_prefix_cache(self) -> bool:
        self.cached = False
        return True

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> None:
        tokens = torch.tensor(prompts[0]["prompt_token_ids"][8 * self.cached :])
        x = tokens[:, None, None].expand(-1, 2, 1)
        self.mixer.scan_op.prefill(x, x[..., 0], x[:, :1], x[:, :1])
        self.cached = True


def test_recorded_inputs_are_of_all_tokens() -> None:
    texts = [problem["question"] for problem in state_study_engine.problems(3)]
    wanted = "".join(texts).encode()[:200]
    found = state_study_engine.record_inputs(OneLayerEngine(), 200)
    assert bytes(found["x"][:, 0, 0, 0].int().tolist()) == wanted
    assert found["B"].shape == (200, 1, 2, 1)


def test_recorded_inputs_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.shape) or tensor)
    state_study_engine.record_inputs(OneLayerEngine(), 8)
    assert len(moved) == 4


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert state_study.main(["--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "file: cannot write there (a file is in the way); give another folder" in error
    assert error.count("\n") == 1


def test_failed_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(state_study.sys, "executable", "false")
    assert state_study.main(["--out", str(tmp_path)]) == 2
    assert "llamba-tiny, float32: false ended with code 1" in capsys.readouterr().err


def test_wrong_number_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert state_study.main(["--tokens", "7", "--out", str(tmp_path)]) == 2
    assert "--tokens 7: accepted are 64 to 16384" in capsys.readouterr().err
