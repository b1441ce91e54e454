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
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

Outcome = Literal["equal", "different", "error", "timeout", "died"]

#: Wall-clock seconds for one comparison; a normal one takes milliseconds.
DEADLINE_S = 5.0
#: Address space of a worker; sympy and its parser need about 0.3 GiB of it.
MEMORY_BYTES = 2 << 30
#: Seconds for the imports of a fresh worker, generous because machines start slowly.
START_S = 120.0
_MAX_WORKERS = 8
_INSTALL = 'pip install "math-verify[antlr4_13_2]"'


class _Worker:
    """One child process and the job it holds."""

    def __init__(self, deadline_s: float, memory_bytes: int) -> None:
        script = Path(__file__).with_name("math_worker.py")
        # The child's own watchdog fires only if this process can no longer kill it.
        command = [sys.executable, "-W", "ignore", str(script)]
        command += [str(2 * deadline_s + 1), str(memory_bytes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin = self.process.stdin
        self.fileno = self.process.stdout.fileno()
        self.is_ready = False
        self.job: int | None = None
        self.expires = time.monotonic() + START_S
        self._buffer = b""

    def send(self, job: int, gold: str, answer: str, deadline_s: float) -> None:
        self.job = job
        self.expires = time.monotonic() + deadline_s
        # If it died while idle, reading its end of file reports that.
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
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
            size: number of workers, default: the CPU count, at most 8.
            deadline_s: wall-clock seconds until a comparison is killed.
            memory_bytes: address space of each worker.

        Raises:
            ModuleNotFoundError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError(f"comparing answers needs math-verify: {_INSTALL}")
        self.size = size or min(os.cpu_count() or 1, _MAX_WORKERS)
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
        with self._lock:
            if os.getpid() != self._owner:
                # A fork copied the pool: the pipes belong to the original process.
                self._workers, self._owner = [], os.getpid()
            return self._compare(pairs)

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(pairs)))
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._workers.remove(worker)  # ended between two calls: no pair is to blame
            worker.kill()
        while len(outcomes) < len(pairs):
            for worker in self._workers:
                if waiting and worker.is_ready and worker.job is None:
                    job = waiting.popleft()
                    worker.send(job, *pairs[job], self.deadline_s)
            starting = sum(not worker.is_ready for worker in self._workers)
            if len(waiting) > starting and len(self._workers) < self.size:
                self._workers.append(_Worker(self.deadline_s, self.memory_bytes))
                continue
            for worker in self._await_change():
                outcome = self._advance(worker)
                if outcome is not None:
                    assert worker.job is not None
                    outcomes[worker.job] = outcome
                    worker.job = None
        return [outcomes[job] for job in range(len(pairs))]

    def _await_change(self) -> list[_Worker]:
        """Return the workers that have output or are past their deadline."""
        active = [w for w in self._workers if w.job is not None or not w.is_ready]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.fileno, selectors.EVENT_READ, worker)
            pause = min(worker.expires for worker in active) - time.monotonic()
            changed = [key.data for key, _ in selector.select(max(pause, 0.0))]
        now = time.monotonic()
        return changed + [w for w in active if w not in changed and w.expires <= now]

    def _advance(self, worker: _Worker) -> Outcome | None:
        """Take a worker's news; return its job's outcome if that is decided."""
        expired = worker.expires <= time.monotonic()
        word = "" if expired else worker.read_word()
        if word is None:
            return None
        if word == "ready":
            worker.is_ready = True
            return None
        if word in ("equal", "different", "error"):
            return word  # type: ignore[return-value]
        self._workers.remove(worker)
        worker.kill()
        if not worker.is_ready:
            reason = word or (f"no answer within {START_S:.0f} s" if expired else "it exited")
            raise RuntimeError(f"the answer-comparing worker did not start: {reason}; {_INSTALL}")
        outcome: Outcome = "timeout" if expired else "died"
        logger.debug("a comparison was ended: %s", outcome)
        return outcome
