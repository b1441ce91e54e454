"""The server backend against a scripted server: streaming, retries, giving up, the command."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from scripted_backend import SETTINGS, draw, problems
from tiny_checkpoint import build_tokenizer

from lm_eval_tasks.cli import main
from lm_eval_tasks.samples import SampleStore, sample_seed
from lm_eval_tasks.sampling.backend import BackendError, Drawn, DrawRequest
from lm_eval_tasks.sampling.openai_backend import OpenAIBackend, ServerOptions
from lm_eval_tasks.sampling.problems import Problem

MESSAGES = [{"role": "user", "content": "Question 0?"}]
PROBLEM = Problem("t/0", "Question 0?", "0", json.dumps(MESSAGES))
TEXT_PROBLEM = problems(1)[0]


def backend(server: FakeServer, tokenizer: Any = None, **options: Any) -> OpenAIBackend:
    quick = {"backoff_s": 0.01, "max_backoff_s": 0.04, "timeout_s": 10.0, "max_retries": 3}
    settings = ServerOptions(url=server.url, model="tiny", **quick | options)
    return OpenAIBackend(settings, max_in_flight=4, tokenizer=tokenizer)


@pytest.fixture
def started() -> Iterator[list[OpenAIBackend]]:
    """Backends put into this list are closed after the test."""
    opened: list[OpenAIBackend] = []
    yield opened
    for each in opened:
        each.close()
        each.close()


def wait_for(asked: OpenAIBackend, count: int) -> list[Drawn]:
    found: list[Drawn] = []
    deadline = time.monotonic() + 30
    while len(found) < count:
        assert time.monotonic() < deadline
        found += asked.wait()
    return found


def one_sample(server: FakeServer, started: list[OpenAIBackend], **options: Any) -> Drawn:
    problem = PROBLEM if options.get("api", "chat") == "chat" else TEXT_PROBLEM
    asked = backend(server, **options)
    started.append(asked)
    asked.prepare([problem], SETTINGS)
    asked.submit(DrawRequest(problem, 2, seed=77))
    (drawn,) = wait_for(asked, 1)
    return drawn


# -- a server in good health ----------------------------------------------------------------------


def test_chat(started: list[OpenAIBackend]) -> None:
    with FakeServer() as server:
        drawn = one_sample(server, started, api_key="secret")
    assert (drawn.text, drawn.finish_reason) == ("seed 77", "stop")
    assert (drawn.num_tokens, drawn.num_prompt_tokens, drawn.num_cached_tokens) == (11, 5, 4)
    assert drawn.first_token_at is not None
    assert drawn.submitted_at < drawn.first_token_at <= drawn.finished_at <= time.monotonic()
    assert server.paths == ["/v1/chat/completions"]
    assert server.authorizations == ["Bearer secret"]
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": MESSAGES,
            "temperature": 0.7,
            "top_p": 1.0,
            "max_tokens": 50,
            "seed": 77,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert "secret" not in repr(started[0].options)


def test_completions(started: list[OpenAIBackend], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with FakeServer() as server:
        assert one_sample(server, started, api="completions").text == "seed 77"
        one_sample(server, started, api="completions", tokenizer=tokenizer)
    assert server.paths == ["/v1/completions"] * 2
    assert server.authorizations == [None] * 2
    prompts = [body["prompt"] for body in server.bodies]
    assert prompts == [TEXT_PROBLEM.prompt, tokenizer(TEXT_PROBLEM.prompt).input_ids]


def test_truncated(started: list[OpenAIBackend]) -> None:
    with FakeServer(lambda number, body: "finish length") as server:
        assert one_sample(server, started).finish_reason == "length"


def test_warm_up_uses_a_prompt_of_its_own_and_is_not_counted(started: list[OpenAIBackend]) -> None:
    with FakeServer(lambda number, body: "500" if number == 0 else None) as server:
        asked = backend(server)
        started.append(asked)
        asked.prepare([PROBLEM], SETTINGS)
        asked.warm_up(100)
        assert len(server.bodies) == 1 + asked.max_in_flight
        assert all(body["messages"] != MESSAGES for body in server.bodies)
        assert all(body["max_tokens"] < 50 for body in server.bodies)
        assert asked.facts()["num_retries"] == 0
        assert asked.wait() == []


def test_concurrency_is_bounded_and_used(started: list[OpenAIBackend], tmp_path: Path) -> None:
    def slowly(number: int, body: dict[str, Any]) -> None:
        time.sleep(0.02)

    with FakeServer(slowly) as server:
        asked = backend(server, api="completions")
        started.append(asked)
        draw(tmp_path, asked, num_problems=4, num_samples=8)
    assert server.peak == asked.max_in_flight == 4
    for record in SampleStore(tmp_path).records():
        assert record.text == f"seed {sample_seed(1234, record.problem_id, record.sample_index)}"


# -- a server in trouble --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    ["500", "503", "429", "408", "drop", "hang up", "error event", "damaged event", "nested event"],
)
def test_trouble_that_passes(
    started: list[OpenAIBackend], trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeServer(lambda number, body: trouble if number < 2 else None) as server:
        drawn = one_sample(server, started)
    assert drawn.text == "seed 77"
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[2], "the same seed again"
    assert started[0].facts()["num_retries"] == 2
    assert "t/0, sample 2: " in caplog.text
    assert "trying again in" in caplog.text
    assert len(caplog.records) == 1, "not one line for each failure"


def test_retry_after_is_obeyed(started: list[OpenAIBackend]) -> None:
    begun = time.monotonic()
    with FakeServer(lambda number, body: "429 after 0.3" if number == 0 else None) as server:
        drawn = one_sample(server, started)
    assert time.monotonic() - begun >= 0.3
    assert drawn.submitted_at - begun >= 0.3, "the clock is that of the attempt that succeeded"


def test_backoff_grows_and_is_spread(
    started: list[OpenAIBackend], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_tasks.sampling import openai_backend

    monkeypatch.setattr(openai_backend, "_WARN_INTERVAL_S", 0.0)
    with FakeServer(lambda number, body: "500") as server:
        asked = backend(server, backoff_s=0.1, max_backoff_s=0.4, max_retries=5)
        started.append(asked)
        asked.prepare([PROBLEM], SETTINGS)
        asked.submit(DrawRequest(PROBLEM, 0, seed=1))
        with pytest.raises(BackendError, match="failed 6 times"):
            wait_for(asked, 1)
    waits = [float(r.getMessage().split(" s (")[0].rsplit(" ", 1)[1]) for r in caplog.records]
    assert len(waits) == 5
    for wait, most in zip(waits, (0.1, 0.2, 0.4, 0.4, 0.4), strict=True):
        assert most / 2 - 0.06 <= wait <= most + 0.06  # printed with one decimal


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("401", r"answered 401: .*scripted 401.*--api-key-env"),
        ("404", r"answered 404: .*--model"),
        ("no usage", "reports no usage"),
        ("finish content_filter", "finish_reason 'content_filter'"),
        ("odd usage", r"no OpenAI-like answer .*KeyError"),
    ],
)
def test_trouble_that_stays_is_not_tried_again(
    started: list[OpenAIBackend], trouble: str, message: str
) -> None:
    with (
        FakeServer(lambda number, body: trouble) as server,
        pytest.raises(BackendError, match=message),
    ):
        one_sample(server, started)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("500", "failed 4 times for t/0, sample 2 .*scripted 500"),
        ("drop", "failed 4 times"),
        ("html", "failed 4 times .*damaged event"),
        ("no choices", "failed 4 times .*ended before the sample did"),
    ],
)
def test_giving_up(started: list[OpenAIBackend], trouble: str, message: str) -> None:
    with (
        FakeServer(lambda number, body: trouble) as server,
        pytest.raises(BackendError, match=message),
    ):
        one_sample(server, started)
    assert len(server.bodies) == 4


def test_silent_server(started: list[OpenAIBackend]) -> None:
    def sleep(number: int, body: dict[str, Any]) -> None:
        time.sleep(0.5)

    with (
        FakeServer(sleep) as server,
        pytest.raises(BackendError, match=r"failed 2 times .*(no sign of life for 0\.1 s|Timeout)"),
    ):
        one_sample(server, started, timeout_s=0.1, max_retries=1)


def test_nobody_listens(started: list[OpenAIBackend], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = FakeServer()
    server.url = f"http://127.0.0.1:{port}/v1"
    asked = backend(server, api="completions", max_retries=1)
    started.append(asked)
    with pytest.raises(ValueError, match=r"failed 2 times for the warm-up .*nothing was drawn"):
        draw(tmp_path, asked)


# -- the whole command ----------------------------------------------------------------------------


def command(server: FakeServer, folder: Path, *more: str) -> list[str]:
    what = ["--model", "tiny", "--task", "arith", "--limit", "3", "--num-samples", "6"]
    where = ["--server", server.url, "--max-in-flight", "2", "--out", str(folder)]
    return ["sample", *what, *where, *more]


def test_command_survives_a_server_that_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "lm_eval_tasks")
    with FakeServer(lambda number, body: None if number < 10 else "500") as server:
        assert main(command(server, tmp_path, "--max-retries", "0")) == 2
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error:")]
    assert len(errors) == 1
    assert "failed 1 times" in errors[0]
    assert "the same command goes on from there" in errors[0]
    before = list(SampleStore(tmp_path).records())
    assert 6 <= len(before) <= 8, "two of the ten requests were the warm-up"

    with FakeServer() as server:
        assert main(command(server, tmp_path)) == 0  # elsewhere now: the address may change
        assert len(server.bodies) == 2 + 18 - len(before)
        assert main(command(server, tmp_path)) == 0
        assert len(server.bodies) == 2 + 18 - len(before), "nothing left to draw"
    records = list(SampleStore(tmp_path).records())
    assert records[: len(before)] == before
    assert len({record.key for record in records}) == len(records) == 18
    assert {record.text for record in records} == {f"seed {record.seed}" for record in records}
    content = server.bodies[-1]["messages"]
    assert [turn["role"] for turn in content] == ["user"]
    assert content[0]["content"] in {p.question for p in SampleStore(tmp_path).problems()}


def test_command_forgets_the_verdicts_of_samples_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are drawn again, and without seeds they are others."""
    with FakeServer() as server:
        assert main(command(server, tmp_path)) == 0
        assert main(["score", str(tmp_path)]) == 0
        path = tmp_path / "samples.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        assert main(command(server, tmp_path)) == 0
    assert "dropped 1 verdicts and scores of samples that are gone" in capsys.readouterr().err
    assert main(["score", str(tmp_path)]) == 0
    assert "1 of 18 samples judged now" in capsys.readouterr().err


