"""``vllm serve`` on a published folder, spoken to with the official ``openai`` client."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reference.random_checkpoints import write_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "tiny"
START_S = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a server for a published M1 folder with a chat template."""
    tmp_path = tmp_path_factory.mktemp("serve")
    folder = write_checkpoint(tmp_path / "ckpt", "m1", seed=1, has_tokenizer=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(folder),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *("--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**27)),
    ]
    log = tmp_path / "server.log"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # a user's server has its engine process
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        try:
            wait_until_ready(port, process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Polls /health; shows the log's end when the server dies or does not come up."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    """The official client."""
    from openai import OpenAI

    return OpenAI(base_url=server, api_key="unused")


def test_streamed_chat(client: Any) -> None:
    """The pieces of a streamed answer are the answer given at once."""
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "one two three"}],
        "max_tokens": 24,
        # Sampled: the greedy answer of random weights can be empty.
        "temperature": 1.0,
        "seed": 5,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**request)
    pieces = list(client.chat.completions.create(**request, stream=True))
    streamed = "".join(c.choices[0].delta.content or "" for c in pieces if c.choices)
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    assert len([c for c in pieces if c.choices and c.choices[0].delta.content]) > 1
    assert streamed == whole.choices[0].message.content
    assert streamed


def test_several_samples(client: Any) -> None:
    """n > 1 gives n different samples; the same seed gives the same ones again."""
    request = {
        "model": MODEL,
        "prompt": "one two",
        "n": 4,
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 5,
    }
    first = [choice.text for choice in client.completions.create(**request).choices]
    again = [choice.text for choice in client.completions.create(**request).choices]
    assert len(set(first)) == 4
    assert first == again


def test_stop_string(client: Any) -> None:
    """Generation ends before a stop string that occurs in the unstopped text."""
    request = {"model": MODEL, "prompt": "one two", "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**request).choices[0].text
    words = text.split()
    stop = words[len(words) // 2]
    choice = client.completions.create(**request, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == text[: text.index(stop)]


def test_log_probabilities(client: Any) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="one two", max_tokens=4, temperature=0, logprobs=3
    ).choices[0]
    assert len(choice.logprobs.token_logprobs) == 4
    for chosen, top in zip(
        choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert chosen == pytest.approx(max(top.values()))


def test_unknown_model(client: Any) -> None:
    from openai import NotFoundError

    with pytest.raises(NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x", max_tokens=1)
