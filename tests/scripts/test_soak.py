"""The soak test itself, against a server without a model."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from scripts import soak
from scripts.soak_client import Answer, Choice, problems
from scripts.soak_server import MIB, bad_records, judge_growth
from scripts.soak_traffic import (
    ABORTED,
    ANSWERED,
    COMPLETIONS,
    KINDS,
    MALFORMED,
    MAX_N,
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    REFUSED,
    Request,
    Traffic,
    grammar_problem,
)
from scripts.tiny_models import ROOT

MODEL = ROOT / "thinkfast" / "llamba-tiny"
PARTIAL_IDS = range(100, 200)


def traffic(seed: int) -> Traffic:
    return Traffic(seed, 514, range(5), PARTIAL_IDS)


def test_traffic_is_a_function_of_the_seed() -> None:
    some = range(0, 400, 7)
    first, again, other = traffic(3), traffic(3), traffic(4)
    assert [first.request(i) for i in some] == [again.request(i) for i in reversed(some)][::-1]
    assert first.probes() == again.probes()
    assert [first.request(i) for i in some] != [other.request(i) for i in some]
    assert first.probes() != other.probes()


def test_traffic_covers_everything() -> None:
    """In 300 requests: every kind, and lengths and numbers over their whole ranges."""
    requests = [traffic(0).request(index) for index in range(300)]
    kinds = Counter(request.kind for request in requests)
    assert set(kinds) == {*KINDS, *MALFORMED}
    malformed = sum(request.expect == REFUSED for request in requests)
    assert 0.2 < malformed / len(requests) < 0.5
    well = [r for r in requests if r.kind in KINDS]
    assert {(r.payload.get("stream", False), r.expect == ABORTED) for r in well} == {
        (stream, aborted) for stream in (False, True) for aborted in (False, True)
    }
    prompts = [r.payload["prompt"] for r in well if r.path == COMPLETIONS]
    flat = [p for prompt in prompts for p in (prompt if isinstance(prompt[0], list) else [prompt])]
    lengths = list(map(len, flat))
    assert min(lengths) <= 3
    assert 3000 < max(lengths) <= MAX_PROMPT_TOKENS
    assert all(5 <= i < 514 for prompt in flat for i in prompt)
    assert all(prompt[-1] not in PARTIAL_IDS for prompt in flat)
    numbers = [r.payload.get("n", 1) for r in well]
    assert min(numbers) == 1
    assert 24 <= max(numbers) <= MAX_N
    new = [r.payload["max_tokens"] for r in well]
    assert min(new) <= 3
    assert max(new) == MAX_NEW_TOKENS
    temperatures = {r.payload["temperature"] for r in well}
    assert temperatures == {0, 0.7}


def test_traffic_for_a_model() -> None:
    """No prompt has special tokens or ends within a character."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    made = soak.traffic_for(0, MODEL)
    prompts = [made.prompt(random.Random(i), 50) for i in range(200)]
    assert any("\ufffd" in tokenizer.decode(prompt) for prompt in prompts)
    assert not any(tokenizer.decode(prompt).endswith("\ufffd") for prompt in prompts)
    special = set(tokenizer.get_added_tokens_decoder())
    assert special
    assert not any(special.intersection(prompt) for prompt in prompts)


def test_probes() -> None:
    probes = traffic(0).probes()
    assert len(probes) >= 6
    assert all(p.payload["temperature"] == 0 and p.payload["n"] == 1 for p in probes.values())
    prompts = [p.payload["prompt"] for p in probes.values() if "prompt" in p.payload]
    assert max(map(len, prompts)) == MAX_PROMPT_TOKENS
    assert min(map(len, prompts)) == 1


@pytest.mark.parametrize(
    ("payload", "right", "wrong"),
    [
        ({"structured_outputs": {"regex": "[0-9]{2}"}}, "12", "123"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "nono"),
        ({"structured_outputs": {"json": {}}}, '{"a": 1, "b": "x"}', '{"a": 4, "b": "x"}'),
        ({"response_format": {}}, '{"a": 3, "b": "y"}', '{"a": 3'),
    ],
)
def test_grammar_problem(payload: dict[str, Any], right: str, wrong: str) -> None:
    assert grammar_problem(payload, right) is None
    assert grammar_problem(payload, wrong) is not None


PAYLOAD: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 3, "n": 2, "stop": ["b"], "logprobs": 0}