def test_variables_of_the_chat_template_are_sent(tmp_path: Path) -> None:
    with FakeServer() as server:
        more = ("--chat-template-args", "date_string=2024-07-26", "enable_thinking=False")
        assert main(command(server, tmp_path, *more)) == 0
        sent = [body["chat_template_kwargs"] for body in server.bodies]
    assert sent == [{"date_string": "2024-07-26", "enable_thinking": False}] * 20, "warm-up too"
    config = SampleStore(tmp_path).config()
    assert config["engine"]["chat_template_args"] == "sent"
    assert config["prompt"]["chat_template_args"]["date_string"] == "2024-07-26"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("empty list", "AttributeError: "),
        ("null usage", "TypeError: "),
        ("content list", "TypeError: content is a list, need text"),
    ],
)
@pytest.mark.parametrize("first", [0, 6])
def test_odd_answers_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trouble: str, reason: str, first: int
) -> None:
    """In the warm-up, which has few requests, and while drawing."""
    with FakeServer(lambda number, _: trouble if number >= first else None) as server:
        assert main(command(server, tmp_path, "--max-retries", "0")) == 2
        errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1
    assert f"error: no OpenAI-like answer from {server.url} ({reason}" in errors[0]
    assert ("nothing was drawn" in errors[0]) == (first == 0)


def test_key_that_no_header_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret\n")
    with FakeServer() as server:
        assert main(command(server, tmp_path / "run", "--api-key-env", "SOME_KEY")) == 2
    error = capsys.readouterr().err
    assert "--api-key-env SOME_KEY: its value has a line break" in error
    assert "secret" not in error
    assert not (tmp_path / "run").exists()


def test_command_reports_facts_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    with FakeServer() as server:
        assert main(command(server, tmp_path, "--json", "--api-key-env", "SOME_KEY")) == 0
        facts = json.loads(capsys.readouterr().out)
        assert set(server.authorizations) == {"Bearer secret"}
    assert facts["drawn"] == 18
    assert facts["engine"] == {"max_in_flight": 2, "api": "chat"}
    assert "secret" not in "".join(file.read_text() for file in tmp_path.iterdir())
    config = SampleStore(tmp_path).config()
    assert config["server"] == server.url
    assert config["prompt"]["chat_template_applied_by"] == "server"
    assert (config["temperature"], config["max_tokens"], config["seed"]) == (0.7, 128, 1234)
