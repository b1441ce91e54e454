"""The remote backend against a small server that computes with the same model."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ORACLES
from run_folder import write_run
from safetensors.torch import load_file
from tiny_rewards import QUESTION, SOLUTIONS
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from lm_eval_tasks.cli import main
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.rewards import remote
from lm_eval_tasks.rewards.reward import Reward, get_reward
from lm_eval_tasks.rewards.scores import read_scores

TOLERANCE = 2e-5


@dataclass
class Served:
    """A reward model behind HTTP, with faults to order."""

    folder: Path
    kind: str
    faults: list[Any] = field(default_factory=list)
    """Consumed one per POST: an HTTP status, "drop" (connection cut), or a body to answer with."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    pooling: str = "STEP"
    lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        loader = AutoModelForCausalLM if self.kind == "completions" else Qwen2ForCausalLM
        self.model: Any = loader.from_pretrained(self.folder, dtype=torch.float32)
        self.model.eval().requires_grad_(False)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            if path == "/v1/completions" and self.kind == "completions":
                return {"choices": self._choices(body)}
            assert path == "/pooling"
            assert self.kind != "completions"
            return {"data": [{"index": 0, "data": self._rows(body)}]}

    def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        assert body["max_tokens"] == 1
        assert body["temperature"] == 0
        assert body["logprobs"] == len(body["logprob_token_ids"]) == 2
        assert body["return_tokens_as_token_ids"] is True
        choices = []
        for index, token_ids in enumerate(body["prompt"]):
            logits = self.model(torch.tensor([token_ids])).logits[0, -1]
            logprobs = logits.log_softmax(-1)
            top = {f"token_id:{i}": logprobs[i].item() for i in body["logprob_token_ids"]}
            choices.append({"index": index, "logprobs": {"top_logprobs": [top]}})
        return choices[::-1]  # a server may answer in any order

    def _rows(self, body: dict[str, Any]) -> list[list[float]]:
        (token_ids,) = body["input"]
        assert body["task"] == "token_classify"
        hidden = self.model.model(torch.tensor([token_ids])).last_hidden_state[0]
        weights = load_file(self.folder / "model.safetensors")
        if self.kind == "value":
            assert body["use_activation"] is False
            rows: list[list[float]] = (
                hidden @ weights["v_head.summary.weight"].T + weights["v_head.summary.bias"]
            ).tolist()
            return rows
        inner = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
        logits = inner @ weights["score.2.weight"].T + weights["score.2.bias"]
        rows = logits.softmax(-1).tolist()
        if self.pooling == "ALL":
            return rows
        tag = self.model.config.vocab_size - 1  # <extra_0> is the last token
        return [row for row, token in zip(rows, token_ids, strict=True) if token == tag]


@dataclass
class Running:
    """A server that is up."""

    url: str
    served: Served