def right_answer() -> Answer:
    choices = {i: Choice("aaa", [7, 7, 7], [-1.0] * 3, [], 0, "length") for i in range(2)}
    return Answer(200, choices, {"prompt_tokens": 2, "completion_tokens": 6})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"text": "ab"}, "choice 0: has the stop string 'b'"),
        ({"token_ids": [7, 7]}, "2 tokens, finish reason length, of 3"),
        ({"finish_reason": None}, "choice 0: finish reason None"),
        ({"finish_reason": "stop", "token_ids": [7] * 4}, "4 tokens, finish reason stop, of 3"),
        ({"logprobs": [-1.0, math.nan, -1.0]}, "log-probabilities [-1.0, nan"),
        ({"logprobs": [-1.0]}, "1 log-probabilities of 3 tokens"),
    ],
)
def test_problems_of_a_choice(changes: dict[str, Any], said: str) -> None:
    answer = right_answer()
    answer.choices[0] = replace(answer.choices[0], **changes)
    found = problems(Request("", COMPLETIONS, ANSWERED, PAYLOAD), answer)
    assert said in " ".join(found)
    assert bool(found) is bool(said)


@pytest.mark.parametrize(
    ("expect", "changes", "said"),
    [
        (ANSWERED, {"choices": {0: right_answer().choices[0]}}, "choices [0] instead of 2"),
        (ANSWERED, {"usage": {"prompt_tokens": 2, "completion_tokens": 7}}, "6 generated tokens"),
        (ANSWERED, {"usage": {"prompt_tokens": 9, "completion_tokens": 6}}, "2 prompt tokens"),
        (ANSWERED, {"status": 400, "error": "no"}, "not answered: status 400 no"),
        (ANSWERED, {"error": "the stream ended"}, "the stream ended"),
        (ANSWERED, {"status": None, "error": "reset"}, "not answered: status None reset"),
        (REFUSED, {}, "not refused: status 200"),
        (REFUSED, {"status": 500}, "status 500"),
        (REFUSED, {"status": 404}, ""),
        (REFUSED, {"status": None}, "not refused: status None"),
        (ABORTED, {"left": True, "choices": {}}, ""),
        (ABORTED, {"left": True, "status": 503}, "status 503"),
        (ABORTED, {}, ""),
        (ABORTED, {"choices": {}}, "choices [] instead of 2"),
        (ABORTED, {"status": None, "error": "refused"}, "did not get as far as leaving: refused"),
    ],
)
def test_problems(expect: str, changes: dict[str, Any], said: str) -> None:
    answer = replace(right_answer(), **changes)
    found = problems(Request("", COMPLETIONS, expect, PAYLOAD), answer)
    assert said in " ".join(found)
    assert bool(found) is bool(said)


def resident(mib: Callable[[float], float]) -> list[tuple[float, int]]:
    """20 minutes of memory with noise of a few MiB, every 5 s; ``mib`` of seconds."""
    rng = random.Random(0)
    return [(t, round((mib(t) + rng.gauss(0, 4)) * MIB)) for t in range(0, 1201, 5)]


@pytest.mark.parametrize(
    ("mib", "grew"),
    [
        (lambda t: 1500, False),
        (lambda t: 1000 if t < 250 else 1500, False),  # a step in the warm-up
        (lambda t: 1500 - 0.05 * t, False),
        (lambda t: 1500 + (300 if 900 < t < 1000 else 0), False),  # a short peak
        (lambda t: 1500 + 0.05 * t, False),  # within what is allowed
        (lambda t: 1500 + 0.2 * t, True),  # a leak
        (lambda t: 1500 + max(0, t - 900), True),  # a leak that begins late
        (lambda t: 1500 if t < 700 else 1580, True),  # a step after the warm-up
        # Only the slope shows it: what was freed in the middle hides the leak.
        (lambda t: 1600 if t < 600 else 1400 + 0.2 * (t - 600), True),
    ],
)
def test_judge_growth(mib: Callable[[float], float], grew: bool) -> None:
    assert judge_growth(resident(mib)).grew is grew


def test_judge_growth_with_too_few_samples() -> None:
    assert judge_growth([]).grew is None
    assert judge_growth([(float(t), MIB) for t in range(8)]).grew is None


