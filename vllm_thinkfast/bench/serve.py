"""The worker's side of a process: commands in, results out; see `vllm_thinkfast.bench.process`."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Engine = TypeVar("Engine")
OnProgress = Callable[[int, int], None]
"""Told (done, total)."""
Answer = Callable[[Engine | None, dict[str, Any], OnProgress], tuple[Engine | None, Any]]
"""Carries out a command: the engine if there is one, the command with its name under "do", where to
report progress -> the engine from now on, the result."""

_LONGEST_MESSAGE = 400


def serve(answer: Answer[Engine]) -> NoReturn:
    """Answers commands from stdin until it ends, or the parent does; then ends the process.

    The answers go to what was stdout at the start. What anything else prints goes to stderr, which
    is the log.

    Args:
        answer: carries out a command.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    def report_progress(done: int, total: int) -> None:
        send({"progress": [done, total]})

    engine: Engine | None = None
    for line in sys.stdin:
        try:
            engine, result = answer(engine, json.loads(line), report_progress)
        except BaseException as error:  # whatever it is, the parent hears of it and ends the input
            traceback.print_exc()
            # pydantic's first line only counts the errors.
            text = " ".join(str(error).split())[:_LONGEST_MESSAGE]
            send({"error": f"{type(error).__name__}: {text}".removesuffix(": ")})
        else:
            send({"result": result})
    sys.stderr.flush()
    # Everything asked for has been answered; vLLM's tear-down would only add noise to the log.
    os._exit(0)


def reset_peak_memory() -> None:
    """Begins a new peak, where the system can: Linux for the process, torch for a GPU.

    Where it cannot, the peak is the one since the process began, as docs/benchmark.md says.
    """
    import torch

    with contextlib.suppress(OSError):  # not Linux, or a container that forbids it
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> dict[str, int]:
    """Largest resident memory of this process and, on a GPU, of torch's allocator."""
    import torch

    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        peak["process"] = int(line.split()[1]) * 1024
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak
