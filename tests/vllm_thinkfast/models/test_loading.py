"""Quantised tensors of the fused in_proj of Mamba-1, whose rows go to two layers of vLLM."""

from pathlib import Path

import pytest
import torch

from tests.reference.random_checkpoints import write_checkpoint
from tests.vllm_thinkfast.features.adapted import write_int8
from tests.vllm_thinkfast.models.engines import EnginePool, log_probabilities, random_prompts
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.convert import convert_checkpoint
from vllm_thinkfast.checkpoints.mamba_in_llama import in_proj_rows
from vllm_thinkfast.configs import MambaInLlamaConfig
from vllm_thinkfast.models import loading

PREFIX = "model.layers.0.mamba"
PROMPTS = random_prompts([5, 30, 64], 150, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba-1 hybrid in the house's layout."""
    parent = tmp_path_factory.mktemp("mamba1")
    write_checkpoint(parent / "m1", "m1", seed=11, has_tokenizer=True)
    convert_checkpoint(parent / "m1", parent / "house")
    return parent / "house"


@pytest.fixture(scope="module")
def config(folder: Path) -> MambaInLlamaConfig:
    config = read_config(folder)
    assert isinstance(config, MambaInLlamaConfig)
    return config


def parts(config: MambaInLlamaConfig, tail: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    targets = loading._targets(config, f"{PREFIX}.in_proj.{tail}", tensor, "folder")
    return {name.removeprefix(f"{PREFIX}."): part for name, _, part in targets}


@pytest.mark.parametrize("tail", ["weight_packed", "weight_scale"])
def test_rows_are_split(config: MambaInLlamaConfig, tail: str) -> None:
    rows, rank = sum(in_proj_rows(config).values()), config.time_step_rank
    tensor = torch.arange(2.0 * rows).view(rows, 2)
    found = parts(config, tail, tensor)
    assert torch.equal(found[f"in_proj.{tail}"], tensor[: rows - rank])
    assert torch.equal(found[f"dt_in_proj.{tail}"], tensor[rows - rank :])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_is_that_of_both_layers(
    config: MambaInLlamaConfig, shape: tuple[int, ...]
) -> None:
    scale = torch.full(shape, 0.5)
    found = parts(config, "weight_scale", scale)
    assert found == {"in_proj.weight_scale": scale, "dt_in_proj.weight_scale": scale}


@pytest.mark.parametrize(
    ("tail", "shape"), [("weight_shape", (2,)), ("qweight", (8, 72)), ("weight_scale_inv", (2, 1))]
)
def test_what_cannot_be_split(
    config: MambaInLlamaConfig, tail: str, shape: tuple[int, ...]
) -> None:
    """W4A16, GPTQ and scales of blocks: one line instead of parts that nobody can use."""
    with pytest.raises(ValueError, match=r"^folder: model\.layers\.0\.mamba\.in_proj\.") as caught:
        parts(config, tail, torch.zeros(shape))
    message = str(caught.value)
    assert f"{tail} of shape {shape} cannot be split into in_proj and dt_in_proj" in message
    assert f"the {sum(in_proj_rows(config).values())} rows" in message


@pytest.mark.engine
def test_int8_per_tensor(folder: Path, engines: EnginePool, tmp_path: Path) -> None:
    """As features/test_settings.py::test_int8, with one scale for each weight."""
    write_int8(folder, tmp_path / "int8", tmp_path / "rounded", is_per_tensor=True)
    expected = log_probabilities(engines.get(tmp_path / "rounded"), PROMPTS)
    found = log_probabilities(engines.get(tmp_path / "int8"), PROMPTS)
    for ours, wanted in zip(found, expected, strict=True):
        assert (ours.exp() - wanted.exp()).abs().mean() < 2e-3
