"""The one error for a user's mistake: a clear line on stderr and exit code 2, no traceback.

The tasks run inside the ``lm_eval`` command, whose top level catches nothing: an ordinary exception
ends in a traceback and exit code 1. `InputError` is a `ValueError`, so Python callers can catch it,
and a `SystemExit`, so an uncaught one ends the process with exit code 2.
"""

import sys
from typing import NoReturn


class InputError(ValueError, SystemExit):
    """A value the user gave is wrong; the text names it, what is accepted, and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2


def why_not_loaded(error: Exception) -> str:
    """Return in one line why a model or tokenizer could not be loaded.

    Damaged files end in errors of any kind deep in the libraries that read them (a Git LFS pointer
    in place of weights in a MemoryError), whose text alone says nothing.
    """
    line = str(error).strip().split("\n")[0]
    if line and isinstance(error, OSError | ValueError | TypeError | ImportError | RuntimeError):
        return line
    name = type(error).__name__
    return (
        f"{name}: {line}" if line else name
    ) + "; is one of its files damaged, or a Git LFS pointer (git lfs pull)?"


def stop(message: str) -> NoReturn:
    """Print ``message`` as one line on stderr and raise it as an `InputError`."""
    sys.stderr.write(f"error: {message}\n")
    raise InputError(message)
