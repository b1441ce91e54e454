"""Strict reading: every published layout gives the model's tensors, anything else an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.random_checkpoints import VARIANTS, write_checkpoint
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.folder import read_folder, tensor_names
from vllm_thinkfast.checkpoints.key_map import CheckpointError, write_tensors
from vllm_thinkfast.checkpoints.reader import house_shapes, house_tensors, key_map

FORMATS = ("llamba", "mambainllama_mamba1", "mambainllama_mamba2", "m1")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder under the house's names."""
    return dict(house_tensors(read_config(folder), read_folder(folder), source=str(folder)))


def change_weights(folder: Path, change: Any) -> None:
    """Applies ``change`` to the dict of a folder's tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_is_complete(name: str, tmp_path: Path) -> None:
    fmt, options = VARIANTS[name]
    folder = write_checkpoint(tmp_path / "ckpt", fmt, **options)
    config = read_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in read(folder).items()}
    expected = house_shapes(config)
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert shapes == expected


@pytest.mark.parametrize("fmt", FORMATS)
def test_written_back(fmt: str, tmp_path: Path) -> None:
    """The key map works in both directions: published -> house -> published."""
    folder = write_checkpoint(tmp_path / "ckpt", fmt)
    config = read_config(folder)
    published = dict(read_folder(folder))
    back = dict(write_tensors(key_map(config), house_shapes(config), read(folder)))
    if config.tie_word_embeddings:
        published.pop("lm_head.weight", None)
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("fmt", FORMATS)
def test_missing(fmt: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", fmt)
    victim = next(name for name in tensor_names(folder) if "conv1d.weight" in name)
    change_weights(folder, lambda tensors: tensors.pop(victim))
    with pytest.raises(CheckpointError, match=rf"missing: {victim} \["):
        read(folder)


@pytest.mark.parametrize("fmt", FORMATS)
def test_surplus(fmt: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", fmt)
    prefix = "backbone" if fmt == "llamba" else "model"
    name = f"{prefix}.layers.0.mixer.dt_bias" if fmt == "llamba" else f"{prefix}.layers.0.extra"
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=rf"surplus: {name} \[3\]"):
        read(folder)


@pytest.mark.parametrize("fmt", FORMATS)
def test_wrong_shape(fmt: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", fmt)
    victim = next(name for name in tensor_names(folder) if "out_proj.weight" in name)
    change_weights(folder, lambda tensors: tensors.update({victim: torch.zeros(7, 5)}))
    with pytest.raises(CheckpointError, match=rf"{victim}: expected \[.*\], found \[7, 5\]"):
        read(folder)


def test_integer_weights(tmp_path: Path) -> None:
    """Quantised weights without a quantization_config are not read as numbers."""
    folder = write_checkpoint(tmp_path / "ckpt", "llamba")
    name = tensor_names(folder)[0]
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"not floating point.*int8"):
        read(folder)


def test_no_mixer(tmp_path: Path) -> None:
    """mamba_config.json beside a plain Llama's weights."""
    folder = write_checkpoint(tmp_path / "ckpt", "mambainllama_mamba1")
    change_weights(folder, lambda t: [t.pop(name) for name in list(t) if ".mamba." in name])
    with pytest.raises(CheckpointError, match=r"remove mamba_config\.json"):
        read(folder)


def test_mistral_defaults(tmp_path: Path) -> None:
    """What a Mistral's config.json leaves out means Mistral's default, not Llama's."""
    folder = write_checkpoint(tmp_path / "ckpt", "mambainllama_mamba1")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mistral"
    config.pop("sliding_window", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder).sliding_window == 4096


def test_buffers_of_old_transformers(tmp_path: Path) -> None:
    """RoPE tables that old Llama checkpoints carry are no weights."""
    folder = write_checkpoint(tmp_path / "ckpt", "mambainllama_mamba1")
    expected = read(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert read(folder).keys() == expected.keys()


def test_null_fields(tmp_path: Path) -> None:
    """null in config.json is the base class's default, as transformers reads it."""
    folder = write_checkpoint(tmp_path / "ckpt", "mambainllama_mamba1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "attention_bias": None, "mlp_bias": None, "rope_scaling": None})
    )
    assert not read_config(folder).attention_bias


def test_tied_head_of_other_precision(tmp_path: Path) -> None:
    """A head that is the rounded embedding is the same head."""
    folder = write_checkpoint(tmp_path / "ckpt", "mambainllama_mamba1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    head = embedding.to(torch.bfloat16)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert torch.equal(read(folder)["model.embed_tokens.weight"], embedding)


def test_tied_head_that_differs(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "ckpt", "mambainllama_mamba2", config={"tie_word_embeddings": True}
    )

    def train_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.ones_like(tensors["model.embed_tokens.weight"])

    change_weights(folder, train_head)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        read(folder)


@pytest.mark.parametrize(
    ("embedding", "norm", "prefix", "head"),
    [
        ("model.embedding", "model.final_layernorm", "model", "lm_head"),
        ("model.embed_tokens", "model.norm", "model", "lm_head"),
        ("backbone.embedding", "backbone.final_layernorm", "backbone", "backbone.lm_head"),
    ],
)
def test_llamba_layouts(embedding: str, norm: str, prefix: str, head: str, tmp_path: Path) -> None:
    """The same tensors under the other names that were seen."""
    folder = write_checkpoint(tmp_path / "ckpt", "llamba", config={"tie_embeddings": False})
    before = read(folder)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = (
                name.replace("backbone.embedding", embedding)
                .replace("backbone.final_layernorm", norm)
                .replace("backbone.layers", f"{prefix}.layers")
            )
            if new.startswith("lm_head"):
                new = head + new.removeprefix("lm_head")
            tensors[new] = tensors.pop(name)

    change_weights(folder, rename)
    after = read(folder)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_plain_llama_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"model_type='llama' without mamba_config\.json"):
        read_config(tmp_path)


def test_unknown_mixer_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", "m1")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".mamba.in_proj" in n]:
            tensors[name.replace("in_proj", "strange_proj")] = tensors.pop(name)

    change_weights(folder, rename)
    with pytest.raises(CheckpointError, match=r"no known layout fits the weights.*strange_proj"):
        read_config(folder)


@pytest.mark.parametrize("file", ["config.json", "mamba_config.json"])
def test_malformed_json(file: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", "m1")
    (folder / file).write_text('{"hidden_size": ')
    with pytest.raises(CheckpointError, match=f"{file}: not a readable JSON file"):
        read_config(folder)


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    """A .bin file is a pickle; one that would run code is never executed."""
    folder = write_checkpoint(tmp_path / "ckpt", "m1")
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a readable weight file"):
        read_config(folder)
    assert not marker.exists()


def test_truncated_safetensors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", "llamba")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read(folder)


def test_index_names_absent_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", "llamba", container="sharded_safetensors")
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="which the folder lacks"):
        read(folder)
