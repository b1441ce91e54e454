"""Run sampled programs against the tests of their problem, several at a time.

Each program gets a fresh pair of processes (`lm_eval_tasks.programs.judge`), so no state goes from
one to the next. This side gives them a clean environment and an empty folder to be in.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lm_eval_tasks.errors import stop
from lm_eval_tasks.programs.confine import Limits, NotConfinedError
from lm_eval_tasks.workers import num_usable_cores

logger = logging.getLogger(__name__)

LIMITS = Limits()
_MAX_WORKERS = 8
# The package's own __init__ would import more than the child needs: a quarter of its start.
_BOOT = (
    "import sys; package = type(sys)('lm_eval_tasks'); package.__path__ = [sys.argv.pop(1)]; "
    "sys.modules['lm_eval_tasks'] = package; del sys.path[0]; "
    "from lm_eval_tasks.programs.judge import main; main()"
)
# Isolated as with -I, but for the hash seed, which that option would ignore: a program that
# depends on the order of a set must get the same verdict each time. -S: no installed packages.
_COMMAND = (sys.executable, "-S", "-s", "-W", "ignore", "-c", _BOOT)
_PACKAGE = str(Path(__file__).resolve().parents[1])
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "TZ": "UTC",
}


@dataclass(frozen=True)
class Job:
    """A program and its tests; see `lm_eval_tasks.programs.judge`."""

    program: tuple[str, ...]
    """Texts that are loaded one after the other into one module."""
    prompt: str
    """The problem's code, whose helper functions the tests may use."""
    setup: str
    """Code before the tests, which may use the program's names."""
    tests: str
    """Code with assertions."""
    entry_point: str | None
    """Function that the tests' ``check`` is called with; None: the tests name it."""


class Outcome(NamedTuple):
    """What a program did."""

    outcome: Literal["passed", "failed", "timeout", "died"]
    detail: str = ""
    """What failed, for people."""
    behaviour: str | None = None
    """Digest of what it answered to the tests' calls; None if it never gave a value."""


class FaultyTestsError(ValueError):
    """The tests want something of a program that the sandbox cannot do."""


def run_programs(
    jobs: Sequence[Job], limits: Limits = LIMITS, workers: int | None = None
) -> list[Outcome]:
    """Return what each program did, in the same order.

    Args:
        jobs: programs with their tests.
        limits: of each program.
        workers: at a time; default: the usable processors, at most 8.

    Raises:
        InputError: this system has no way to keep a program in.
        FaultyTestsError: the tests, not the program, are at fault.
    """
    size = min(workers or min(num_usable_cores(), _MAX_WORKERS), len(jobs))
    waiting = deque(enumerate(jobs))
    outcomes: dict[int, Outcome] = {}
    judges: list[_Judge] = []

    def work(folder: str) -> None:
        # Started and used in this thread: a child dies with the thread that started it.
        judge = _Judge(limits, folder)
        judges.append(judge)
        try:
            while True:
                try:
                    index, job = waiting.popleft()
                except IndexError:  # none is left
                    return
                outcomes[index] = judge.outcome(job)
        finally:
            judge.close()

    if not jobs:
        return []
    with (
        tempfile.TemporaryDirectory(prefix="thinkfast-programs-") as folder,
        ThreadPoolExecutor(size) as pool,
    ):
        futures = [pool.submit(work, folder) for _ in range(size)]
        try:
            for future in futures:
                future.result()
        except NotConfinedError as error:
            stop(
                f"sampled programs cannot be kept from network and files here ({error}), so none "
                "is run; score this run on Linux (x86_64 or aarch64) with seccomp filters allowed"
            )
        finally:
            waiting.clear()
            for judge in judges:  # in the middle of something only after an error or Ctrl-C
                judge.process.kill()
    return [outcomes[index] for index in range(len(jobs))]


class _Judge:
    """A child process that judges one program after the other."""

    def __init__(self, limits: Limits, folder: str) -> None:
        self._limits, self._folder = limits, folder
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*_COMMAND, _PACKAGE, str(os.getpid()), json.dumps(self._limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )

    def outcome(self, job: Job) -> Outcome:
        """Return what a program did.

        Raises:
            NotConfinedError: it could not be kept in and was not run.
            FaultyTestsError: the tests are at fault.
            RuntimeError: the child is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        data = json.dumps(asdict(job)).encode()
        try:
            self.process.stdin.write(b"." + len(data).to_bytes(4, "big") + data)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer says it
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the sandbox ended with code {self.process.wait()}")
        found = json.loads(answer)
        if "not_confined" in found:
            raise NotConfinedError(found["not_confined"])
        if "fault" in found:
            raise FaultyTestsError(f"the tests give the program {found['fault']}")
        if found.pop("is_last", False):
            self.close()
            self.process = self._start()
        logger.debug("a program %s: %s", found["outcome"], found["detail"])
        return Outcome(**found)

    def close(self) -> None:
        """End the child and all that it started."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # unsent bytes
                stream.close()
