"""The transformers backend against the published loops."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from oracles import ORACLES
from tiny_rewards import QUESTION, SOLUTIONS

from lm_eval_tasks.errors import InputError
from lm_eval_tasks.rewards.reward import Reward, get_reward

PRM = Path(__file__).resolve().parents[3] / "thinkfast" / "prm-tiny"
TOLERANCE = 2e-5
"""Largest allowed difference of a float32 probability."""


def open_reward(folder: Path, settings: str = "") -> Reward:
    """The reward of a folder of `reward_folders`; its name says the protocol."""
    protocol = "rlhflow-deepseek" if folder.name == "rlhflow-chatml" else folder.name
    chosen = "" if folder.name == "prm-tiny" else f",protocol={protocol}"
    return get_reward(f"{folder}{chosen}{settings}")


def assert_scores(found: list[float], expected: list[float], tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", list(ORACLES))
def test_scores_are_the_published_ones(name: str, reward_folders: dict[str, Path]) -> None:
    folder = reward_folders[name]
    solutions = SOLUTIONS
    if name == "skywork-o1":  # its steps are lines
        solutions = [[line for step in steps for line in step.split("\n")] for steps in SOLUTIONS]
    expected = [ORACLES[name](folder, QUESTION, steps) for steps in solutions]
    flat = [score for scores in expected for score in scores]
    assert max(flat) - min(flat) > 0.2, "an oracle that always says the same tests nothing"
    reward = open_reward(folder)
    found = reward.score_batch([(QUESTION, steps) for steps in solutions])
    for one, other in zip(found, expected, strict=True):
        assert_scores(one, other)


@pytest.mark.parametrize(
    ("name", "share", "text", "message"),
    [
        ("model.safetensors", 0.0, "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.safetensors", 0.5, "", "is one of its files damaged"),
        ("tokenizer.json", 0.0, "{}", "cannot load the tokenizer of the reward model"),
        ("tokenizer.json", 0.5, "", "cannot load the tokenizer of the reward model"),
        ("config.json", 0.5, "", "cannot load the"),
    ],
)
def test_damaged_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    share: float,
    text: str,
    message: str,
) -> None:
    folder = tmp_path / "prm-tiny"
    shutil.copytree(PRM, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)] + text.encode())
    with pytest.raises(InputError):
        get_reward(str(folder))
    (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert message in error
    assert str(folder) in error


def test_device_without_enough_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", refuse)
    with pytest.raises(InputError):
        get_reward(str(PRM))
    assert f"cannot load the reward model {PRM}: CUDA out of memory" in capsys.readouterr().err
