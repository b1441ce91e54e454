"""The worker process itself: protocol, errors, end. No engine is started."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm_thinkfast.bench.scripted import settings
from vllm_thinkfast.bench import run
from vllm_thinkfast.bench.environment import environment_of_runs
from vllm_thinkfast.bench.process import Worker, WorkerError
from vllm_thinkfast.bench.run import start_worker

SERVER = """
import os, signal, sys
from vllm_thinkfast.bench.serve import serve

channel = os.dup(1)

def answer(engine, command, on_progress):
    do = command["do"]
    if do == "count":
        print("not an answer")
        for done in range(1, 4):
            on_progress(done, 3)
        return (engine or 0) + 1, command["word"]
    if do == "counted":
        return engine, [engine, os.getcwd(), os.environ["MINE"], os.environ["HF_HUB_OFFLINE"]]
    if do == "cache":
        return engine, os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if do == "exit":
        sys.exit("two\\nlines")
    if do == "die":
        os.write(channel, b'{"progress": [1, 2]}\\n{"res')
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError

serve(answer)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = start_worker(settings(), log=tmp_path / "logs" / "probe.log")
    yield worker
    worker.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Worker]:
    """A module of its own, in a folder of its own."""
    (tmp_path / "server.py").write_text(SERVER)
    path = ":".join([str(tmp_path), *filter(None, sys.path)])
    worker = Worker("server", tmp_path / "log", {"MINE": "1", "PYTHONPATH": path}, tmp_path)
    yield worker
    worker.close()


def test_roofline(worker: Worker) -> None:
    """Rates that no machine of the last twenty years misses, and none of the next ten reaches."""
    found = worker.ask("roofline", dtype="float32")
    assert found["device"] in ("cpu", "cuda")
    for name in ("triad_bytes_per_s", "copy_bytes_per_s"):
        assert 1e8 < found[name] < 1e14
    assert 1e8 < found["flops_per_s"] < 1e17
    worker.close()
    assert worker.process.returncode == 0


def test_error_names_the_log(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"^AssertionError; details in .*probe\.log"):
        worker.ask("measure", mode="separate")
    assert worker.process.returncode == 0
    assert "Traceback" in worker.log.read_text()


def test_progress_and_result(server: Worker, tmp_path: Path) -> None:
    """The engine stays between commands; what the module prints does not disturb the protocol."""
    seen: list[tuple[int, int]] = []
    assert server.ask("count", lambda *counts: seen.append(counts), word="ä") == "ä"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert server.ask("count", word="b") == "b"
    assert server.ask("counted") == [2, str(tmp_path.resolve()), "1", "1"]
    server.close()
    assert server.process.returncode == 0
    assert "not an answer" in server.log.read_text()


@pytest.mark.parametrize(("kv_cache_bytes", "seen"), [(2**20, None), (None, "3")])
def test_bytes_win_over_vllms_variable(
    kv_cache_bytes: int | None, seen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes VLLM_CPU_KVCACHE_SPACE where both are given; results.json says what it saw."""
    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setattr(run, "MODULE", "server")
    values = settings(kv_cache_bytes=kv_cache_bytes)
    with contextlib.closing(start_worker(values, tmp_path / "log")) as worker:
        assert worker.ask("cache") == seen
    assert environment_of_runs(values).get("VLLM_CPU_KVCACHE_SPACE") == seen


def test_exit_of_the_engine_is_an_error(server: Worker) -> None:
    with pytest.raises(WorkerError, match=r"^SystemExit: two lines; details in"):
        server.ask("exit")
    assert server.process.returncode == 0


def test_died(worker: Worker) -> None:
    worker.process.kill()
    with pytest.raises(WorkerError, match=r"^the process ended with code -9"):
        worker.ask("roofline", dtype="float32")


def test_died_while_writing(server: Worker) -> None:
    """Half a line is no answer, and no error of JSON."""
    seen: list[tuple[int, int]] = []
    with pytest.raises(WorkerError, match=r"^the process ended with code -9; see .*log$"):
        server.ask("die", lambda *counts: seen.append(counts))
    assert seen == [(1, 2)]
    assert server.process.stdout is not None
    assert server.process.stdout.closed
