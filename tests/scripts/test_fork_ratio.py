"""``scripts/fork_ratio.py``: its table, its models, and what it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from scripts import fork_ratio
from vllm_thinkfast.checkpoints.config_reader import read_config


def repeats(*walls: float, prefilled: int) -> list[dict[str, float]]:
    return [{"wall_s": wall, "process_s": 2 * wall, "prefilled": prefilled} for wall in walls]


def test_table_has_the_median_of_the_repeats_ratios() -> None:
    row: dict[str, Any] = {"model": "Llamba", "prompt": 512, "generated": 64}
    row["unforked"] = repeats(8.0, 9.0, 4.0, prefilled=16384)
    row["forked"] = repeats(4.0, 3.0, 4.0, prefilled=543)
    line = fork_ratio.table([row]).splitlines()[-1]
    ratio = "2.00 (1.00 to 3.00)"
    assert line == f"| Llamba | 512 + 64 | {ratio} | {ratio} | 16,384 | 543 |"


@pytest.mark.parametrize("name", fork_ratio.MODELS)
def test_models_are_what_their_names_say(name: str, tmp_path: Path) -> None:
    folder = fork_ratio.write_model(name, tmp_path, "tiny")
    config = read_config(folder)
    assert type(config).__name__.removesuffix("Config") == name.partition(",")[0]
    version = json.loads((folder / "config.json").read_text()).get("mamba_version")
    assert version == {"1": "mamba1", "2": "mamba2"}.get(name[-1])


def test_engines_have_the_memory_that_the_record_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU vLLM prefers VLLM_CPU_KVCACHE_SPACE to kv_cache_memory_bytes."""
    seen = []
    monkeypatch.setattr(fork_ratio.os, "environ", os.environ | {"VLLM_CPU_KVCACHE_SPACE": "4"})

    def measure(*_: Any) -> list[dict[str, Any]]:
        seen.append(os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
        return []

    monkeypatch.setattr(fork_ratio, "measure", measure)
    assert fork_ratio.main(["--out", str(tmp_path), "--preset", "tiny"]) == 0
    assert seen == [None] * len(fork_ratio.MODELS)
    recorded = json.loads((tmp_path / "fork.json").read_text())["engine"]
    assert recorded["kv_cache_memory_bytes"] == 2**30


def test_bad_folder_is_refused_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: Any) -> list[dict[str, Any]]:
        raise AssertionError("measured")

    monkeypatch.setattr(fork_ratio, "measure", measure)
    (tmp_path / "file").write_text("")
    assert fork_ratio.main(["--out", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert "below: cannot write there (Not a directory); give another folder" in error
    assert error.count("\n") == 1


def test_wrong_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert fork_ratio.main(["--samples", "0"]) == 2
    assert "--samples 0: need a whole number of at least 1" in capsys.readouterr().err
