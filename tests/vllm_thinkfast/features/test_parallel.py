"""Several worker processes on one CPU, connected by gloo: same tokens as one process.

One program runs all engines of a model, so that vLLM is imported once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reference.random_checkpoints import write_checkpoint
from tests.vllm_thinkfast.features.conftest import PROMPTS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_TOKENS = 12
MP = {"distributed_executor_backend": "mp"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor": {"tensor_parallel_size": 2, **MP},
    # On CPUs vLLM 0.32 makes the second stage's input buffer while it warms up a compiled model;
    # with enforce_eager the second stage of any model fails with an AssertionError.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"},
        **MP,
    },
}
"""Kind -> options of the engine, which is in the program's own process."""
SEPARATE: dict[str, dict[str, Any]] = {"data": {"data_parallel_size": 2}}
"""The same for engines in processes of their own."""

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def results(family: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Kind -> tokens or error."""
    folder = tmp_path_factory.getbasetemp() / f"{family}-parallel"
    # Every stage of a hybrid needs both kinds of layers.
    is_hybrid = family != "llamba"
    write_checkpoint(
        folder,
        family,
        seed=11,
        config={"num_hidden_layers": 4} if is_hybrid else None,
        mamba_config={"n_layer": 4, "attn_layers": [0, 2]} if is_hybrid else None,
    )
    return {**run(folder, KINDS, in_process=True), **run(folder, SEPARATE, in_process=False)}


def run(folder: Path, kinds: dict[str, dict[str, Any]], *, in_process: bool) -> Results:
    """Kind -> tokens or error, from one program for all of them."""
    cases = [{"folder": str(folder), "options": options} for options in kinds.values()]
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_thinkfast.features.run_parallel"],
        input=json.dumps({"cases": cases, "prompts": PROMPTS, "num_tokens": NUM_TOKENS}),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(kinds), done.stderr[-4000:]
    answers = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    return dict(zip(kinds, answers, strict=True))


def check(results: Results, kind: str) -> None:
    """The kind's tokens are the plain engine's."""
    plain = results["plain"]["tokens"]
    assert len({tuple(tokens) for tokens in plain}) == len(PROMPTS)
    assert results[kind].get("tokens") == plain, results[kind].get("error")


@pytest.mark.feature("tensor parallelism, 2 ranks")
def test_tensor_parallel(results: Results, family: str) -> None:
    check(results, "tensor")


@pytest.mark.feature("pipeline parallelism, 2 stages, compiled")
def test_pipeline_parallel(results: Results, family: str) -> None:
    check(results, "pipeline")


@pytest.mark.feature("data parallelism, 2 engines")
def test_data_parallel(results: Results, family: str) -> None:
    check(results, "data")
