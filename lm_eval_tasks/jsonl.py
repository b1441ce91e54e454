"""Append-only JSON lines files that survive ``kill -9``, a power cut and a full disk.

One line is one `os.write` of one complete object. What can go wrong is then only at the end of the
file: a last line without its newline. Opening for writing mends that and nothing else; every other
line that is not as it should be is refused with file and line number, because dropping it would
change results without a word.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from lm_eval_tasks.errors import stop

Row = TypeVar("Row")

_SYNC_INTERVAL_S = 1.0
#: What reading JSON raises: JSONDecodeError and UnicodeDecodeError are ValueErrors; thousands of
#: nested brackets are a RecursionError.
_NOT_JSON = (ValueError, RecursionError)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file that is complete or absent, whenever the process is killed.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(unfinished, path)
        sync_path(path.parent)
    except OSError as error:
        stop(f"{path}: cannot be written ({error.strerror}); free space or rights, then run again")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of a JSONL file that nobody has open, as `write_atomically` does."""
    write_atomically(path, "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows))


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        InputError: it is missing, unreadable or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        stop(f"{path}: cannot be read ({error.strerror}); is {path.parent} a run folder?")
    except _NOT_JSON as error:
        stop(f"{path}: not JSON ({error}); restore the file, it is written by thinkfast-eval")
    if not isinstance(found, dict):
        stop(f"{path}: need a JSON object, got {type(found).__name__}")
    return found


class JsonLines:
    """One file of JSON objects, one per line. Reading needs no opening; writing does.

    Use it in a ``with`` statement to write. Only one process may write at a time; the caller holds
    the lock (`lm_eval_tasks.samples.SampleStore` has one per run folder).
    """

    def __init__(self, path: Path, sync_interval_s: float = _SYNC_INTERVAL_S) -> None:
        """See the class.

        Args:
            path: the file; it need not exist.
            sync_interval_s: lines are handed to the operating system at once, so that killing the
                process loses none, and forced onto the disk at most this many seconds later.
        """
        self.path = path
        self.sync_interval_s = sync_interval_s
        self._descriptor: int | None = None
        self._size = 0
        self._synced_at = 0.0

    def read(self, parse: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
        """Yield the parsed lines, without a torn last line (another process may be writing it).

        Args:
            parse: makes a row from an object, or raises ValueError saying what is wrong with it.

        Raises:
            InputError: a line is no JSON object or ``parse`` refuses it; names file and line.
        """
        return (row for _, row in self.read_placed(parse))

    def read_placed(self, parse: Callable[[dict[str, Any]], Row]) -> Iterator[tuple[int, Row]]:
        """Yield what `read` does, each row with its place for `read_at` (bytes before its line)."""
        place = 0
        try:
            opened = self.path.open("rb")
        except FileNotFoundError:
            return
        except OSError as error:
            stop(f"{self.path}: cannot be read ({error.strerror})")
        with opened:
            for number, line in enumerate(opened, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    parsed = _parsed(line, parse)
                except _NOT_JSON as error:
                    stop(
                        f"{self.path}, line {number}: {error}; mend or delete this line (only a "
                        "torn last line is repaired by itself)"
                    )
                yield place, parsed
                place += len(line)

    def read_at(
        self, places: Iterable[int], parse: Callable[[dict[str, Any]], Row]
    ) -> Iterator[Row]:
        """Yield the parsed lines at places that `read_placed` gave; lines never move.

        Raises:
            InputError: the file cannot be read, or is another one by now.
        """
        try:
            with self.path.open("rb") as opened:
                for place in places:
                    opened.seek(place)
                    yield _parsed(opened.readline(), parse)
        except OSError as error:
            stop(f"{self.path}: cannot be read ({error.strerror})")
        except _NOT_JSON as error:
            stop(f"{self.path} was changed while it was read ({error}); run the command again")

    # -- writing ----------------------------------------------------------------------------------

    def open(self) -> int:
        """Repair the file and open it for appending; return the bytes that the repair dropped.

        Raises:
            InputError: the file cannot be written, or does not end like one of ours.
        """
        dropped = self.repair()
        try:
            self._descriptor = os.open(
                self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
            self._size = os.fstat(self._descriptor).st_size
            sync_path(self.path.parent)
        except OSError as error:
            stop(f"{self.path}: cannot be opened for writing ({error.strerror})")
        return dropped

    def repair(self) -> int:
        """Mend a torn last line; return the number of bytes dropped.

        A last line that lacks nothing but its newline is completed and counts as kept.

        Raises:
            InputError: the end of the file is not the beginning of an object, so it was not torn.
        """
        try:
            with self.path.open("r+b") as opened:
                end = opened.seek(0, os.SEEK_END)
                tail = _last_segment(opened, end)
                if not tail:
                    return 0
                if tail[:1] not in (b"{", b"\0"):  # some file systems leave zeros after a power cut
                    stop(
                        f"{self.path}: the last line is not JSON and no torn object either "
                        f"({tail[:40]!r}); restore or move the file"
                    )
                if _is_object(tail):
                    opened.write(b"\n")
                    return 0
                opened.truncate(end - len(tail))
                return len(tail)
        except FileNotFoundError:
            return 0
        except RecursionError as error:  # no line of ours is nested that deeply
            stop(
                f"{self.path}: the last line is not JSON and no torn object either ({error}); "
                "restore or move the file"
            )
        except OSError as error:
            stop(f"{self.path}: cannot be repaired ({error.strerror}); free space or rights")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line. It survives the process; within ``sync_interval_s`` also the machine.

        Raises:
            InputError: the disk is full, or another write error; the file keeps its complete lines.
        """
        assert self._descriptor is not None, "open() first"
        # ASCII: a server may send half a surrogate pair, which UTF-8 cannot hold.
        line = json.dumps(row, allow_nan=False).encode("ascii") + b"\n"
        try:
            written = 0
            while written < len(line):  # a full disk first shows as a short write
                written += os.write(self._descriptor, line[written:])
            self._size += len(line)
            if time.monotonic() - self._synced_at >= self.sync_interval_s:
                self.sync()
        except OSError as error:
            self._cut_back()
            stop(
                f"{self.path}: cannot be written ({error.strerror}); all lines before this one are "
                "kept: free some space, then run the same command again"
            )

    def sync(self) -> None:
        """Force everything written so far onto the disk."""
        if self._descriptor is not None:
            os.fdatasync(self._descriptor)
            self._synced_at = time.monotonic()

    def _cut_back(self) -> None:
        """Take back a half-written line; where that fails too, the next `repair` does it."""
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            return

    def close(self) -> None:
        """Sync and close; closing twice is fine.

        Raises:
            InputError: the last lines did not reach the disk.
        """
        if self._descriptor is None:
            return
        try:
            self.sync()
        except OSError as error:
            stop(f"{self.path}: the last lines may not be on the disk ({error.strerror})")
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "JsonLines":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _parsed(line: bytes, parse: Callable[[dict[str, Any]], Row]) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"need a JSON object, got {type(row).__name__}")
    return parse(row)


def _last_segment(opened: Any, end: int) -> bytes:
    """Return what follows the last newline of a binary file."""
    tail = b""
    position = end
    while position > 0 and b"\n" not in tail:
        size = min(1 << 16, position)
        position -= size
        opened.seek(position)
        tail = opened.read(size) + tail
    opened.seek(end)
    return tail.rpartition(b"\n")[2]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def sync_path(path: Path) -> None:
    """Force a file's content, or the names in a folder, onto the disk, whoever wrote them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
