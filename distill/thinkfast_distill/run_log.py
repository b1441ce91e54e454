"""Where a run's numbers go: ``log.jsonl``, one progress line, and optionally a dashboard.

``log.jsonl`` has one object per line with ``event`` ("train", "eval", "skip", "data", "session"),
the stage, its step and the run's step. A resumed run removes what came after the restored
checkpoint, and a last line that a kill tore, so that the file reads like that of an uninterrupted
run.
"""

import hashlib
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from thinkfast_distill.config import LoggingConfig
from thinkfast_distill.recipe import RecipeError

LOG_FILE = "log.jsonl"
_PLAIN_INTERVAL_S = 10.0


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a torn last line is left out.

    Raises:
        RecipeError: a line before the last is not JSON; the file was edited or damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the writer was killed
                break
            raise RecipeError(
                f"{path}:{number}: not JSON ({error.msg}); the log was damaged, move it away."
            ) from error
    return records


def truncate_log(path: Path, stage: int, stage_step: int) -> None:
    """Removes a torn last line and everything after a point of the run.

    Args:
        path: the log.
        stage: index of the last stage that counts; -1 removes everything but "session" lines.
        stage_step: last finished step of that stage that counts.
    """
    if not path.is_file():
        return
    kept = [
        record
        for record in read_log(path)
        if record["event"] == "session"
        or (record["stage_index"], record["stage_step"]) <= (stage, stage_step)
    ]
    replacement = path.with_name(f".{path.name}")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(replacement, path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks become text; floats keep 7 digits more than float32 has."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class Tracker(Protocol):
    """A dashboard."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the numbers of one step."""

    def finish(self) -> None:
        """Flushes and closes."""


class RunLog:
    """Writes the log of one session; on ranks other than the main one nothing happens."""

    def __init__(
        self, run: Path, *, is_main: bool, tracker: Tracker | None = None, stream: TextIO | None
    ) -> None:
        """Opens the log for appending.

        Args:
            run: the run folder.
            is_main: whether this process writes.
            tracker: dashboard, or None.
            stream: where the progress line goes; None: nowhere.
        """
        self._file = (run / LOG_FILE).open("a", encoding="utf-8") if is_main else None
        self._tracker = tracker
        self._progress = ProgressLine(stream) if is_main and stream is not None else None

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record and sends its numbers to the dashboard."""
        if self._file is None:
            return
        self._file.write(_line(record))
        self._file.flush()
        if self._tracker is not None and record["event"] in ("train", "eval"):
            self._tracker.log(numbers(record), record["step"])

    def progress(self, text: str, *, is_last: bool = False) -> None:
        """Shows the state of the run in one line."""
        if self._progress is not None:
            self._progress.show(text, is_last=is_last)

    def message(self, text: str) -> None:
        """Shows a line that stays."""
        if self._progress is not None:
            self._progress.message(text)

    def close(self) -> None:
        """Closes file and dashboard."""
        if self._progress is not None:
            self._progress.end()
        if self._file is not None:
            self._file.close()
        if self._tracker is not None:
            self._tracker.finish()


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record under ``event/key``; nested mappings as ``event/key/sub``."""
    found: dict[str, float] = {}
    for key, value in record.items():
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        for sub, item in items:
            is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
            if is_number and math.isfinite(item):
                found["/".join(part for part in (record["event"], key, sub) if part)] = float(item)
    return found


class ProgressLine:
    """One line that is rewritten on a terminal, and printed now and then elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        """Args: stream: standard error of the command."""
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last_s = -math.inf
        self._is_open = False

    def show(self, text: str, *, is_last: bool = False) -> None:
        """Shows the newest state.

        Args:
            text: one line.
            is_last: print it even if the previous one was a moment ago.
        """
        if self._is_terminal:
            # A line that wraps could not be rewritten.
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[2K{text[:width]}")
            self._is_open = True
        elif is_last or time.monotonic() - self._last_s >= _PLAIN_INTERVAL_S:
            self._stream.write(text + "\n")
            self._last_s = time.monotonic()
        self._stream.flush()

    def message(self, text: str) -> None:
        """Prints a line that stays, above the live one."""
        self.end()
        self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Ends the live line."""
        if self._is_open:
            self._stream.write("\n")
            self._stream.flush()
            self._is_open = False


def duration(seconds: float) -> str:
    """A time for people: ``42s``, ``3m12s``, ``5h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def open_tracker(
    logging: LoggingConfig, run: Path, name: str, config: dict[str, Any]
) -> Tracker | None:
    """Starts the dashboard that the recipe asks for.

    Args:
        logging: the recipe's section.
        run: the run folder.
        name: the run's name.
        config: the resolved recipe.

    Raises:
        RecipeError: its package is not installed; the message has the install line.
    """
    if logging.tracker == "none":
        return None
    starters = {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}
    try:
        return starters[logging.tracker](logging.project, run, name, config)
    except ImportError as error:
        raise RecipeError(
            f"logging.tracker: {logging.tracker!r} is not installed ({error}); install it with: "
            f"pip install 'thinkfast-distill[{logging.tracker}]'"
        ) from error
    except Exception as error:  # of the dashboard's own kinds: not logged in, no server
        raise RecipeError(
            f"logging.tracker: {logging.tracker!r} does not start: {error}; mend this, or set "
            "logging.tracker=none."
        ) from error


class _ModuleTracker:
    """trackio and wandb have the same functions."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the numbers of one step."""
        self._module.log(values, step=step)

    def finish(self) -> None:
        """Flushes and closes."""
        self._module.finish()


def _trackio(project: str, run: Path, name: str, config: dict[str, Any]) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(project=project, name=f"{name}-{run.name}", config=config, resume="allow")
    return _ModuleTracker(trackio)


def _wandb(project: str, run: Path, name: str, config: dict[str, Any]) -> Tracker:
    wandb = importlib.import_module("wandb")
    # Two folders may have one name; a resumed run is found again by the place of its folder.
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    wandb.init(project=project, name=name, config=config, dir=str(run), id=identity, resume="allow")
    return _ModuleTracker(wandb)


class _TensorboardTracker:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the numbers of one step."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        """Flushes and closes."""
        self._writer.close()


def _tensorboard(project: str, run: Path, name: str, config: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    return _TensorboardTracker(SummaryWriter(str(run / "tensorboard")))


def standard_error() -> TextIO:
    """The stream for progress, looked up when it is needed so that tests can replace it."""
    return sys.stderr
