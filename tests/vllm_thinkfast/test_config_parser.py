"""Hub names: what the cache knows is not asked, and a missing network never stops other models."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.reference.random_checkpoints import write_checkpoint
from vllm_thinkfast import plugin

pytestmark = pytest.mark.engine

COMMIT = "0" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a folder into an empty hub cache under a repository's name."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def put(folder: Path, repository: str) -> str:
        home = cache / ("models--" + repository.replace("/", "--"))
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(COMMIT)
        shutil.copytree(folder, home / "snapshots" / COMMIT)
        return repository

    return put


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever asks the hub gets a connection error; the list holds what was asked."""
    from vllm_thinkfast import config_parser

    asked: list[str] = []

    def fail(repository: str, *_: object, **__: object) -> None:
        asked.append(repository)
        raise httpx.ConnectError("no network")

    for name in ("file_exists", "file_or_path_exists", "get_safetensors_metadata"):
        monkeypatch.setattr(config_parser, name, fail)
    return asked


def parse(model: str) -> Any:
    """The configuration that vLLM gets for a model's name."""
    from vllm.transformers_utils.config import get_config_parser

    plugin.register()
    return get_config_parser("hf").parse(model, trust_remote_code=False)[1]


@pytest.mark.parametrize("fmt", ["mambainllama_mamba1", "mambainllama_mamba2", "m1"])
def test_cached_repository(fmt: str, cached: Any, no_network: list[str], tmp_path: Path) -> None:
    """A repository that is in the cache needs no network."""
    name = cached(write_checkpoint(tmp_path / "ckpt", fmt), f"someone/{fmt}")
    assert parse(name).weight_layout == fmt
    assert not no_network


def test_other_model_types_are_not_asked_for(
    cached: Any, no_network: list[str], tmp_path: Path
) -> None:
    """The hub is not troubled about models that cannot be MambaInLlama."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert parse(cached(folder, "someone/gpt2")).model_type == "gpt2"
    assert not no_network


def test_plain_llama_without_network(
    cached: Any, no_network: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cached Llama starts without network as before, with a line about what was not checked."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    assert parse(cached(folder, "someone/llama")).model_type == "llama"
    assert no_network == ["someone/llama"]
    assert "cannot be asked for mamba_config.json (ConnectError)" in caplog.text


def test_weights_not_cached_without_network(
    cached: Any, no_network: list[str], tmp_path: Path
) -> None:
    """Config files alone do not tell MambaInLlama from M1."""
    folder = write_checkpoint(tmp_path / "ckpt", "m1")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"could not be read from the hub \(ConnectError\)"):
        parse(cached(folder, "someone/m1"))
    assert no_network
