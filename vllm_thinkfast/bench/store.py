"""Finished measurements, one JSON line each, so that a killed run continues where it stopped."""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any


class Results:
    """The file ``measurements.jsonl`` of a run folder; locked against a second run while open.

    Each line has a ``key``, everything that decides the measurement in short; lines with other keys
    belong to other settings and stay.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        """Opens or makes the file.

        Args:
            folder: of the run.
            fresh: forget what was measured before.

        Raises:
            ValueError: another run has the file open, or it holds something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "measurements.jsonl"
        self._file: IO[str] = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(
                f"{folder}: another bench is running there; wait for it, or give another --out"
            ) from error
        if fresh:
            self._file.truncate(0)
        try:
            self.rows = self._read()
        except ValueError:
            self._file.close()
            raise

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        text = self._file.read()
        complete, newline, torn = text.rpartition("\n")
        if torn:  # the run was killed while it wrote
            self._file.truncate(len((complete + newline).encode()))
        rows = {}
        for number, line in enumerate(complete.split("\n") if complete else [], 1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: not readable ({error}); delete the line, or "
                    "start over with --fresh"
                ) from error
        return rows

    def get(self, key: str) -> dict[str, Any] | None:
        """What was measured under ``key``; None if nothing was."""
        return self.rows.get(key)

    def add(self, key: str, value: dict[str, Any]) -> None:
        """Stores a measurement at once and for good."""
        self.rows[key] = value
        self._file.write(json.dumps({"key": key, "value": value}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets others in."""
        self._file.close()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is either complete or absent, whenever the process is killed.

    Args:
        path: of the file; its folder is made.
        text: content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(unfinished, path)


def fingerprint(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
