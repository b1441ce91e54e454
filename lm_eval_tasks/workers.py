"""Compare answers with math-verify in worker processes that are killed at a deadline.

Why processes: math-verify stops itself with SIGALRM, which works only in the main thread and not
inside C code, and sympy can be made to compute for hours or to fill the memory (``100000000!``,
``9^{9^{9^{9}}}``). Why subprocesses of our own and not `multiprocessing`: its workers import the
caller's main module again (spawn) or copy a process that may hold CUDA and threads (fork).
"""

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

logger = logging.getLogger(__name__)

Outcome = Literal["equal", "different", "error", "timeout", "died"]
_OUTCOMES: dict[str, Outcome] = {word: word for word in get_args(Outcome)}

#: Seconds of processor time for one comparison; a normal one takes milliseconds. Processor time, so
#: that a verdict does not depend on what else the machine does.
DEADLINE_S = 5.0
#: Wall-clock limit in deadlines, for a comparison that waits instead of computing.
_WALL_FACTOR = 12
#: Address space of a worker; sympy and its parser need about 0.3 GiB of it.
MEMORY_BYTES = 2 << 30
#: Seconds for the imports of a fresh worker, generous because machines start slowly.
START_S = 120.0
_MAX_WORKERS = 8
_INSTALL = 'pip install "math-verify[antlr4_13_2]"'


def num_usable_cores() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """One child process and the job it holds."""

    def __init__(self, deadline_s: float, memory_bytes: int) -> None:
        script = Path(__file__).with_name("math_worker.py")
        # The child's wall-clock watchdog fires only if this process can no longer kill it.
        command = [sys.executable, "-W", "ignore", str(script), str(deadline_s)]
        command += [str(2 * _WALL_FACTOR * deadline_s + 1), str(memory_bytes)]
        # Ctrl-C in a terminal goes to the whole process group: a worker that it ended would look as
        # if its comparison had killed it. A dead parent is noticed by the end of stdin.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin = self.process.stdin
        self.fileno = self.process.stdout.fileno()
        self.is_ready = False
        self.job: int | None = None
        self.expires = time.monotonic() + START_S
        self._buffer = b""

    def send(self, job: int, texts: tuple[str, ...], deadline_s: float) -> None:
        self.job = job
        self.expires = time.monotonic() + _WALL_FACTOR * deadline_s
        # If it died while idle, reading its end of file reports that.
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(json.dumps(texts).encode() + b"\n")
            self.stdin.flush()

    def read_word(self) -> str | None:
        """Return a complete line if there is one, None if not yet, "" at end of file."""
        data = os.read(self.fileno, 4096)
        if not data:
            return ""
        self._buffer += data
        if b"\n" not in self._buffer:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # unsent bytes of a job that is over
                stream.close()


class WorkerPool:
    """Workers started on demand, at most ``size`` of them; safe to call from any thread."""

    def __init__(
        self,
        size: int | None = None,
        deadline_s: float = DEADLINE_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Prepare the pool; no process is started yet.

        Args:
            size: number of workers, default: the usable processors, at most 8.
            deadline_s: seconds of processor time until a comparison is killed.
            memory_bytes: address space of each worker.

        Raises:
            ModuleNotFoundError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError(f"comparing answers needs math-verify: {_INSTALL}")
        self.size = size or min(num_usable_cores(), _MAX_WORKERS)
        self.deadline_s = deadline_s
        self.memory_bytes = memory_bytes
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        atexit.register(self.close)

    def close(self) -> None:
        """Kill the workers; the pool may be used again afterwards."""
        if os.getpid() == self._owner:
            for worker in self._workers:
                worker.kill()
        self._workers = []

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Compare every (gold, answer) pair and return the outcomes in the same order.

        Raises:
            RuntimeError: a worker could not start (the message says why).
        """
        return [_OUTCOMES[word] for word in self._run(pairs)]

    def signatures(self, answers: Sequence[str]) -> list[str | None]:
        """Return what kind of value each answer has; see `lm_eval_tasks.math_worker.signature`.

        Returns:
            A signature, or None for an answer that could not be read within time and memory.

        Raises:
            RuntimeError: a worker could not start (the message says why).
        """
        words = self._run([(answer,) for answer in answers])
        return [None if word in _OUTCOMES else word for word in words]

    def _run(self, jobs: Sequence[tuple[str, ...]]) -> list[str]:
        """Return each job's word: the worker's own, or "timeout" or "died"."""
        with self._lock:
            if os.getpid() != self._owner:
                # A fork copied the pool: the pipes belong to the original process.
                self._workers, self._owner = [], os.getpid()
            try:
                return self._run_locked(jobs)
            except BaseException:
                # Workers go on with their jobs; the next call would take the words for its own.
                self.close()
                raise

    def _run_locked(self, jobs: Sequence[tuple[str, ...]]) -> list[str]:
        words: dict[int, str] = {}
        waiting = deque(range(len(jobs)))
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._workers.remove(worker)  # ended between two calls: no job is to blame
            worker.kill()
        while len(words) < len(jobs):
            for worker in self._workers:
                if waiting and worker.is_ready and worker.job is None:
                    job = waiting.popleft()
                    worker.send(job, jobs[job], self.deadline_s)
            starting = sum(not worker.is_ready for worker in self._workers)
            if len(waiting) > starting and len(self._workers) < self.size:
                self._workers.append(_Worker(self.deadline_s, self.memory_bytes))
                continue
            for worker, expired in self._await_change():
                word = self._advance(worker, expired)
                if word is not None:
                    assert worker.job is not None
                    words[worker.job] = word
                    worker.job = None
        return [words[job] for job in range(len(jobs))]

    def _await_change(self) -> list[tuple[_Worker, bool]]:
        """Return the workers that have output, and those past their deadline without any (True).

        This process may have been stopped for longer than any deadline: what came meanwhile counts,
        so deadlines are compared with the time before the look at the pipes.
        """
        active = [w for w in self._workers if w.job is not None or not w.is_ready]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.fileno, selectors.EVENT_READ, worker)
            now = time.monotonic()
            pause = min(worker.expires for worker in active) - now
            changed = [key.data for key, _ in selector.select(max(pause, 0.0))]
        late = [w for w in active if w not in changed and w.expires <= now]
        return [(worker, False) for worker in changed] + [(worker, True) for worker in late]

    def _advance(self, worker: _Worker, expired: bool) -> str | None:
        """Take a worker's news; return its job's word if that is decided."""
        word = "" if expired else worker.read_word()
        if word is None:
            return None
        if word == "ready":
            worker.is_ready = True
            return None
        if worker.is_ready and word:
            return word
        self._workers.remove(worker)
        if not expired and not word:  # end of file: it is ending by itself, and how matters
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(1.0)
        worker.kill()
        if not worker.is_ready:
            reason = word or (f"no answer within {START_S:.0f} s" if expired else "it exited")
            raise RuntimeError(f"the answer-comparing worker did not start: {reason}; {_INSTALL}")
        is_late = expired or worker.process.returncode == -signal.SIGPROF
        logger.debug("a comparison was ended after %s", "its deadline" if is_late else "a crash")
        return "timeout" if is_late else "died"
