"""Fresh processes, one or several ranks, without starting an interpreter for each of them.

Importing torch and transformers takes eight seconds of CPU time, for every rank of every start.
Here a server imports them once and forks: the children are processes of their own, with their own
signals, exit codes and process group. One test starts the real ``torchrun``.
"""

import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'distill'}"
_PRELOADED = ["tests.distill.stand_ins", "tests.distill.stages.two_ranks", "torch.distributed.fsdp"]


@dataclass
class Finished:
    returncodes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self):
        """Of one process; of several the first that is not 0."""
        return next((code for code in self.returncodes if code), 0)


def start(target, *words, folder, ranks=1, timeout_s=300):
    """Runs ``target(words)`` in ``ranks`` processes and waits for them.

    Args:
        target: a function of a module that returns an exit code, or None for 0.
        words: its arguments, as text.
        folder: for what the processes print.
        ranks: number of processes, which find each other as under torchrun.
        timeout_s: all of them are killed after that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = PYTHONPATH  # the server's, which starts with the first process
    processes = []
    try:
        for rank in range(ranks):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            arguments = (target, list(map(str, words)), environment, str(folder / f"rank{rank}"))
            processes.append(context.Process(target=_child, args=arguments))
            processes[-1].start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    end = time.monotonic() + timeout_s
    while any(process.exitcode is None for process in processes):
        failed = any(process.exitcode for process in processes)
        if failed or time.monotonic() > end:  # the others would wait for it
            for process in processes:
                process.kill()
        time.sleep(0.02)
    out, err = (
        "".join(Path(f"{folder / f'rank{rank}'}.{name}").read_text() for rank in range(ranks))
        for name in ("out", "err")
    )
    return Finished([process.exitcode for process in processes], out, err)


def _child(target, words, environment, output):
    os.environ.update({key: str(value) for key, value in environment.items()})
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    sys.exit(target(words))
