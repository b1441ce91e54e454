"""Results of finished phases, so that a killed run continues where it stopped.

One JSON file per phase, named by the phase and by a hash of everything that decides its result.
"""

import fcntl
import json
import tempfile
from pathlib import Path
from typing import IO, Any

from demo.errors import InputError
from vllm_thinkfast.bench.store import fingerprint, write_atomically


class PhaseStore:
    """Finished phases in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, phase: str, key: Any) -> Path:
        """The file of a phase; ``key`` is everything that decides its result."""
        return self.folder / f"{phase}-{fingerprint(key)}.json"

    def load(self, phase: str, key: Any) -> Any | None:
        """The stored result; None if the phase has not finished with this key."""
        try:
            return json.loads(self.path(phase, key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path(phase, key)}: not readable ({error}); delete the file, or run with "
                "--fresh"
            ) from error

    def save(self, phase: str, key: Any, result: Any) -> None:
        """Stores a result; older results of the phase stay, they belong to other settings."""
        write_atomically(self.path(phase, key), json.dumps(result, indent=1) + "\n")

    def clear(self) -> None:
        """Forgets all finished phases."""
        for file in self.folder.glob("*.json"):
            file.unlink()


def make_folder(folder: Path) -> None:
    """Makes the folder of ``--out``, and tries to write there before anything is measured.

    Raises:
        InputError: a file is in the way, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "a file is in the way" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(
            f"--out {folder}: cannot write there ({why}); give another folder"
        ) from error


def lock_folder(folder: Path) -> IO[str]:
    """Keeps a second run out of the folder; the lock ends with the process, however it ends.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    make_folder(folder)
    opened = (folder / ".lock").open("w")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        opened.close()
        raise InputError(
            f"another demo is running in {folder}; wait for it, or give another folder with --out"
        ) from error
    return opened
