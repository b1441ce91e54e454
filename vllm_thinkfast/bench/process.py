"""The parent's side of a worker: one engine, or the roofline measurement, in its own process.

A process per engine keeps peak memory honest and the engines apart; an idle one waits for input and
takes no time from the others. The protocol is a JSON line per command and a JSON line per answer.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_END_S = 20


class WorkerError(Exception):
    """A worker failed; the message names its log."""


class Worker:
    """One process of `vllm_thinkfast.bench.worker`."""

    def __init__(self, name: str, threads: int, log: Path) -> None:
        """Starts the process; it imports nothing heavy before the first command.

        Args:
            name: for messages.
            threads: OpenMP threads.
            log: file to which everything it prints is appended.
        """
        self.name = name
        self.log = log
        environment = {
            "OMP_NUM_THREADS": str(threads),
            # Threads of several engines that vLLM pins would all sit on the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # The engine in the worker itself: its steps can be timed, its memory is the process's.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as opened:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_thinkfast.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=opened,
                text=True,
                encoding="utf-8",
                env=os.environ | environment,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a command and waits for its result; see ``worker`` for the commands.

        Raises:
            WorkerError: the command failed or the process died. The process is gone then.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the end of its output, below, says the same
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.close()
            raise WorkerError(f"{self.name}: the process ended with code {code}; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise WorkerError(f"{self.name}: {answer['error']}; details in {self.log}")
        return answer["result"]

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):  # a command that it did not live to read
                    pipe.close()
