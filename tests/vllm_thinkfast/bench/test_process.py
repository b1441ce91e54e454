"""The worker process itself: protocol, errors, end. No engine is started."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_thinkfast.bench.process import Worker, WorkerError


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker("probe", threads=1, log=tmp_path / "logs" / "probe.log")
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
    with pytest.raises(WorkerError, match=r"probe: AssertionError: .*; details in .*probe\.log"):
        worker.ask("measure", mode="separate")
    assert worker.process.returncode == 0
    assert "Traceback" in worker.log.read_text()


def test_died(worker: Worker) -> None:
    worker.process.kill()
    with pytest.raises(WorkerError, match="probe: the process ended with code -9"):
        worker.ask("roofline", dtype="float32")