class Handler(BaseHTTPRequestHandler):
    """Speaks the two APIs."""

    served: Served

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(200, {"data": [{"id": "prm", "max_model_len": 600}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.served.lock:
            self.served.requests.append(body)
            self.served.headers.append(dict(self.headers))
            fault = self.served.faults.pop(0) if self.served.faults else None
        if fault == "drop":
            self.connection.close()
        elif isinstance(fault, int):
            self._send(fault, {"error": "ordered"})
        elif fault is not None:
            self._send(200, fault)
        else:
            self._send(200, self.served.answer(self.path, body))

    def _send(self, status: int, body: Any) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start servers; they end with the test. Pauses between tries are short."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)
    servers = []

    def start(folder: Path, kind: str) -> Running:
        served = Served(folder, kind)
        handler = type("OneHandler", (Handler,), {"served": served})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return Running(f"http://127.0.0.1:{server.server_address[1]}", served)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def open_remote(running: Running, name: str, settings: str = "") -> Reward:
    folder = running.served.folder
    return get_reward(
        f"prm,protocol={name},url={running.url},tokenizer={folder},name={name}{settings}"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rlhflow-deepseek", "completions"),
        ("math-shepherd", "completions"),
        ("qwen2.5-math-prm", "labels"),
        ("skywork-o1", "value"),
    ],
)
def test_scores_are_the_published_ones(
    name: str, kind: str, start: Any, reward_folders: dict[str, Path]
) -> None:
    running = start(reward_folders[name], kind)
    reward = open_remote(running, name)
    assert reward.backend.max_tokens == (599 if kind == "completions" else 600)
    solutions = [[step.replace("\n", " ") for step in steps] for steps in SOLUTIONS]
    found = reward.score_batch([(QUESTION, steps) for steps in solutions])
    for steps, scores in zip(solutions, found, strict=True):
        expected = ORACLES[name](reward_folders[name], QUESTION, steps)
        assert scores == pytest.approx(expected, abs=TOLERANCE)


def test_pooling_all_and_tags_in_the_text(start: Any, reward_folders: dict[str, Path]) -> None:
    """A step that contains the tag makes more tags than steps; both pooling types cope."""
    folder = reward_folders["qwen2.5-math-prm"]
    running = start(folder, "labels")
    reward = open_remote(running, "qwen2.5-math-prm")
    steps = ["a <extra_0> b", "c"]
    every = ORACLES["qwen2.5-math-prm"](folder, QUESTION, steps)
    assert len(every) == 3, "the published loop would give one score too many"
    (step_rows,) = reward.score_batch([(QUESTION, steps)])
    running.served.pooling = "ALL"
    (all_rows,) = reward.score_batch([(QUESTION, steps)])
    assert step_rows == pytest.approx(every[1:], abs=TOLERANCE)
    assert all_rows == pytest.approx(every[1:], abs=TOLERANCE)


def test_faults_are_tried_again(start: Any, reward_folders: dict[str, Path]) -> None:
    folder = reward_folders["rlhflow-deepseek"]
    running = start(folder, "completions")
    running.served.faults = [b"[" * 20_000, "drop", 429, [1], 503]
    reward = open_remote(running, "rlhflow-deepseek")
    (scores,) = reward.score_batch([(QUESTION, SOLUTIONS[0])])
    assert scores == pytest.approx(
        ORACLES["rlhflow-deepseek"](folder, QUESTION, SOLUTIONS[0]), abs=TOLERANCE
    )
    assert len(running.served.requests) == 6


def test_a_server_that_gives_up_loses_nothing(
    start: Any,
    reward_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = start(reward_folders["rlhflow-deepseek"], "completions")
    write_run(tmp_path, {"a": [f"1+{i}={1 + i}" for i in range(8)]})
    spec = f"prm,protocol=rlhflow-deepseek,url={running.url},tokenizer={running.served.folder}"
    arguments = ["reward", str(tmp_path), "--reward", spec, "--batch-size", "2"]
    # One warm-up and two batches of two requests succeed; then the server fails for good.
    running.served.faults = [None] * 5 + [500] * 100
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "HTTP 500" in error
    assert "are kept" in error
    assert error.count("error:") == 1
    kept = [record.key for record in read_scores(tmp_path, "prm")]
    assert len(kept) == 4
    running.served.faults = []
    assert main(arguments) == 0
    assert len(list(read_scores(tmp_path, "prm"))) == 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, "refuses the request: HTTP 404"),
        ({"choices": []}, "0 choices for 1 prompts"),
        ({"choices": [{"index": 0, "logprobs": {"top_logprobs": [{"token_id:1": -1}]}}]},
         "no log-probabilities"),
        ({"choices": [{"index": 0, "logprobs": None}]}, "logprob_token_ids"),
    ],
)  # fmt: skip
def test_unfit_completions(
    fault: Any,
    message: str,
    start: Any,
    reward_folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = start(reward_folders["rlhflow-deepseek"], "completions")
    reward = open_remote(running, "rlhflow-deepseek")
    running.served.faults = [fault]
    with pytest.raises(InputError):
        reward.score_batch([("q", ["s"])])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.2, 0.8]] * 2, "returned 2 rows for 1 step tags"),
        ([[-3.0, 4.0]], "instead of two probabilities"),
        ([[0.1, 0.2, 0.7]], "instead of two probabilities"),
        ("text", "need a list"),
        ([["a", "b"]], "need rows of numbers"),
    ],
)
def test_unfit_pooling(
    rows: Any,
    message: str,
    start: Any,
    reward_folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = start(reward_folders["qwen2.5-math-prm"], "labels")
    reward = open_remote(running, "qwen2.5-math-prm")
    running.served.faults = [{"data": [{"index": 0, "data": rows}]}]
    with pytest.raises(InputError):
        reward.score_batch([("q", ["s"])])
    assert message in capsys.readouterr().err


def test_key_and_limits(
    start: Any, reward_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(reward_folders["rlhflow-deepseek"], "completions")
    monkeypatch.setenv("PRM_KEY", "secret")
    reward = open_remote(running, "rlhflow-deepseek", ",api_key_env=PRM_KEY,max_tokens=200")
    assert reward.backend.max_tokens == 199
    found = reward.score_texts([("q", "s"), ("q", "long " * 100), ("q", "")])
    assert [one.unscored for one in found] == [None, "too_long", "empty"]
    assert running.served.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(reward.facts())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("other,url={url}", "does not serve other but prm"),
        ("prm,url=ftp://x", "url=ftp://x is not accepted"),
        ("prm,url=http://127.0.0.1:9", "tried 6 times"),
    ],
)
def test_bad_server(
    spec: str,
    message: str,
    start: Any,
    reward_folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = start(reward_folders["rlhflow-deepseek"], "completions")
    text = spec.format(url=running.url)
    with pytest.raises(InputError):
        get_reward(f"{text},protocol=rlhflow-deepseek,tokenizer={running.served.folder}")
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
