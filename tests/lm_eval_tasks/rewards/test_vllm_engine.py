"""The vLLM backend against the published loops: one engine for each kind of readout."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracles import ORACLES
from tiny_rewards import QUESTION, SOLUTIONS

from lm_eval_tasks.errors import InputError
from lm_eval_tasks.rewards.reward import Reward, get_reward

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

TOLERANCE = 2e-4
"""Largest allowed difference of a float32 probability between vLLM and transformers."""

PRM = Path(__file__).resolve().parents[3] / "thinkfast" / "prm-tiny"
ENGINE = (
    ",backend=vllm,dtype=float32,max_tokens=600,engine.enforce_eager=true,engine.max_num_seqs=8,"
    "engine.kv_cache_memory_bytes=67108864"
)


@pytest.fixture(params=["rlhflow-deepseek", "qwen2.5-math-prm"], scope="module")
def engine(
    request: pytest.FixtureRequest, reward_folders: dict[str, Path]
) -> Iterator[tuple[str, Reward]]:
    """The same reward on an engine; freed before the next one starts."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    name: str = request.param
    reward = get_reward(f"{reward_folders[name]},protocol={name}{ENGINE}")
    yield name, reward
    reward.close()
    cleanup_dist_env_and_memory()


@pytest.mark.engine
@pytest.mark.slow
def test_scores_are_the_published_ones(
    engine: tuple[str, Reward], reward_folders: dict[str, Path]
) -> None:
    name, reward = engine
    found = reward.score_batch([(QUESTION, steps) for steps in [*SOLUTIONS, []]])
    assert found.pop() == []
    for steps, scores in zip(SOLUTIONS, found, strict=True):
        expected = ORACLES[name](reward_folders[name], QUESTION, steps)
        assert scores == pytest.approx(expected, abs=TOLERANCE)
    again = reward.score_batch([(QUESTION, SOLUTIONS[0])])[0]
    assert again == pytest.approx(found[0], abs=TOLERANCE), "from the prefix cache"
    assert reward.backend.max_tokens in (599, 600)
    (long,) = reward.score_texts([(QUESTION, "word " * 600)])
    assert long.unscored == "too_long"
    assert reward.facts()["resolved"]["dtype"] == "float32"


def test_value_heads_are_refused(
    reward_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"{reward_folders['skywork-o1']},protocol=skywork-o1,backend=vllm"
    with pytest.raises(InputError):
        get_reward(spec)
    error = capsys.readouterr().err
    assert "vLLM has no class" in error
    assert "backend=hf" in error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "prm-tiny: MemoryError; is one of its files damaged, or a Git LFS pointer"),
        (RuntimeError("too little\nmemory"), "prm-tiny: too little\n"),
    ],
)
def test_engine_runs_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    """One of its own goes on for ever after a kill -9 of this process."""
    import vllm

    found = []

    def start(**_: object) -> None:
        found.append(os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING"))
        raise error

    monkeypatch.setattr(vllm, "LLM", start)
    for given in (None, "1"):
        if given is None:
            monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        else:
            monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", given)
        with pytest.raises(InputError):
            get_reward(f"{PRM},backend=vllm")
        assert message in capsys.readouterr().err
    assert found == ["0", "1"], "unless it is asked for"
