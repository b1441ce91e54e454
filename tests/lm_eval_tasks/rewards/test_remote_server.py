"""``backend=remote`` against a real ``vllm serve``; test_remote.py has odd answers and faults."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracles import ORACLES
from tiny_rewards import QUESTION, SOLUTIONS, qwen_tokenizer

from lm_eval_tasks.rewards.reward import Reward, get_reward

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NAME = "qwen2.5-math-prm"
TOLERANCE = 2e-4
"""Largest allowed difference of a float32 probability between vLLM and transformers."""


@pytest.fixture(scope="module")
def reward(
    reward_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reward]:
    """The process reward model behind ``/pooling``, served as the module docstring says."""
    from tests.vllm_thinkfast.models.test_serving import wait_until_ready

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tag = qwen_tokenizer().convert_tokens_to_ids("<extra_0>")
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(reward_folders[NAME])),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "prm"),
        *("--runner", "pooling", "--pooler-config", f'{{"step_tag_id": {tag}}}'),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "600"),
        *("--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**26)),
    ]
    log = tmp_path_factory.mktemp("serve") / "server.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            wait_until_ready(port, process, log)
            yield get_reward(
                f"prm,protocol={NAME},url=http://127.0.0.1:{port},tokenizer={reward_folders[NAME]}"
            )
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_scores_are_the_published_ones(reward: Reward, reward_folders: dict[str, Path]) -> None:
    found = reward.score_batch([(QUESTION, steps) for steps in SOLUTIONS])
    for steps, scores in zip(SOLUTIONS, found, strict=True):
        expected = ORACLES[NAME](reward_folders[NAME], QUESTION, steps)
        assert scores == pytest.approx(expected, abs=TOLERANCE)
    (long,) = reward.score_texts([(QUESTION, "word " * 600)])
    assert long.unscored == "too_long"


def test_tags_in_the_text(reward: Reward, reward_folders: dict[str, Path]) -> None:
    """A step that contains the tag makes more tags than steps."""
    steps = ["a <extra_0> b", "c"]
    every = ORACLES[NAME](reward_folders[NAME], QUESTION, steps)
    (scores,) = reward.score_batch([(QUESTION, steps)])
    assert scores == pytest.approx(every[1:], abs=TOLERANCE)
