import io
import json
import sys
import types

import pytest

from thinkfast_distill.config import LoggingConfig
from thinkfast_distill.recipe import RecipeError
from thinkfast_distill.run_log import (
    LOG_FILE,
    ProgressLine,
    RunLog,
    duration,
    numbers,
    open_tracker,
    read_log,
    truncate_log,
)


def record(event, stage, step, **more):
    return {"event": event, "stage_index": stage, "stage_step": step, "step": step, **more}


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def test_truncate_log_drops_what_came_after_and_the_torn_line(tmp_path):
    path = tmp_path / LOG_FILE
    kept = [
        {"event": "session", "step": 0},
        record("eval", 0, 0),
        record("train", 0, 1),
        record("train", 0, 2),
        record("eval", 0, 2),
    ]
    later = [record("train", 0, 3), record("eval", 1, 0)]
    write(path, kept + later, tail='{"event": "train", "st')
    truncate_log(path, 0, 2)
    assert read_log(path) == kept
    assert path.read_text().endswith("\n")


def test_truncate_log_at_the_start_of_a_run_keeps_sessions_only(tmp_path):
    path = tmp_path / LOG_FILE
    session = {"event": "session", "step": 0}
    write(path, [session, record("eval", 0, 0), record("train", 0, 1)])
    truncate_log(path, -1, 0)
    assert read_log(path) == [session]
    truncate_log(tmp_path / "absent.jsonl", 0, 0)  # nothing to do


def test_read_log_names_a_damaged_line(tmp_path):
    path = tmp_path / LOG_FILE
    path.write_text('{"event": "session"}\n{oops}\n{"event": "session"}\n')
    with pytest.raises(RecipeError, match=r"log.jsonl:2: not JSON"):
        read_log(path)


def test_run_log_writes_whole_lines_and_feeds_the_tracker(tmp_path):
    class Tracker:
        def __init__(self):
            self.seen, self.is_finished = [], False

        def log(self, values, step):
            self.seen.append((step, values))

        def finish(self):
            self.is_finished = True

    tracker = Tracker()
    log = RunLog(tmp_path, is_main=True, tracker=tracker, stream=None)
    log.write(record("session", 0, 0))
    log.write(record("train", 0, 1, loss=0.5, part={"ssm": 2.0}, bad=float("nan"), name="x"))
    lines = (tmp_path / LOG_FILE).read_text().splitlines()  # flushed, not only at close
    assert json.loads(lines[1])["bad"] == "nan"
    assert tracker.seen == [
        (
            1,
            {
                "train/stage_index": 0.0,
                "train/stage_step": 1.0,
                "train/step": 1.0,
                "train/loss": 0.5,
                "train/part/ssm": 2.0,
            },
        )
    ]
    log.close()
    assert tracker.is_finished


def test_run_log_other_ranks_write_nothing(tmp_path):
    stream = io.StringIO()
    log = RunLog(tmp_path, is_main=False, tracker=None, stream=stream)
    log.write(record("train", 0, 1))
    log.progress("x")
    log.message("y")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert stream.getvalue() == ""


def test_numbers_skips_booleans():
    assert numbers({"event": "eval", "flag": True, "kl": 1}) == {"eval/kl": 1.0}


def test_progress_line_plain_is_throttled():
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.show("one")
    line.show("two")
    line.show("end", is_last=True)
    line.message("stays")
    assert stream.getvalue() == "one\nend\nstays\n"


def test_progress_line_on_a_terminal_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "6")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    line = ProgressLine(stream)
    line.show("one")
    line.show("too long")  # would wrap
    line.message("stays")
    line.end()
    assert stream.getvalue() == "\r\x1b[2Kone\r\x1b[2Ktoo l\nstays\n"


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_open_tracker_without_its_package_gives_the_install_line(name, tmp_path, monkeypatch):
    for module in ("trackio", "wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    with pytest.raises(RecipeError, match=rf"pip install 'thinkfast-distill\[{name}\]'"):
        open_tracker(LoggingConfig(tracker=name), tmp_path, "n", {})
    assert open_tracker(LoggingConfig(), tmp_path, "n", {}) is None


class _Dashboard(types.ModuleType):
    """Takes the place of trackio or wandb and keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.started, self.logged, self.is_finished = [], [], False

    def init(self, **options):
        self.started.append(options)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_open_tracker_sends_the_numbers(name, tmp_path, monkeypatch):
    dashboard = _Dashboard(name)
    monkeypatch.setitem(sys.modules, name, dashboard)
    for run in (tmp_path / "a" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"):
        run.mkdir(parents=True, exist_ok=True)
        settings = LoggingConfig(tracker=name, project="p")
        tracker = open_tracker(settings, run, "n", {"seed": 1})
        log = RunLog(run, is_main=True, tracker=tracker, stream=None)
        log.write(record("train", 0, 3, reverse_kl=0.5, alignment_by_layer={"0": 2.0}))
        log.close()
    first, resumed, other = dashboard.started
    assert (first["project"], first["config"], first["resume"]) == ("p", {"seed": 1}, "allow")
    assert first == resumed
    if name == "wandb":
        assert first["id"] != other["id"], "two folders of one name are two runs"
    step, values = dashboard.logged[0]
    assert step == 3
    assert values["train/reverse_kl"] == 0.5
    assert values["train/alignment_by_layer/0"] == 2.0
    assert dashboard.is_finished


def test_open_tracker_tensorboard(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(("open", folder))

        def add_scalar(self, key, value, step):
            seen.append((key, value, step))

        def close(self):
            seen.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tracker = open_tracker(LoggingConfig(tracker="tensorboard"), tmp_path, "n", {})
    tracker.log({"train/loss": 0.5}, 7)
    tracker.finish()
    assert seen == [("open", str(tmp_path / "tensorboard")), ("train/loss", 0.5, 7), "closed"]


def test_open_tracker_that_does_not_start(tmp_path, monkeypatch):
    dashboard = _Dashboard("wandb")

    def init(**options):
        raise RuntimeError("not logged in")

    dashboard.init = init
    monkeypatch.setitem(sys.modules, "wandb", dashboard)
    with pytest.raises(RecipeError, match=r"'wandb' does not start: not logged in; .*tracker=none"):
        open_tracker(LoggingConfig(tracker="wandb"), tmp_path, "n", {})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (18420, "5h07m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
