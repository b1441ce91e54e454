"""One writer at a time: a lock file whose lock ends with the process, however it ends.

Record locks (POSIX): unlike those of flock they are not inherited by the engine processes that vLLM
forks, which can outlive a killed parent for some seconds. Two openings inside one process do not
exclude each other.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lm_eval_tasks.errors import stop


def acquire(path: Path, guarded: Path, advice: str = "wait for it") -> IO[str]:
    """Lock a file, which is made with its folder where it is missing.

    Args:
        path: the lock file; it holds the number of the process that has the lock.
        guarded: the file or folder that has one writer, for the message.
        advice: what a second process can do.

    Returns:
        The open file; closing it releases the lock.

    Raises:
        InputError: another process has the lock, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        stop(f"{path.parent}: cannot be written ({error.strerror}); free space or rights there")
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened.truncate(0)
        opened.write(f"{os.getpid()}\n")
        opened.flush()
    except OSError as error:
        opened.seek(0)
        holder = opened.read().strip()
        opened.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            stop(f"{guarded}: process {holder or '?'} is writing there; {advice}")
        stop(f"{path}: cannot be locked ({error.strerror})")
    return opened


@contextmanager
def exclusive(path: Path, guarded: Path) -> Iterator[None]:
    """Hold the lock inside a ``with`` statement; see `acquire`."""
    with acquire(path, guarded):
        yield
