"""The parent's side of a worker: a module that holds one engine, in a process of its own.

A process per engine keeps peak memory honest and the engines apart; an idle one waits for input and
takes no time from the others. The protocol is a JSON line per command; each is answered by JSON
lines: ``progress`` any number of times, then ``result`` or ``error``. The worker's side is
`vllm_thinkfast.bench.serve`.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_thinkfast.bench.serve import OnProgress

CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""On a CPU vLLM takes it, in GiB, in place of ``kv_cache_memory_bytes``, and does not say so."""
_END_S = 20


class WorkerError(Exception):
    """A worker failed; the message names its log."""


class Worker:
    """One process; it imports nothing heavy before the first command."""

    def __init__(
        self,
        module: str,
        log: Path,
        environment: Mapping[str, str | None],
        folder: Path | None = None,
    ) -> None:
        """Starts the process.

        Args:
            module: that calls `vllm_thinkfast.bench.serve.serve` when it is run.
            log: file to which everything it prints is appended.
            environment: variables besides this process's own and those of every worker; None: one
                that it does not get.
            folder: to run in; None: this process's.
        """
        self.log = log
        common = {
            # The engine in the worker itself: its steps can be timed, its memory is the process's,
            # its seed is the run's.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",  # everything is local
            "PYTHONUNBUFFERED": "1",
        }
        variables = {**os.environ, **common, **environment}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as opened:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=opened,
                text=True,
                encoding="utf-8",
                cwd=folder,
                env={name: value for name, value in variables.items() if value is not None},
            )

    def ask(self, do: str, on_progress: OnProgress | None = None, **arguments: Any) -> Any:
        """Sends a command and waits for its result.

        Args:
            do: name of the command; the module knows them.
            on_progress: told (done, total) by commands that report it.
            **arguments: of the command.

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
        for line in self.process.stdout:
            if not line.endswith("\n"):
                break  # killed while it wrote: the end of its output
            message = json.loads(line)
            if "error" in message:
                self.close()
                raise WorkerError(f"{message['error']}; details in {self.log}")
            if "result" in message:
                return message["result"]
            if on_progress is not None:
                on_progress(*message["progress"])
        code = self.process.wait()
        self.close()
        raise WorkerError(f"the process ended with code {code}; see {self.log}")

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a command that it did not live to read
            self.process.stdin.close()
        try:
            self.process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
