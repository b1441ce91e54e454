"""The server of ``scripts/soak.py``: a process group with its memory, its metrics and its log."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from scripts.soak_traffic import MAX_MODEL_LEN, MODEL
from scripts.tiny_models import ENVIRONMENT as ONE_THREAD
from vllm_thinkfast.bench.process import CACHE_VARIABLE

HOST = "127.0.0.1"
START_S, STOP_S = 600, 60
MIB = 2**20
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # oneDNN, below torch, keeps a compiled kernel for each of the last 1024 shapes of a product.
    # With traffic of random lengths that is memory that grows for an hour, some hundred MiB, with
    # any model; a leak would not be seen beside it.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
}
_PR_SET_PDEATHSIG = 1
_BAD_LOG = re.compile(r"\b(?:ERROR|CRITICAL|FATAL)\b|Traceback \(most recent|Segmentation fault")
_RECORD = re.compile(r"\b(?:ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[[^\]]*\]")
_ASKED_FOR = re.compile(r"VLLMValidationError: ")
"""In a record of vLLM about a request that it refuses after its stream had begun."""
_MAX_RECORD = 3000
METRICS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "cache_usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
}
"""Our name -> the server's. ``cache_usage`` is a fraction of the blocks of states and of KV."""
AT_REST = ("running", "waiting", "cache_usage")
"""Metrics that must be 0 when nothing is in flight."""


class ServerError(Exception):
    """The server did not start, or died; the text names its log."""


