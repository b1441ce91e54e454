"""The worker pool: kill deadline, memory bound, restarts, and death of the parent."""

import os
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm_eval_tasks.workers import WorkerPool, _Worker, num_usable_cores

SLOW = ("5", "100000000!")


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(size=2, deadline_s=2.0)
    yield pool
    pool.close()


def test_the_pool_is_as_large_as_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the process may use, not those that the machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert num_usable_cores() == 3
    assert WorkerPool().size == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert WorkerPool().size == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_usable_cores() == 64


def test_compare_kills_at_the_deadline_and_goes_on(pool: WorkerPool) -> None:
    pool.compare([("1", "x"), ("1", "y")])  # start-up is not part of the deadline
    start = time.monotonic()
    outcomes = pool.compare([SLOW, ("x+1", "1+x"), ("5", "2^{300000000000}"), ("x", "y")])
    assert outcomes == ["timeout", "equal", "timeout", "different"]
    assert time.monotonic() - start < 40, "2 s of processor time each, on a busy machine"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_compare_bounds_memory() -> None:
    """The kernel's own record of the worker shows the limit."""
    pool = WorkerPool(size=1, memory_bytes=1 << 30)
    try:
        assert pool.compare([("x+1", "1+x")]) == ["equal"]
        limits = Path(f"/proc/{pool._workers[0].process.pid}/limits").read_text()
    finally:
        pool.close()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert line.split()[3:5] == [str(1 << 30)] * 2


def test_compare_replaces_workers_that_died_between_calls(pool: WorkerPool) -> None:
    assert pool.compare([("x+1", "1+x")]) == ["equal"]
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()
    assert pool.compare([("x+2", "2+x")]) == ["equal"]


def test_compare_after_a_pause_of_this_process(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped (Ctrl-Z) for longer than any limit: what the workers said meanwhile counts."""
    start, send = _Worker.__init__, _Worker.send

    def pause(worker: _Worker) -> None:
        select.select([worker.fileno], [], [])
        worker.expires = 0.0

    def started(worker: _Worker, *arguments: object) -> None:
        start(worker, *arguments)  # type: ignore[arg-type]
        pause(worker)

    def sent(worker: _Worker, *arguments: object) -> None:
        send(worker, *arguments)  # type: ignore[arg-type]
        pause(worker)

    monkeypatch.setattr(_Worker, "__init__", started)
    monkeypatch.setattr(_Worker, "send", sent)
    assert pool.compare([("x+1", "1+x"), ("x", "y")]) == ["equal", "different"]


def test_compare_after_an_interrupted_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word on the interrupted job is not that on the next call's."""
    pool = WorkerPool(size=1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        assert pool.compare([("x+1", "1+x")]) == ["equal"]
        with monkeypatch.context() as patched:
            patched.setattr(pool, "_await_change", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.compare([("x+2", "2+x")])
        assert pool.compare([("x", "y")]) == ["different"]
    finally:
        pool.close()


def test_compare_without_pairs_starts_nothing(pool: WorkerPool) -> None:
    assert pool.compare([]) == []
    assert pool._workers == []


def test_compare_says_why_a_worker_cannot_start(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        pool.compare([("x+1", "1+x")])


def test_workers_do_not_hear_ctrl_c() -> None:
    """A terminal sends it to the whole group; a worker that it ended would look like a bad answer.

    The comparisons go on in a thread while the main thread is interrupted, as early stops do.
    """
    script = textwrap.dedent(
        """
        import os, signal, threading
        from lm_eval_tasks.workers import WorkerPool
        pool = WorkerPool(size=1)
        assert pool.compare([("1", "1")]) == ["equal"]
        pairs = [(f"{i}/{i + 1}", f"1-1/{i + 1}") for i in range(1, 60)]
        found = []
        thread = threading.Thread(target=lambda: found.extend(pool.compare(pairs)))
        thread.start()
        try:
            os.killpg(0, signal.SIGINT)
            thread.join()
        except KeyboardInterrupt:
            thread.join()
        print(len(found), set(found))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,  # the group that is interrupted is not pytest's
    )
    assert done.stdout == "59 {'equal'}\n"


def test_workers_end_with_their_parent() -> None:
    """Even when the parent is killed while a worker computes inside C code."""
    script = textwrap.dedent(
        """
        import threading
        from lm_eval_tasks.workers import WorkerPool
        pool = WorkerPool(size=1, deadline_s=1.0)
        pool.compare([("x+1", "1+x")])
        print(pool._workers[0].process.pid, flush=True)
        pool.deadline_s = 600  # the parent would wait; the child's own watchdog must not
        pool.compare([("5", "100000000!")])
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _is_running(worker):
        time.sleep(0.1)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody has collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
