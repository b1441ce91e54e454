"""Order of the measurements, resuming, and failures, with scripted engines."""

from pathlib import Path

import pytest

from tests.vllm_thinkfast.bench.scripted import Stage, models, settings
from vllm_thinkfast.bench import environment
from vllm_thinkfast.bench.run import Measured, Run
from vllm_thinkfast.bench.settings import Settings
from vllm_thinkfast.bench.store import Results


def measure(
    folder: Path, stage: Stage, values: Settings, *names: str, lines: list[str] | None = None
) -> Measured:
    results = Results(folder / "run")
    try:
        say = (lines if lines is not None else []).append
        chosen = models(folder, *(names or ("llama", "llamba")))
        return Run(chosen, values, results, folder / "logs", say, stage.start).measure()
    finally:
        results.close()


def test_together_alternates(tmp_path: Path) -> None:
    """Cell by cell, the second round in reversed order; each engine starts once."""
    stage = Stage()
    found = measure(tmp_path, stage, settings())
    assert stage.measured == [
        "measure llama 1",
        "measure llamba 1",
        "measure llama 4",
        "measure llamba 4",
        "measure llamba 1",
        "measure llama 1",
        "measure llamba 4",
        "measure llama 4",
    ]
    assert stage.calls.count("start llama") == stage.calls.count("start llamba") == 1
    assert stage.calls.count("warm_up llama 4") == 1
    assert stage.alive == set()
    assert len(found.machines) == 2
    assert stage.alive_at_roofline == [0, 2]
    assert {key: len(rows) for key, rows in found.cells.items()} == {
        (model, cell): 2 for model in ("llama", "llamba") for cell in ("1 x 8+4", "4 x 8+4")
    }


def test_one_by_one(tmp_path: Path) -> None:
    """Never two engines at once; a round measures all cells of a model, after a warm-up."""
    stage = Stage()
    measure(tmp_path, stage, settings(engines="one-by-one"))
    assert stage.most_alive == 1
    assert stage.alive_at_roofline == [0, 0]
    assert stage.measured == [
        "measure llama 1",
        "measure llama 4",
        "measure llamba 1",
        "measure llamba 4",
        "measure llamba 1",
        "measure llamba 4",
        "measure llama 1",
        "measure llama 4",
    ]
    assert stage.calls.count("start llama") == 2
    assert stage.calls.count("warm_up llama 4") == 2


def test_resumes(tmp_path: Path) -> None:
    """What was measured is not measured again; more rounds and cells add to it."""
    measure(tmp_path, Stage(), settings())
    again = Stage()
    lines: list[str] = []
    found = measure(tmp_path, again, settings(), lines=lines)
    assert again.calls == []
    assert lines == ["8 of 8 measurements reused"]
    assert found.facts["llama"]["num_parameters"] == 1000
    more = Stage()
    measure(tmp_path, more, settings(rounds=3))
    assert len(more.measured) == 4


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"threads": 2}, {"engines": "one-by-one"}]
)
def test_other_settings_are_measured(tmp_path: Path, change: dict[str, object]) -> None:
    measure(tmp_path, Stage(), settings())
    again = Stage()
    measure(tmp_path, again, settings(**change))
    assert len(again.measured) == 8


def test_other_kernels_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba mended, or broken; a library preloaded."""
    measure(tmp_path, Stage(), settings())
    monkeypatch.setattr(environment, "cpu_operators", lambda: {"discrete_ssd": "other"})
    again = Stage()
    measure(tmp_path, again, settings())
    assert len(again.measured) == 8
    monkeypatch.setenv("LD_PRELOAD", "")
    third = Stage()
    measure(tmp_path, third, settings())
    assert len(third.measured) == 8


def test_killed_in_between(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    stage = Stage()
    original = stage.start

    def say(line: str) -> None:
        if line.startswith("[3/"):
            raise KilledError

    results = Results(tmp_path / "run")
    with pytest.raises(KilledError):
        Run(
            models(tmp_path, "llama", "llamba"), settings(), results, tmp_path, say, original
        ).measure()
    results.close()
    assert stage.alive == set()
    again = Stage()
    measure(tmp_path, again, settings())
    assert len(stage.measured) + len(again.measured) == 8


def test_failing_cell(tmp_path: Path) -> None:
    """It is reported, not repeated in the next round, and the rest goes on in a new engine."""
    stage = Stage(failing=("llamba 1",))
    lines: list[str] = []
    found = measure(tmp_path, stage, settings(), lines=lines)
    assert found.cells["llamba", "1 x 8+4"] == [{"error": "llamba: IndexError"}] * 2
    assert all("error" not in row for row in found.cells["llamba", "4 x 8+4"])
    assert stage.calls.count("measure llamba 1") == 1
    assert stage.calls.count("start llamba") == 2
    assert "FAILED: llamba: IndexError" in lines
    again = Stage()
    measure(tmp_path, again, settings())
    assert again.measured == ["measure llamba 1"] * 2


def test_engine_that_does_not_start(tmp_path: Path) -> None:
    stage = Stage(broken=("llamba",))
    found = measure(tmp_path, stage, settings())
    assert found.facts["llamba"] == {"error": "llamba: no memory"}
    assert found.cells["llamba", "4 x 8+4"] == [{"error": "llamba: no memory"}] * 2
    assert stage.calls.count("start llamba") == 1
    assert len(stage.measured) == 4


def test_largest_batch_is_what_fits(tmp_path: Path) -> None:
    stage = Stage()
    measure(tmp_path, stage, settings(batches="max", rounds=1))
    assert stage.measured == ["measure llama 6", "measure llamba 6"]
    stage = Stage()
    measure(tmp_path, stage, settings(batches="max", rounds=1, max_num_seqs=5))
    assert stage.measured == ["measure llama 5", "measure llamba 5"]
