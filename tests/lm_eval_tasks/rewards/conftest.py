"""Tiny reward models, made once, and helper modules made importable under every import mode."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[3] / "distill"))  # where it is not installed

import tiny_rewards


@pytest.fixture(scope="session")
def reward_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models with the architecture and tokenizer layout of each published one."""
    root = tmp_path_factory.mktemp("rewards")
    return {name: build(root / name) for name, build in tiny_rewards.BUILDERS.items()}