class Server:
    """``vllm serve`` of one model; everything that it starts is in one process group."""

    def __init__(
        self,
        vllm: Path,
        model: Path,
        log: Path,
        cache_mib: int,
        num_seqs: int,
        extra: Sequence[str],
    ) -> None:
        """Starts it.

        Args:
            vllm: the program ``vllm``.
            model: folder.
            log: file for everything that the server prints.
            cache_mib: memory for states and KV, MiB. Small, so that requests are preempted.
            num_seqs: sequences that may run at once.
            extra: more arguments for ``vllm serve``.
        """
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        self.command = [
            *(str(vllm), "serve", str(model), "--served-model-name", MODEL),
            *("--host", HOST, "--port", str(self.port), "--disable-uvicorn-access-log"),
            *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(num_seqs)),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            # Embedded models were trained on 2048 positions; what they say after them is no matter.
            *("--hf-overrides", json.dumps({"max_position_embeddings": MAX_MODEL_LEN})),
            *("--kv-cache-memory-bytes", str(cache_mib * MIB), *extra),
        ]
        # What a user sets wins; a server of its own has its engine in a process of its own.
        environment = ONE_THREAD | ENVIRONMENT | os.environ
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        # It would win over --kv-cache-memory-bytes, in GiB.
        environment.pop(CACHE_VARIABLE, None)
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        with log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_until_ready(self) -> None:
        """Polls /health.

        Raises:
            ServerError: the server ended, or did not answer in START_S seconds.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            time.sleep(0.2)
        raise ServerError(f"the server did not answer /health in {START_S} s: see {self.log}")

    def check_alive(self) -> None:
        """Raises ServerError if the server's first process ended."""
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"the server ended with code {code}: see {self.log}")

    def processes(self) -> list[psutil.Process]:
        """Living processes of the group."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getpgid(pid) == self.process.pid:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory of each process, bytes; pages that processes share count in each."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found[f"{process.name()} {process.pid}"] = process.memory_info().rss
        return found

    def metrics(self) -> dict[str, float]:
        """METRICS, each summed over its labels.

        Raises:
            OSError: no answer.
            ServerError: the server has no such metric.
        """
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        missing = sorted(set(METRICS.values()) - set(sums))
        if missing:
            raise ServerError(f"/metrics of the server lacks {', '.join(missing)}")
        return {ours: sums[theirs] for ours, theirs in METRICS.items()}

    def stop(self) -> list[str]:
        """Ends the group; returns what was wrong with how it ended."""
        problems = []
        code = self.process.poll()
        if code is not None:
            problems.append(f"the server had ended by itself with code {code}")
        else:
            self.process.terminate()
        deadline = time.monotonic() + STOP_S
        # poll() also fetches the exit code, without which a dead process stays in the group.
        while (self.process.poll() is None or self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.processes()
        if left:
            names = ", ".join(f"{process.pid}" for process in left)
            problems.append(f"killed what did not end in {STOP_S} s: processes {names}")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return problems

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            text: str = answer.read().decode()
            return text


def bad_records(log: Path, num_bytes: int) -> tuple[list[str], list[str]]:
    """Errors in a log that no request asked for, each with the number of its first line.

    vLLM repeats the head of a record, such as ``ERROR 11-21 18:52:28 [serving.py:500]``, in each of
    its lines; those of one head are one record. A bare traceback ends with its exception.

    Args:
        log: file.
        num_bytes: of the log when the server was told to end.

    Returns:
        Errors in the first ``num_bytes``, and those after them.
    """
    # A line that was being written then belongs to the first part.
    text = log.read_bytes()
    border = text.count(b"\n", 0, num_bytes) + (not text[:num_bytes].endswith(b"\n"))
    records: list[tuple[int, str, list[str]]] = []
    in_traceback = False
    lines_of_log = map(str.rstrip, text.decode(errors="replace").split("\n"))
    for number, line in enumerate(lines_of_log, 1):
        if in_traceback:
            records[-1][2].append(line)
            in_traceback = line.startswith(" ")
        elif _BAD_LOG.search(line):
            found = _RECORD.search(line)
            head = found.group() if found else ""
            if head and records and records[-1][1] == head:
                records[-1][2].append(line)
            else:
                records.append((number, head, [line]))
            in_traceback = not head and "Traceback" in line
    parts: tuple[list[str], list[str]] = ([], [])
    for number, _, lines in records:
        if not any(_ASKED_FOR.search(line) for line in lines):
            text_of_record = "\n".join(lines)[-_MAX_RECORD:]
            parts[number > border].append(f"line {number}: {text_of_record}")
    return parts


@dataclass(frozen=True)
class Growth:
    """Whether memory grew; see `judge_growth`."""

    grew: bool | None
    """None: too few samples to say."""
    second_quarter_mib: float = 0.0
    last_quarter_mib: float = 0.0
    slope_mib_per_hour: float = 0.0
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


ALLOWED_GROWTH_BYTES = 64 * MIB
"""Less than 5 % of what a server of an embedded model has, and several times the noise."""
MIN_PER_QUARTER = 4


def judge_growth(samples: Sequence[tuple[float, int]]) -> Growth:
    """Whether resident memory grew during the traffic.

    The first quarter of the time is the warm-up: pages of the cache are touched for the first time,
    grammars are compiled. Memory grew if one of these is more than ALLOWED_GROWTH_BYTES:

    * the median of the last quarter less the median of the second one;
    * the slope over the second half, times the length of that half. The slope is Theil and Sen's:
      the median of the slopes between all pairs of samples.

    Args:
        samples: (seconds, bytes) in the order of time.
    """
    if not samples:
        return Growth(None, why="no samples")
    begin, end = samples[0][0], samples[-1][0]
    quarter_s = (end - begin) / 4
    quarters: list[list[tuple[float, int]]] = [[], [], [], []]
    for seconds, num_bytes in samples:
        part = min(3, int((seconds - begin) / quarter_s)) if quarter_s else 0
        quarters[part].append((seconds, num_bytes))
    if min(map(len, quarters)) < MIN_PER_QUARTER:
        return Growth(None, why=f"fewer than {MIN_PER_QUARTER} samples in a quarter of the time")
    second, last = (statistics.median(b for _, b in quarters[q]) for q in (1, 3))
    pairs = combinations(quarters[2] + quarters[3], 2)
    slope = statistics.median((b - a) / (t - s) for (s, a), (t, b) in pairs if t > s)
    why = []
    if last - second > ALLOWED_GROWTH_BYTES:
        why.append("the last quarter is above the second one")
    if slope * 2 * quarter_s > ALLOWED_GROWTH_BYTES:
        why.append("it rises over the second half")
    return Growth(
        bool(why),
        second / MIB,
        last / MIB,
        slope * 3600 / MIB,
        ", and ".join(why),
    )
