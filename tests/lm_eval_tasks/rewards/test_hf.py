"""The transformers backend against the published loops."""

from pathlib import Path

import pytest
from oracles import ORACLES
from tiny_rewards import QUESTION, SOLUTIONS

from lm_eval_tasks.rewards.reward import Reward, get_reward

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
