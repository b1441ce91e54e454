"""Engine fixtures."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.reference.random_checkpoints import write_checkpoint
from tests.vllm_thinkfast.models.engines import EnginePool

GOLDEN = Path(os.environ.get("THINKFAST_FIXTURES", Path(__file__).parents[2] / "golden"))
"""Folder of golden checkpoints: NAME/ckpt and NAME/golden.safetensors; see its README."""


def golden_names() -> list[str]:
    """Names of the golden checkpoints; empty where the folder does not exist."""
    return sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))


@dataclass(frozen=True)
class Golden:
    """A tiny checkpoint with the logits and greedy tokens of the published code."""

    name: str
    folder: Path
    tensors: dict[str, torch.Tensor]

    @property
    def inputs(self) -> list[tuple[list[int], torch.Tensor]]:
        """(token ids, logits [L, V]) of every sequence."""
        found = []
        for key in sorted(k for k in self.tensors if k.startswith("input_ids_")):
            logits = self.tensors[key.replace("input_ids", "logits")]
            found += [(row.tolist(), logits[i]) for i, row in enumerate(self.tensors[key])]
        return found


@pytest.fixture(scope="session")
def engines() -> Iterator[EnginePool]:
    """One engine at a time for the whole session."""
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.fixture(scope="session", params=golden_names() or ["absent"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden checkpoint in turn."""
    if request.param == "absent":
        pytest.skip(f"no golden checkpoints in {GOLDEN}")
    folder = GOLDEN / request.param
    return Golden(request.param, folder / "ckpt", load_file(folder / "golden.safetensors"))


FAMILIES = ("llamba", "mambainllama_mamba1", "mambainllama_mamba2", "m1")


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of each published format, made by the suite itself."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(folder / "ckpt", request.param, seed=11)
