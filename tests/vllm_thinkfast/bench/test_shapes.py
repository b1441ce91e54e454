"""Presets: equal parameter counts, counted independently of the formulas."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_thinkfast.bench import shapes
from vllm_thinkfast.checkpoints.config_reader import read_config

PUBLISHED = {"135m": 134_515_008, "1b": 1_235_814_400, "3b": 3_212_749_824}
"""SmolLM2-135M, Llama-3.2-1B, Llama-3.2-3B."""


@pytest.mark.parametrize("preset", shapes.PRESETS)
def test_llama_count(preset: str) -> None:
    shape = shapes.PRESETS[preset]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shapes.llama_config(shape)))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == shapes.num_llama_parameters(shape)
    assert count == PUBLISHED.get(preset, count)


@pytest.mark.parametrize("family", ["llamba", "mambainllama"])
@pytest.mark.parametrize("preset", shapes.PRESETS)
def test_matched_count(preset: str, family: str, tmp_path: Path) -> None:
    """Within half of what one step of the MLP's width changes."""
    shape = shapes.PRESETS[preset]
    config = read_config(shapes.write_folder(tmp_path / "model", family, preset))
    step = 3 * shape.hidden_size * shapes.MLP_MULTIPLE * shape.num_hidden_layers
    wanted = shapes.num_llama_parameters(shape)
    assert abs(shapes.num_parameters(config) - wanted) <= step / 2
    assert config.hidden_size == shape.hidden_size
    assert config.tie_word_embeddings


def test_published_sizes_of_3b(tmp_path: Path) -> None:
    """States as in the published 3B checkpoints."""
    llamba = read_config(shapes.write_folder(tmp_path / "a", "llamba", "3b"))
    assert (llamba.num_heads, llamba.head_dim, llamba.ssm_state_size) == (32, 96, 64)
    hybrid = read_config(shapes.write_folder(tmp_path / "b", "mambainllama", "3b"))
    assert (hybrid.mamba_num_heads, hybrid.mamba_n_groups, hybrid.ssm_state_size) == (192, 64, 16)
    assert list(hybrid.attention_layers) == [3, 8, 13, 18, 23, 27]


def test_mamba2_has_the_mixers_of_llamba() -> None:
    shape = shapes.PRESETS["30m"]
    native, ours = shapes.mamba2_config(shape), shapes.llamba_config(shape)
    assert native["num_heads"] == ours["num_heads"]
    assert native["n_groups"] == ours["n_groups"]
    assert native["state_size"] == ours["ssm_state_size"]
    assert native["num_heads"] * native["head_dim"] == shape.hidden_size
