"""Measurements survive a kill at any byte, and one run at a time writes them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vllm_thinkfast.bench.store import Results, write_atomically

ROOT = Path(__file__).resolve().parents[3]


def test_stored_at_once(tmp_path: Path) -> None:
    results = Results(tmp_path / "run")
    results.add("a", {"x": 1})
    assert json.loads(results.path.read_text()) == {"key": "a", "value": {"x": 1}}
    results.close()
    again = Results(tmp_path / "run")
    assert again.get("a") == {"x": 1}
    assert again.get("b") is None
    again.close()


def test_torn_line_is_dropped(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add("a", {"x": "ä"})
    results.add("b", {"x": 2})
    results.close()
    whole = results.path.read_bytes()
    for length in range(len(whole) + 1):
        results.path.write_bytes(whole[:length])
        again = Results(tmp_path)
        assert set(again.rows) <= {"a", "b"}
        assert len(again.rows) == whole[:length].count(b"\n")
        again.add("c", {"x": 3})
        again.close()
        last = Results(tmp_path)
        assert last.get("c") == {"x": 3}
        last.close()


def test_second_run_is_refused(tmp_path: Path) -> None:
    first = Results(tmp_path)
    with pytest.raises(ValueError, match="another bench is running there"):
        Results(tmp_path)
    first.close()
    Results(tmp_path).close()


def test_fresh(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add("a", {})
    results.close()
    results = Results(tmp_path, fresh=True)
    assert results.get("a") is None
    results.close()


def test_foreign_line(tmp_path: Path) -> None:
    (tmp_path / "measurements.jsonl").write_text('{"key": "a", "value": {}}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"line 2: not readable.*--fresh"):
        Results(tmp_path)


def test_write_atomically_survives_kill(tmp_path: Path) -> None:
    """A process that writes without end is killed at a random place: the file is whole."""
    path = tmp_path / "state.json"
    write_atomically(path, "0" * 1_000_000)
    program = f"""
        from pathlib import Path
        from vllm_thinkfast.bench.store import write_atomically
        print("ready", flush=True)
        for i in range(10**6):
            write_atomically(Path({str(path)!r}), str(i % 10) * 1_000_000)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    text = path.read_text()
    assert len(text) == 1_000_000
    assert len(set(text)) == 1
