"""The runner with a scripted engine: order, backpressure, resume, kill -9, failures."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scripted_backend
from scripted_backend import SETTINGS, ScriptedBackend, draw, problems

from lm_eval_tasks import jsonl
from lm_eval_tasks.samples import SampleRecord, SampleStore, sample_seed
from lm_eval_tasks.sampling import progress
from lm_eval_tasks.sampling.progress import Progress
from lm_eval_tasks.sampling.runner import missing_samples

ROOT = Path(__file__).resolve().parents[3]
Content = dict[tuple[str, int], tuple[int | None, str, int, str]]


def content(folder: Path) -> Content:
    """What a run has drawn, without the times."""
    return {
        record.key: (record.seed, record.text, record.num_tokens, record.finish_reason)
        for record in SampleStore(folder).records()
    }


def expected(num_problems: int, num_samples: int) -> Content:
    found: Content = {}
    for problem in problems(num_problems):
        for index in range(num_samples):
            seed = sample_seed(1234, problem.problem_id, index)
            text = f"{problem.prompt} -> {seed}"
            found[problem.problem_id, index] = (
                seed,
                text,
                seed % 50,
                ["length", "stop", "stop"][seed % 3],
            )
    return found


# -- order ----------------------------------------------------------------------------------------


def test_saturated_order_is_sample_major_and_shuffled(tmp_path: Path) -> None:
    backend = ScriptedBackend()
    draw(tmp_path, backend, num_problems=30, num_samples=3)
    rounds = [backend.submitted[start : start + 30] for start in (0, 30, 60)]
    for index, submitted in enumerate(rounds):
        assert {i for _, i in submitted} == {index}
        assert {p for p, _ in submitted} == {f"t/{i}" for i in range(30)}
    orders = [[p for p, _ in submitted] for submitted in rounds]
    assert len({tuple(order) for order in orders}) == 3
    again = ScriptedBackend()
    draw(tmp_path / "again", again, num_problems=30, num_samples=3)
    assert again.submitted == backend.submitted


def test_saturated_order_does_not_depend_on_what_exists() -> None:
    asked = problems(10)
    every = list(missing_samples(asked, 4, {}, SETTINGS, "saturated"))
    have = {"t/3": {0, 2}, "t/9": {1}}
    rest = list(missing_samples(asked, 4, have, SETTINGS, "saturated"))
    assert rest == [r for r in every if r.sample_index not in have.get(r.problem.problem_id, ())]


def test_latency_regime_gives_the_engine_to_one_problem(tmp_path: Path) -> None:
    backend = ScriptedBackend(max_in_flight=2)
    draw(tmp_path, backend, num_problems=4, num_samples=6, regime="latency")
    assert backend.submitted == [(f"t/{p}", j) for p in range(4) for j in range(6)]
    assert backend.peak == 6, "all samples of a problem are submitted at once"
    by_problem: dict[str, list[SampleRecord]] = {}
    for record in SampleStore(tmp_path).records():
        by_problem.setdefault(record.problem_id, []).append(record)
    ends = [max(r.finish_s for r in records) for records in by_problem.values()]
    starts = [min(r.submit_s for r in records) for records in by_problem.values()]
    assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))


def test_backpressure(tmp_path: Path) -> None:
    backend = ScriptedBackend(max_in_flight=3)
    draw(tmp_path, backend, num_problems=20, num_samples=5)
    assert backend.peak == 3
    assert len(content(tmp_path)) == 100


# -- what is stored -------------------------------------------------------------------------------


def test_records_and_session_facts(tmp_path: Path) -> None:
    facts = draw(tmp_path, ScriptedBackend(delay_s=0.001))
    assert content(tmp_path) == expected(5, 4)
    (session,) = SampleStore(tmp_path).sessions()
    assert session == facts
    assert session["session"] == 0
    assert session["drawn"] == 20
    assert session["prompt_tokens"] == 20 * 7
    assert session["cached_tokens"] == 20 * 3
    assert session["tokens"] == sum(tokens for _, _, tokens, _ in content(tmp_path).values())
    assert session["mean_running"] == 2.5
    records = list(SampleStore(tmp_path).records())
    assert all(0 <= r.submit_s <= (r.first_token_s or -1) <= r.finish_s for r in records)
    assert max(r.finish_s for r in records) <= session["wall_s"]
    finish = [r.finish_s for r in records]
    assert finish == sorted(finish), "stored in the order in which they finished"


def test_nothing_is_drawn_twice(tmp_path: Path) -> None:
    draw(tmp_path, ScriptedBackend(), num_problems=3, num_samples=2)
    more = ScriptedBackend()
    facts = draw(tmp_path, more, num_problems=5, num_samples=4)
    assert len(more.submitted) == 20 - 6
    assert more.warmed_up == [14]
    assert facts["session"] == 1
    assert content(tmp_path) == expected(5, 4)
    assert {r.session for r in SampleStore(tmp_path).records()} == {0, 1}


def test_resumed_latency_problems_are_named(tmp_path: Path) -> None:
    """Their samples ran at two loads, which a curve over seconds has to know."""
    draw(tmp_path, ScriptedBackend(), num_problems=2, num_samples=3, regime="latency")
    facts = draw(tmp_path, ScriptedBackend(), num_problems=3, num_samples=5, regime="latency")
    assert facts["resumed_problems"] == ["t/0", "t/1"]


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regime", "seeds"), [("saturated", "seeded"), ("latency", "seeded"), ("saturated", "unseeded")]
)
def test_killed_again_and_again(tmp_path: Path, regime: str, seeds: str) -> None:
    """kill -9 in the middle, three times, then to the end: the same samples, each once.

    Without seeds they cannot be the same, but what is stored stays and nothing is drawn twice.
    """
    folder = tmp_path / "run"
    file = folder / "samples.jsonl"
    command = [sys.executable, scripted_backend.__file__, str(folder), "25", "8", regime, seeds]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kept = 0
    earlier: Content = {}
    for goal in (30, 75, 120):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while not file.exists() or file.read_bytes().count(b"\n") < goal:
                assert process.poll() is None, "it ended before it was killed"
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        stored = content(folder)
        assert max(goal, kept) <= len(stored) < 200
        assert earlier.items() <= stored.items()
        earlier, kept = stored, len(stored)
        with file.open("ab") as opened:
            opened.write(
                b'{"problem_id": "t/0", "sam'
            )  # as if it had died in the middle of a write
    subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)
    found = content(folder)
    assert earlier.items() <= found.items()
    if seeds == "seeded":
        assert found == expected(25, 8)
    else:
        assert found.keys() == expected(25, 8).keys()
        assert {seed for seed, *_ in found.values()} == {None}
        assert '"seed": null' in file.read_text()
    assert file.read_bytes().count(b"\n") == 200
    assert [s["session"] for s in SampleStore(folder).sessions()] == [0, 1, 2, 3]


def test_engine_that_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"the script says so; \d+ of 20 samples are stored"):
        draw(tmp_path, ScriptedBackend(fail_after=9), stream=io.StringIO())
    assert capsys.readouterr().err.count("\n") == 1
    stored = content(tmp_path)
    assert len(stored) >= 9
    (session,) = SampleStore(tmp_path).sessions()
    assert session["drawn"] == len(stored)
    draw(tmp_path, ScriptedBackend())
    assert content(tmp_path) == expected(5, 4)


def test_engine_that_fails_at_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ScriptedBackend, num_samples: int) -> None:
        raise scripted_backend.BackendError("no connection")

    monkeypatch.setattr(ScriptedBackend, "warm_up", fail)
    with pytest.raises(ValueError, match=r"no connection; nothing was drawn, 0 of 20"):
        draw(tmp_path, ScriptedBackend())
    assert SampleStore(tmp_path).sessions() == []


def test_interrupt_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ScriptedBackend()
    wait = backend.wait

    def interrupted() -> Any:
        if backend.num_finished >= 9:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(backend, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, backend)
    assert len(content(tmp_path)) == SampleStore(tmp_path).sessions()[0]["drawn"] >= 9


def test_disk_full_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = jsonl.os.write
    written: list[int] = []

    def short_of_space(descriptor: int, data: bytes) -> int:
        if len(written) < 12:
            written.append(len(data))
            return write(descriptor, data)
        return write(descriptor, data[:10]) if len(data) > 10 and _left(data) else _no_space()

    def _left(data: bytes) -> bool:
        return data.startswith(b'{"problem_id"')

    def _no_space() -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl.os, "write", short_of_space)
    with pytest.raises(ValueError, match=r"No space left on device.*run the same command again"):
        draw(tmp_path, ScriptedBackend(), stream=io.StringIO())
    monkeypatch.undo()
    assert capsys.readouterr().err.count("\n") == 1
    assert len(content(tmp_path)) == 11  # the twelfth line was the session's
    draw(tmp_path, ScriptedBackend())
    assert content(tmp_path) == expected(5, 4)


# -- progress -------------------------------------------------------------------------------------


class Clock:
    """Stands in for `time` in the progress module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    monkeypatch.setattr(progress, "time", stand_in)
    return stand_in


