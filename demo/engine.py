"""The parent's side of a worker process: one model in one vLLM engine, in a process of its own.

A process per model keeps the peak memory honest and the engines clean. Idle workers wait for input
and take no time from the others.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo.settings import ROOT

OnProgress = Callable[[int, int], None]


class EngineError(Exception):
    """An engine failed; the message names the log file."""


class EngineProcess:
    """One worker. Close it, or use it in a ``with`` statement."""

    def __init__(self, folder: Path, settings: dict[str, Any], log: Path) -> None:
        """Starts the process and its engine.

        Args:
            folder: the model.
            settings: of the run; those of the engine are read from it.
            log: file to which the output of vLLM and lm-eval is appended.

        Raises:
            EngineError: the engine did not start.
        """
        self.log = log
        quiet = {
            "HF_HUB_OFFLINE": "1",  # everything is local
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # The engine in the worker itself: its memory is the process's, its seed is the run's.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as opened:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "demo.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=opened,
                text=True,
                encoding="utf-8",
                cwd=ROOT,
                env=os.environ | quiet,
            )
        self.engine_start_s: float = self.ask("start", folder=str(folder), settings=settings)[
            "engine_start_s"
        ]

    def ask(self, do: str, on_progress: OnProgress | None = None, **arguments: Any) -> Any:
        """Sends one command and waits for its result.

        Args:
            do: name of the command, see ``demo.worker``.
            on_progress: told (done, total).
            **arguments: of the command.

        Raises:
            EngineError: the command failed or the process died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the loop below finds out why
        for line in self.process.stdout:
            message = json.loads(line)
            if message["event"] == "progress":
                if on_progress is not None:
                    on_progress(message["done"], message["total"])
            elif message["event"] == "error":
                self.close()
                raise EngineError(f"{do}: {message['message']}; details in {self.log}")
            else:
                return message["result"]
        code = self.process.wait()
        self.close()
        raise EngineError(f"{do}: the engine process ended with code {code}; see {self.log}")

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
