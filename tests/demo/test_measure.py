"""Phases are measured once, reused afterwards, and survive a kill; engines here are scripted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo.measure import WARM_UP_TOKENS, Measurement, Progress
from demo.settings import Contender, Settings
from demo.store import PhaseStore
from tests.demo.conftest import passk_result


class ScriptedEngine:
    """Answers like an engine process and notes what it was asked."""

    engine_start_s = 1.0

    def __init__(self, name: str, asked: list[str], fail_at: str | None) -> None:
        self.name, self.asked, self.fail_at = name, asked, fail_at
        self.is_closed = False
        asked.append(f"{name} start")

    def ask(self, do: str, on_progress: Any = None, **arguments: Any) -> dict[str, Any]:
        entry = f"{self.name} {do}"
        if do == "speed" and arguments["num_tokens"] == WARM_UP_TOKENS:
            entry += " warm-up"
        self.asked.append(entry)
        if self.asked.count(entry) > 1 and self.fail_at == entry:
            raise RuntimeError("killed")
        return passk_result(0.5) if do == "passk" else {"speed": len(self.asked)}

    def close(self) -> None:
        self.is_closed = True


class Run:
    """One call of the demo's measuring part."""

    def __init__(
        self,
        tmp_path: Path,
        contenders: list[Contender],
        settings: Settings | None = None,
        fail_at: str | None = None,
    ) -> None:
        self.asked: list[str] = []
        self.engines: list[ScriptedEngine] = []
        self.lines: list[str] = []
        progress = Progress()
        progress.say = self.lines.append  # type: ignore[method-assign]

        def start(contender: Contender) -> Any:
            self.engines.append(ScriptedEngine(contender.name, self.asked, fail_at))
            return self.engines[-1]

        settings = settings or Settings(speed_rounds=3)
        store = PhaseStore(tmp_path / "phases")
        environment = {"versions": {"vllm": "1"}}
        self.measurement = Measurement(settings, contenders, store, environment, progress, start)

    def __call__(self) -> dict[str, Any]:
        return self.measurement.run()


def test_measurement_alternates_and_closes(tmp_path: Path, contenders: list[Contender]) -> None:
    run = Run(tmp_path, contenders)
    found = run()
    speeds = [entry for entry in run.asked if entry.endswith("speed")]
    t, s = "teacher speed", "student speed"
    assert speeds == [t, s, s, t, t, s]
    assert run.asked[:2] == ["teacher start", "teacher passk"]
    assert sum(entry.endswith("start") for entry in run.asked) == 2
    assert len(found["speed"]["rounds"]) == 3
    assert found["passk"]["student"]["engine_start_s"] == 1.0
    assert all(engine.is_closed for engine in run.engines)


def test_measurement_is_reused_without_engines(tmp_path: Path, contenders: list[Contender]) -> None:
    first = Run(tmp_path, contenders)()
    again = Run(tmp_path, contenders)
    assert again() == first
    assert again.asked == []
    assert sum("reused" in line for line in again.lines) == 3


def test_measurement_continues_after_a_failure(tmp_path: Path, contenders: list[Contender]) -> None:
    broken = Run(tmp_path, contenders, fail_at="student speed")
    with pytest.raises(RuntimeError, match="killed"):
        broken()
    assert all(engine.is_closed for engine in broken.engines)
    again = Run(tmp_path, contenders)
    found = again()
    assert not any(entry.endswith("passk") for entry in again.asked)
    # one round was complete; the broken one is measured again as a whole
    assert len(found["speed"]["rounds"]) == 3
    assert [e for e in again.asked if e.endswith("speed")] == [
        "student speed",
        "teacher speed",
        "teacher speed",
        "student speed",
    ]


@pytest.mark.parametrize(
    ("change", "asks_again"),
    [
        ({"temperature": 0.9}, ["teacher", "student"]),
        ({"num_samples": 3}, ["teacher", "student"]),
        ({"speed_tokens": 99}, []),
        ({"speed_rounds": 4}, []),
    ],
)
def test_measurement_reuses_only_what_the_settings_allow(
    tmp_path: Path, contenders: list[Contender], change: dict[str, Any], asks_again: list[str]
) -> None:
    settings = Settings(speed_rounds=3)
    Run(tmp_path, contenders, settings)()
    other = Run(tmp_path, contenders, replace(settings, **change))
    other()
    asked = [entry.split()[0] for entry in other.asked if entry.endswith("passk")]
    assert asked == asks_again
    num_speeds = sum(entry.endswith("speed") for entry in other.asked)
    assert num_speeds == (2 if change == {"speed_rounds": 4} else 6)


def test_measurement_of_a_changed_model(tmp_path: Path, contenders: list[Contender]) -> None:
    Run(tmp_path, contenders)()
    changed = [contenders[0], replace(contenders[1], identity="other")]
    other = Run(tmp_path, changed)
    other()
    assert [entry for entry in other.asked if entry.endswith("passk")] == ["student passk"]


def test_measurement_of_changed_data(tmp_path: Path, contenders: list[Contender]) -> None:
    data = tmp_path / "data.jsonl"
    row = '{"question": "Q?", "answer": "#### 1"}\n'
    data.write_text(row)
    settings = Settings(data=str(data), speed_rounds=3)
    Run(tmp_path, contenders, settings)()
    moved = tmp_path / "moved.jsonl"
    moved.write_text(row)
    again = Run(tmp_path, contenders, replace(settings, data=str(moved)))
    again()
    assert again.asked == []
    data.write_text(row * 2)
    again = Run(tmp_path, contenders, settings)
    again()
    assert "teacher passk" in again.asked