def test_progress_in_a_log_file(clock: Clock) -> None:
    stream = io.StringIO()
    shown = Progress(total=1000, done=100, stream=stream)
    clock.now = 500.0  # start-up
    shown.start()
    for _ in range(80):
        clock.now += 0.25
        shown.add(num_tokens=50)
        shown.show()
    shown.end()
    assert stream.getvalue().splitlines() == [
        "140/1000 samples, 200 tokens/s, 0:03:35 left",
        "180/1000 samples, 200 tokens/s, 0:03:25 left",
        "180/1000 samples, 200 tokens/s, 0:03:25 left",
    ]


def test_progress_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    shown = Progress(total=2, done=0, stream=stream)
    shown.start()
    clock.now += 5000
    shown.show()
    shown.add(10)
    shown.show()
    clock.now += 1
    shown.show()
    shown.add(10)
    shown.end()
    lines = [line.rstrip() for line in re.split(r"[\r\n]", stream.getvalue())]
    assert lines == [
        "0/2 samples, 0 tokens/s",
        "1/2 samples, 0 tokens/s, 1:23:21 left",
        "2/2 samples, 0 tokens/s",
        "",
        "",
    ]


def test_sessions_are_one_json_object_a_line(tmp_path: Path) -> None:
    draw(tmp_path, ScriptedBackend())
    rows = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [sorted({"warmup_s", "wall_s"} & row.keys()) for row in rows] == [
        ["warmup_s"],
        ["wall_s"],
    ]
