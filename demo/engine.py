"""The demo's engines: one model in one vLLM engine each, in a process of its own."""

from pathlib import Path
from typing import Any

from demo.settings import ROOT
from vllm_thinkfast.bench.process import CACHE_VARIABLE, Worker, WorkerError
from vllm_thinkfast.bench.serve import OnProgress


class EngineError(Exception):
    """An engine failed; the message names the log file."""


class EngineProcess:
    """One process of `demo.worker`."""

    def __init__(self, folder: Path, settings: dict[str, Any], log: Path) -> None:
        """Starts the process and its engine.

        Args:
            folder: the model.
            settings: of the run; those of the engine are read from it.
            log: file to which the output of vLLM and lm-eval is appended.

        Raises:
            EngineError: the engine did not start.
        """
        environment = {
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            CACHE_VARIABLE: None,  # it would win over the settings' kv_cache_bytes
        }
        self._worker = Worker("demo.worker", log, environment, ROOT)
        started = self.ask("start", folder=str(folder), settings=settings)
        self.engine_start_s: float = started["engine_start_s"]

    def ask(self, do: str, on_progress: OnProgress | None = None, **arguments: Any) -> Any:
        """Sends one command and waits for its result.

        Args:
            do: name of the command, see `demo.worker`.
            on_progress: told (done, total).
            **arguments: of the command.

        Raises:
            EngineError: the command failed or the process died.
        """
        try:
            return self._worker.ask(do, on_progress, **arguments)
        except WorkerError as error:
            raise EngineError(f"{do}: {error}") from error

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()
