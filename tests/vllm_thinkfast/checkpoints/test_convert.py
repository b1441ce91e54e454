"""``thinkfast convert``: complete, idempotent, and never half done."""

import json
from pathlib import Path

import pytest
import torch

from tests.reference.random_checkpoints import write_checkpoint
from vllm_thinkfast.checkpoints import convert
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.convert import convert_checkpoint
from vllm_thinkfast.checkpoints.folder import read_folder
from vllm_thinkfast.checkpoints.key_map import CheckpointError
from vllm_thinkfast.checkpoints.reader import house_tensors

FORMATS = ("llamba", "mambainllama_mamba1", "mambainllama_mamba2", "m1")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder under the house's names."""
    return dict(house_tensors(read_config(folder), read_folder(folder), source=str(folder)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_same_model(fmt: str, tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", fmt)
    report = convert_checkpoint(src, tmp_path / "dst", max_shard_bytes=200_000)
    before, after = tensors_of(src), tensors_of(tmp_path / "dst")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((tmp_path / "dst").glob("model-*.safetensors"))) > 1
    assert report.num_tensors == len(after)
    assert not (tmp_path / "dst" / "mamba_config.json").exists()
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    expected = "LlambaForCausalLM" if fmt == "llamba" else "MambaInLlamaForCausalLM"
    assert config["architectures"] == [expected]
    assert config["dtype"] == "float32"


def test_idempotent(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", "m1")
    assert not convert_checkpoint(src, tmp_path / "dst").was_done_before
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "dst").iterdir()}
    assert convert_checkpoint(src, tmp_path / "dst").was_done_before
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "dst").iterdir()} == files


def test_converted_again(tmp_path: Path) -> None:
    """A converted folder is a valid source and gives the same files."""
    src = write_checkpoint(tmp_path / "src", "mambainllama_mamba1")
    convert_checkpoint(src, tmp_path / "one")
    convert_checkpoint(tmp_path / "one", tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_destination_in_the_way(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", "m1")
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "config.json").write_text("{}")  # some other model
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert_checkpoint(src, dst)
    assert (dst / "config.json").read_text() == "{}"
    convert_checkpoint(src, dst, overwrite=True)
    assert (dst / "model.safetensors").is_file()


def test_weights_are_as_readable_as_the_rest(tmp_path: Path) -> None:
    """A server often runs as another user than the one who converted."""
    dst = tmp_path / "dst"
    convert_checkpoint(write_checkpoint(tmp_path / "src", "m1"), dst)
    modes = {file.name: file.stat().st_mode & 0o777 for file in dst.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    """--overwrite does not delete a folder that never was a model, a home folder for example."""
    src = write_checkpoint(tmp_path / "src", "m1")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="replaces model folders only"):
        convert_checkpoint(src, tmp_path / "dst", overwrite=True)
    assert (tmp_path / "dst" / "precious.txt").read_text() == "keep"


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_checkpoint(tmp_path / "src", "m1")

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(src, tmp_path / "dst")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_no_weights(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", "llamba")
    (src / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        convert_checkpoint(src, tmp_path / "dst")


def test_other_files_come_along(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", "m1")
    (src / "tokenizer_config.json").write_text("{}")
    convert_checkpoint(src, tmp_path / "dst")
    assert (tmp_path / "dst" / "tokenizer_config.json").read_text() == "{}"