def test_bad_records(tmp_path: Path) -> None:
    """Records of several lines count once; those about a refused request do not count."""
    head = "(APIServer pid=1) ERROR 11-21 18:52:28 [serving.py:500]"
    log = tmp_path / "log"
    log.write_text(
        "INFO all is well, no errors\n"
        f"{head} Error in completion stream generator.\n{head} Traceback (most recent call last):\n"
        f"{head} vllm.exceptions.VLLMValidationError: Grammar error\n"
        "(EngineCore pid=2) ERROR 11-21 18:52:29 [core.py:7] first\n"
        "(EngineCore pid=2) ERROR 11-21 18:52:29 [core.py:7] second\n"
        "Traceback (most recent call last):\n  File\nOSError: third\nINFO after it\n"
    )
    num_bytes = log.stat().st_size
    with log.open("a") as out:
        out.write("(EngineCore pid=2) ERROR 11-21 18:52:30 [core.py:7] told to end\n")
    found, at_end = bad_records(log, num_bytes)
    assert [record.partition(":")[0] for record in at_end] == ["line 11"]
    assert [record.partition(":")[0] for record in found] == ["line 5", "line 7"]
    assert "first" in found[0]
    assert "second" in found[0]
    assert found[1].endswith("OSError: third")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that is called like ``vllm``."""
    path = tmp_path_factory.mktemp("bin") / "vllm"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.scripts.fake_vllm import main\nmain()\n"
    )
    path.chmod(0o755)
    return path


def arguments(program: Path, out: Path, minutes: float) -> list[str]:
    options = ["--model", str(MODEL), "--out", str(out), "--vllm", str(program)]
    return [*options, "--minutes", str(minutes), "--probe-every", "0.2"]


@pytest.mark.parametrize(
    ("faults", "failed"),
    [
        ("", []),
        ("drift", ["probes say the same"]),
        ("500", ["requests end as they must"]),
        (
            "short busy log",
            ["requests end as they must", "at rest in the end", "no errors in the log"],
        ),
    ],
)
def test_soak(
    faults: str,
    failed: list[str],
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAULTS", faults)
    monkeypatch.setattr(soak, "REST_S", 0.3)
    out = tmp_path / "out"
    code = soak.main(arguments(program, out, 0.015))
    results = json.loads((out / "results.json").read_text())
    assert [c["name"] for c in results["checks"] if c["passed"] is False] == failed, results
    assert code == (1 if failed else 0)
    assert f"{ROOT}/" not in (out / "results.json").read_text()
    assert results["probes"]["num_rounds"] >= 4
    assert len(results["outcomes"]) > 20
    text = (out / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert ("FAILED" in text) is bool(failed)
    records = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert len(records) == len(results["memory"]["samples"])
    assert all(record["resident_mib"] > 1 for record in records)


def test_soak_of_a_server_that_dies(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said at once, not after the time given, and what was found is written."""
    monkeypatch.setenv("FAKE_VLLM_FAULTS", "die")
    begin = time.monotonic()
    assert soak.main(arguments(program, tmp_path, 2)) == 1
    assert time.monotonic() - begin < 60
    results = json.loads((tmp_path / "results.json").read_text())
    assert "ended with code 3" in results["failures"][0]
    assert results["checks"][-1]["passed"] is False


def test_interrupt_ends_the_server(program: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.soak", *arguments(program, tmp_path, 5)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    progress = tmp_path / "progress.jsonl"
    deadline = time.monotonic() + 60
    while not progress.exists() or not progress.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (server,) = psutil.Process(process.pid).children()
    assert "serve" in server.cmdline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in said
    assert "Traceback" not in said
    assert not server.is_running()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--minutes", "0"], "--minutes 0.0: give a number above 0"),
        (["--minutes", "soon"], "--minutes: invalid float value: 'soon'"),
        (["--requests-in-flight", "0"], "--requests-in-flight 0: give at least 1"),
        (["--model", "tests"], "--model tests: has no config.json; give a model's folder"),
        (["--model", "{out}"], "has no chat template; convert it with --tokenizer of an instruct"),
        (["--vllm", "tests"], "--vllm tests: no such program"),
        (["--out", "{out}"], "holds a run already; give another folder"),
        (["--out", "{out}/config.json"], "config.json: cannot write there (a file is in the way)"),
        (["--serve-args", "--foo 'bar"], '--serve-args "--foo \'bar": No closing quotation'),
    ],
)
def test_wrong_arguments(
    changes: list[str],
    said: str,
    program: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("results.json", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    changes = [change.format(out=tmp_path) for change in changes]
    try:
        code = soak.main([*arguments(program, tmp_path / "new", 1), *changes])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
