"""Early stops while sampling, on the scripted engine: what is drawn, resume, kill -9, failures."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest
import scripted_stops
from run_folders import CONFIG
from scripted_backend import SETTINGS, problems
from scripted_stops import AnsweringBackend, answer_of, draw_stopping

from lm_eval_tasks import jsonl
from lm_eval_tasks.jury import VoteJury
from lm_eval_tasks.samples import HASHED_FIELDS, SampleStore, config_hash, sample_seed
from lm_eval_tasks.sampling.backend import Drawn
from lm_eval_tasks.sampling.progress import Progress
from lm_eval_tasks.sampling.waves import Waves
from lm_eval_tasks.stopping import StopRule
from lm_eval_tasks.verdicts import read_classes, read_verdicts, score_run

ROOT = Path(__file__).resolve().parents[3]
Content = dict[tuple[str, int], tuple[int | None, str]]


def content(folder: Path) -> Content:
    return {record.key: (record.seed, record.text) for record in SampleStore(folder).records()}


def counts(folder: Path) -> dict[str, int]:
    return dict(Counter(name for name, _ in content(folder)))


def num_needed(problem: int, cap: int, error: float, every: int) -> int:
    """How many samples the rule asks for, from its definition."""
    votes: Counter[int] = Counter()
    for j in range(cap):
        answer = answer_of(problem, sample_seed(1234, f"t/{problem}", j))
        if answer is not None:
            votes[answer] += 1
        if (j + 1) % every:
            continue
        leader, second = sorted([*votes.values(), 0, 0], reverse=True)[:2]
        throws = leader + second + 1
        tail = sum(comb(throws, heads) for heads in range(second + 1))  # of at most v2 heads
        if leader and Fraction(tail, 2**throws) <= error:
            return j + 1
        if leader - second > cap - j - 1:
            return j + 1
    return cap


def expected(num_problems: int, cap: int, error: float = 0.05, every: int = 4) -> Content:
    found: Content = {}
    for i in range(num_problems):
        for j in range(num_needed(i, cap, error, every)):
            seed = sample_seed(1234, f"t/{i}", j)
            answer = answer_of(i, seed)
            text = "no idea" if answer is None else f"so it is #### {answer}"
            found[f"t/{i}", j] = (seed, text)
    return found


# -- what is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("every", [3, 4, 32])
def test_decided_problems_stop(tmp_path: Path, error: float, every: int) -> None:
    facts = draw_stopping(tmp_path, AnsweringBackend(), error=error, every=every)
    assert content(tmp_path) == expected(10, 32, error, every)
    assert facts["open_problems"] == 0
    assert facts["drawn"] == len(content(tmp_path))
    if every < 32:
        assert len(set(counts(tmp_path).values())) > 1
    # Everything is judged, as thinkfast-eval score does it.
    live = list(read_verdicts(tmp_path)), read_classes(tmp_path, "1.0+number/x")
    assert score_run(tmp_path) == (len(live[0]), 0)
    (tmp_path / "verdicts.jsonl").unlink()
    (tmp_path / "classes.jsonl").unlink()
    score_run(tmp_path)
    assert sorted(read_verdicts(tmp_path), key=lambda v: v.key) == sorted(
        live[0], key=lambda v: v.key
    )


def test_the_first_wave_is_that_of_a_uniform_run(tmp_path: Path) -> None:
    """The lowest index goes first, in the order of a run without early stops."""
    backend = AnsweringBackend(max_in_flight=100)
    draw_stopping(tmp_path, backend)
    rounds = [backend.submitted[start : start + 10] for start in (0, 10, 20, 30)]
    for index, submitted in enumerate(rounds):
        assert {i for _, i in submitted} == {index}
        assert {p for p, _ in submitted} == {f"t/{i}" for i in range(10)}
    assert len({tuple(p for p, _ in submitted) for submitted in rounds}) == 4


def test_nobody_waits_for_a_slow_problem(tmp_path: Path) -> None:
    """A barrier between waves would leave the places of the others empty."""
    backend = AnsweringBackend(max_in_flight=8, slow=frozenset({"t/4"}))
    draw_stopping(tmp_path, backend, num_problems=5)
    last = {p: i for i, (p, _) in enumerate(backend.submitted)}
    second_wave_of_slow = next(
        i for i, (p, j) in enumerate(backend.submitted) if p == "t/4" and j >= 4
    )
    assert all(last[p] < second_wave_of_slow for p in last if p != "t/4")
    assert counts(tmp_path)["t/3"] > 4, "others went on meanwhile"
    assert content(tmp_path) == expected(5, 32)


def test_backpressure(tmp_path: Path) -> None:
    backend = AnsweringBackend(max_in_flight=3)
    draw_stopping(tmp_path, backend)
    assert backend.peak == 3


def test_silent_problem_is_drawn_to_the_cap(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scripted_stops, "answer_of", lambda problem, seed: None)
    draw_stopping(tmp_path, AnsweringBackend(), num_problems=2, num_samples=10)
    assert counts(tmp_path) == {"t/0": 10, "t/1": 10}


@pytest.mark.parametrize("first", [4, 8, 10])
def test_more_samples_later(tmp_path: Path, first: int) -> None:
    """It is the run that the larger cap would have drawn; only open problems go on."""
    draw_stopping(tmp_path, AnsweringBackend(), num_samples=first)
    before = counts(tmp_path)
    more = AnsweringBackend()
    draw_stopping(tmp_path, more, num_samples=32)
    assert content(tmp_path) == expected(10, 32)
    assert {p for p, _ in more.submitted} == {p for p, n in counts(tmp_path).items() if n > first}
    assert all(j >= before[p] for p, j in more.submitted)
    assert SampleStore(tmp_path).config()["num_samples"] == 32
    assert draw_stopping(tmp_path, AnsweringBackend(), num_samples=8) == {"drawn": 0}


def test_more_problems_later(tmp_path: Path) -> None:
    draw_stopping(tmp_path, AnsweringBackend(), num_problems=4)
    draw_stopping(tmp_path, AnsweringBackend(), num_problems=10)
    assert content(tmp_path) == expected(10, 32)


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_after", [1, 17, 39, 41, 60, 90, 110])
def test_broken_off_at_any_sample(tmp_path: Path, fail_after: int) -> None:
    with pytest.raises(ValueError, match=r"the script says so; \d+ of at most \d+ samples"):
        draw_stopping(tmp_path, AnsweringBackend(fail_after=fail_after), stream=io.StringIO())
    kept = content(tmp_path)
    assert len(kept) >= fail_after
    draw_stopping(tmp_path, AnsweringBackend())
    assert content(tmp_path) == expected(10, 32)
    assert draw_stopping(tmp_path, AnsweringBackend()) == {"drawn": 0}


@pytest.mark.parametrize("lost", ["verdicts.jsonl", "classes.jsonl"])
def test_decisions_follow_from_the_samples_alone(tmp_path: Path, lost: str) -> None:
    with pytest.raises(ValueError, match="the script says so"):
        draw_stopping(tmp_path, AnsweringBackend(fail_after=70), stream=io.StringIO())
    (tmp_path / lost).unlink()
    draw_stopping(tmp_path, AnsweringBackend())
    assert content(tmp_path) == expected(10, 32)


def test_killed_again_and_again(tmp_path: Path) -> None:
    """kill -9 in the middle, three times, then to the end: the same decisions and texts."""
    folder = tmp_path / "run"
    file = folder / "samples.jsonl"
    command = [sys.executable, scripted_stops.__file__, str(folder), "25", "32"]
    paths = [str(ROOT), str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    earlier: Content = {}
    for goal in (40, 120, 190):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while not file.exists() or file.read_bytes().count(b"\n") < goal:
                assert process.poll() is None, "it ended before it was killed"
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        stored = content(folder)
        assert earlier.items() <= stored.items()
        earlier = stored
        for name in ("samples.jsonl", "verdicts.jsonl"):  # died in the middle of a write
            with (folder / name).open("ab") as opened:
                opened.write(b'{"problem_id": "t/0", "sam')
    subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)
    found = content(folder)
    assert earlier.items() <= found.items()
    assert found == expected(25, 32)
    assert score_run(folder) == (len(found), 0)


@pytest.mark.parametrize("num_lost", [1, 3, 9])
def test_power_cut_that_loses_samples_with_verdicts(tmp_path: Path, num_lost: int) -> None:
    """The last lines of one file are lost, those of the other are not."""
    with pytest.raises(ValueError, match="the script says so"):
        draw_stopping(tmp_path, AnsweringBackend(fail_after=70), stream=io.StringIO())
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-num_lost]))
    draw_stopping(tmp_path, AnsweringBackend())
    found = content(tmp_path)
    assert found == expected(10, 32)
    assert score_run(tmp_path) == (len(found), 0)
    assert {verdict.key for verdict in read_verdicts(tmp_path)} == found.keys()


def test_samples_are_on_the_disk_before_their_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync, write = SampleStore.sync_samples, jsonl.os.write

    def counted(store: SampleStore) -> None:
        sync(store)
        synced.append((tmp_path / "samples.jsonl").read_bytes().count(b"\n"))

    verdicts: list[bytes] = []

    def checked(descriptor: int, data: bytes) -> int:
        if b'"answer"' in data:
            verdicts.append(data)
            assert synced
            assert len(verdicts) <= synced[-1]
        return write(descriptor, data)

    monkeypatch.setattr(SampleStore, "sync_samples", counted)
    monkeypatch.setattr(jsonl.os, "write", checked)
    draw_stopping(tmp_path, AnsweringBackend(), stream=io.StringIO())
    assert len(verdicts) == len(content(tmp_path))


class FailingJury(VoteJury):
    """Cannot judge after a while."""

    left = 6

    def is_open(self, problem_id: str, num_drawn: int) -> bool:
        self.left -= 1
        if self.left < 0:
            self._judge.judge = self._fail  # type: ignore[method-assign]
        return super().is_open(problem_id, num_drawn)

    @staticmethod
    def _fail(*_: Any) -> None:
        raise RuntimeError("the answer-comparing worker did not start")


def test_judging_that_fails_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"did not start; the samples of t/\d+ are stored"):
        draw_stopping(tmp_path, AnsweringBackend(), jury=FailingJury, stream=io.StringIO())
    assert capsys.readouterr().err.count("error:") == 1
    assert "idle_s" in SampleStore(tmp_path).sessions()[-1], "the seconds so far count"
    draw_stopping(tmp_path, AnsweringBackend())
    assert content(tmp_path) == expected(10, 32)


def test_disk_full_while_judging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = jsonl.os.write
    written: list[int] = []

    def short_of_space(descriptor: int, data: bytes) -> int:
        is_facts = data.startswith(b'{"session"')
        if b'"answer"' in data or (is_facts and len(written) > 20):
            written.append(len(data))
            if len(written) > 20:
                raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(jsonl.os, "write", short_of_space)
    with pytest.raises(ValueError, match=r"verdicts.jsonl: cannot be written \(No space left"):
        draw_stopping(tmp_path, AnsweringBackend(), stream=io.StringIO())
    monkeypatch.undo()
    assert capsys.readouterr().err.count("error:") == 1, "not one for each file"
    draw_stopping(tmp_path, AnsweringBackend())
    assert content(tmp_path) == expected(10, 32)


class SlowJury(VoteJury):
    def is_open(self, problem_id: str, num_drawn: int) -> bool:
        time.sleep(0.02)
        return super().is_open(problem_id, num_drawn)


def test_session_says_what_borders_cost(tmp_path: Path) -> None:
    facts = draw_stopping(tmp_path, AnsweringBackend(), num_problems=1, jury=SlowJury)
    (session,) = SampleStore(tmp_path).sessions()
    assert session == facts
    looks = len(content(tmp_path)) // 4
    # One problem: nothing else is under way while its vote is looked at.
    assert facts["grading_s"] >= 0.02 * looks
    assert facts["idle_s"] >= 0.01 * looks
    assert 0 <= facts["unfilled_s"] <= facts["wall_s"]


class QueueingBackend(AnsweringBackend):
    """As vLLM: a batch, and a queue that is as long again, so that a place is filled at once."""

    free_s = 0.0

    def __init__(self, num_places: int, **options: Any) -> None:
        super().__init__(2 * num_places, **options)
        self.num_places = num_places

    def wait(self) -> list[Drawn]:
        is_free, started = len(self.waiting) < self.num_places, time.monotonic()
        found = super().wait()
        if is_free:
            self.free_s += time.monotonic() - started
        return found


def test_a_short_queue_is_no_free_place(tmp_path: Path) -> None:
    """Three problems with 4 samples in a wave never fill the queue, but at times the batch."""
    backend = QueueingBackend(10, delay_s=0.005)
    facts = draw_stopping(tmp_path, backend, num_problems=3, num_samples=64, error=0.0)
    assert 0 < backend.free_s < 0.95 * facts["wall_s"]
    assert facts["unfilled_s"] == pytest.approx(backend.free_s, rel=0.1)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_error": 0.1}, "stop_error is 0.05 there and 0.1 now"),
        ({"stop_every": 8}, "stop_every is 4 there and 8 now"),
        ({"stop_error": None, "stop_every": None}, "stop_error is 0.05 there and null now"),
    ],
)
def test_other_stops_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_stopping(tmp_path, AnsweringBackend(), num_problems=2)
    config = SampleStore(tmp_path).config() | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        SampleStore(tmp_path).open(config, [problem.record() for problem in problems(2)])
    assert capsys.readouterr().err.count("\n") == 1


def test_early_stops_are_refused_in_a_uniform_run(tmp_path: Path) -> None:
    asked = [problem.record() for problem in problems(2)]
    config = CONFIG | {"task": "arith"}
    with SampleStore(tmp_path).open(config, asked):
        (tmp_path / "samples.jsonl").write_text("\n")  # bound to its settings
    (tmp_path / "samples.jsonl").write_text("")
    draw_stopping(tmp_path, AnsweringBackend(), num_problems=2)  # an empty folder binds nothing
    uniform = tmp_path / "uniform"
    with SampleStore(uniform).open(config, asked) as store:
        first = next(SampleStore(tmp_path).records())
        store.append(type(first)(**first.as_dict() | {"config_hash": store.config_hash}))
    with pytest.raises(ValueError, match=r"stop_error is null there and 0\.05 now"):
        draw_stopping(uniform, AnsweringBackend(), num_problems=2, num_samples=4)


def test_hash_of_runs_without_early_stops_has_not_changed() -> None:
    config: dict[str, Any] = {name: f"some {name}" for name in HASHED_FIELDS}
    assert config_hash(config) == "29b6c80e0da39f1b"  # that of earlier versions
    assert config_hash(config | {"stop_error": None}) == config_hash(config)
    hashes = {
        config_hash(config | {"stop_error": error, "stop_every": every})
        for error in (0.0, 0.1)
        for every in (4, 8)
    }
    assert len(hashes | {config_hash(config)}) == 5


def test_end_by_hand() -> None:
    rule = StopRule(0.05, 4)
    assert rule.end([4], 4, 16) == "level"
    assert rule.end([3, 1], 4, 16) is None
    assert rule.end([7, 2], 10, 10) == "cap"  # 56/1024 is above 5 %
    assert rule.end([5, 1], 12, 16) is None
    assert StopRule(0.01, 4).end([6, 1], 12, 16) == "certain"  # 9/256, 4 samples left
    assert rule.end([], 16, 16) == "cap"
    assert StopRule(0.0, 4).end([9], 12, 16) == "certain"
    assert StopRule(0.0, 4).end([8, 4], 12, 16) is None


def test_borders() -> None:
    rule = StopRule(0.05, 4)
    assert rule.border(set(), 10) == 4
    assert rule.border({0, 1, 2, 3}, 10) == 4
    assert rule.border({0, 1, 2, 3, 6}, 10) == 8
    assert rule.border(set(range(9)), 10) == 10
    assert rule.is_at_border({0, 1, 2, 3}, 10)
    assert not rule.is_at_border({0, 1, 2, 3, 6}, 10)
    assert not rule.is_at_border(set(), 10)
    assert rule.is_at_border(set(range(10)), 10)
    assert not rule.is_at_border(set(range(10)), 12), "the cap was raised"


# -- progress -------------------------------------------------------------------------------------


def test_progress_shows_open_problems_and_bounds(tmp_path: Path) -> None:
    stream = io.StringIO()
    draw_stopping(tmp_path, AnsweringBackend(), stream=stream)
    count = len(content(tmp_path))
    assert f"{count}/{count} samples, 0 of 10 problems open, " in stream.getvalue()
    shown = Progress(total=320, done=100, stream=stream)
    shown.bound(200, 6, 10)
    shown.add(50)
    assert shown._line(10.0) == (
        "101/at most 200 samples, 6 of 10 problems open, 5 tokens/s, at most 0:16:30 left at this "
        "speed"
    )
    assert shown.samples == "101 of at most 200 samples"


def test_bound_counts_open_problems_to_the_cap(tmp_path: Path) -> None:
    class Nobody:
        def keep(self, *_: Any) -> None: ...

        def is_open(self, problem_id: str, num_drawn: int) -> bool:
            return problem_id == "t/1"

    have = {"t/0": set(range(4)), "t/1": set(range(4)), "t/2": {0, 1, 3}}
    with Waves(problems(4), SETTINGS, StopRule(0.05, 4), 20, have, Nobody()) as waves:
        assert (waves.num_open, waves.bound) == (3, 4 + 3 * 20)
        drawn = [waves.next() for _ in range(10)]
    found = {(r.problem.problem_id, r.sample_index) for r in drawn if r is not None}
    assert found == {
        ("t/2", 2),
        *(("t/1", j) for j in range(4, 8)),
        *(("t/3", j) for j in range(4)),
    }
