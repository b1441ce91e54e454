"""``thinkfast convert``: complete, idempotent, and never half done."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.reference.random_checkpoints import write_checkpoint, write_tokenizer
from vllm_thinkfast import cli
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


# --overwrite


class Stop:
    """Raises in place of the call of ``os`` or ``shutil`` whose first argument is ``path``."""

    def __init__(self, call: Any, path: Path, error: BaseException) -> None:
        self.call, self.path, self.error = call, path, error

    def __call__(self, path: Path, *more: Any, **named: Any) -> Any:
        if Path(path) == self.path:
            raise self.error
        return self.call(path, *more, **named)


@pytest.fixture
def replacing(tmp_path: Path) -> tuple[Path, Path]:
    """A source, and a destination that holds another model."""
    dst = tmp_path / "dst"
    convert_checkpoint(write_checkpoint(tmp_path / "old", "m1"), dst)
    return write_checkpoint(tmp_path / "new", "llamba"), dst


def model_type(folder: Path) -> str:
    """Reads all tensors, too: a folder that lacks some is an error."""
    assert tensors_of(folder)
    return str(json.loads((folder / "config.json").read_text())["model_type"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_overwrite_stopped_while_deleting(
    error: BaseException,
    replacing: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src, dst = replacing
    is_written = False
    rmtree = shutil.rmtree

    def fail_half_way(path: Path, *more: Any, **named: Any) -> None:
        """Deleting the old folder takes some files and then fails, every time."""
        if is_written and (Path(path) / "config.json").is_file():
            (Path(path) / "model.safetensors").unlink(missing_ok=True)
            raise error
        rmtree(path, *more, **named)

    def save(*arguments: Any, **named: Any) -> None:
        nonlocal is_written
        is_written = True
        save_file(*arguments, **named)

    monkeypatch.setattr(convert, "save_file", save)
    monkeypatch.setattr(shutil, "rmtree", fail_half_way)
    with pytest.raises(type(error)):
        convert_checkpoint(src, dst, overwrite=True)
    assert model_type(dst) == "llamba"
    monkeypatch.undo()
    assert convert_checkpoint(src, dst).was_done_before
    convert_checkpoint(src, dst, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "new", "old"]


@pytest.mark.parametrize("which", ["dst", ".dst.partial"])
def test_overwrite_that_cannot_rename(
    which: str, replacing: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is where it was."""
    src, dst = replacing
    stop = Stop(os.replace, tmp_path / which, OSError(16, "Device or resource busy"))
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="busy"):
        convert_checkpoint(src, dst, overwrite=True)
    assert model_type(dst) == "mambainllama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "new", "old"]


def test_overwrite_killed_between_renames(replacing: tuple[Path, Path], tmp_path: Path) -> None:
    """The next run finds the old folder again and does not replace it unasked."""
    src, dst = replacing
    dst.rename(tmp_path / ".dst.replaced")
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert_checkpoint(src, dst)
    assert model_type(dst) == "mambainllama"
    convert_checkpoint(src, dst, overwrite=True)
    assert model_type(dst) == "llamba"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "new", "old"]


def test_overwrite_killed_before_deleting(replacing: tuple[Path, Path], tmp_path: Path) -> None:
    src, dst = replacing
    convert_checkpoint(src, dst, overwrite=True)
    shutil.copytree(tmp_path / "old", tmp_path / ".dst.replaced")
    assert convert_checkpoint(src, dst).was_done_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "new", "old"]


# --tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer folder without a chat template."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, 160)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("changed", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_tokenizer_changed(changed: str, tokenizer: Path, tmp_path: Path) -> None:
    src, dst = write_checkpoint(tmp_path / "src", "llamba"), tmp_path / "dst"
    (tokenizer / changed).parent.mkdir(exist_ok=True)
    (tokenizer / changed).write_text("{{ messages }}")
    convert_checkpoint(src, dst, tokenizer=str(tokenizer))
    assert convert_checkpoint(src, dst, tokenizer=str(tokenizer)).was_done_before
    (tokenizer / changed).write_text("{{ messages[0] }}")
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert_checkpoint(src, dst, tokenizer=str(tokenizer))
    convert_checkpoint(src, dst, tokenizer=str(tokenizer), overwrite=True)
    assert (dst / changed).read_text() == "{{ messages[0] }}"


def test_tokenizer_is_named_by_its_path(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = write_checkpoint(tmp_path / "src", "llamba"), tmp_path / "dst"
    convert_checkpoint(src, dst, tokenizer=str(tokenizer))
    monkeypatch.chdir(tmp_path)
    assert convert_checkpoint(src, dst, tokenizer="./tokenizer").was_done_before


def test_tokenizer_lost(tokenizer: Path, tmp_path: Path) -> None:
    src, dst = write_checkpoint(tmp_path / "src", "llamba"), tmp_path / "dst"
    convert_checkpoint(src, dst, tokenizer=str(tokenizer))
    (dst / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert_checkpoint(src, dst, tokenizer=str(tokenizer))


@pytest.mark.parametrize("files", [None, 3, [3], {"a": 1}, ["\0"]])
def test_record_of_other_files(files: Any, tmp_path: Path) -> None:
    """Records without a list of files are older ones and stay valid; spoilt ones do not."""
    src, dst = write_checkpoint(tmp_path / "src", "llamba"), tmp_path / "dst"
    convert_checkpoint(src, dst)
    record = json.loads((dst / convert.RECORD).read_text())
    del record["files"]
    if files is not None:
        record["files"] = files
    (dst / convert.RECORD).write_text(json.dumps(record))
    if files is None:
        assert convert_checkpoint(src, dst).was_done_before
    else:
        with pytest.raises(CheckpointError, match="--overwrite"):
            convert_checkpoint(src, dst)


def test_tokenizer_replaces_that_of_the_source(tokenizer: Path, tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", "mambainllama_mamba1", has_tokenizer=True)
    of_tokenizer = (
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.model",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    )
    others = ("generation_config.json", "LICENSE", "README.md")
    for name in (*of_tokenizer, *others):
        (src / name).write_text("{}")
    convert_checkpoint(src, tmp_path / "dst", tokenizer=str(tokenizer))
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert not names & set(of_tokenizer)
    assert {"tokenizer.json", "tokenizer_config.json", *others} <= names
    settings = json.loads((tmp_path / "dst" / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings
    convert_checkpoint(src, tmp_path / "plain")
    assert {*of_tokenizer, *others} <= {path.name for path in (tmp_path / "plain").iterdir()}


@pytest.fixture
def refuse(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[], None]:
    """Converts: the command ends in one line, before any weight is written."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were written")

    def run() -> None:
        src = write_checkpoint(tmp_path / "src", "llamba")
        monkeypatch.setattr(convert, "save_file", never)
        capsys.readouterr()
        arguments = ["convert", str(src), str(tmp_path / "dst"), "--tokenizer", str(tokenizer)]
        assert cli.main(arguments) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert line.startswith(f"thinkfast convert: --tokenizer {tokenizer}: cannot be loaded: ")
        assert "give a folder with tokenizer files or a hub name" in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["src", "tokenizer"]

    return run


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "New"}}'),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_tokenizer_that_cannot_be_read(
    file: str, text: str, tokenizer: Path, refuse: Callable[[], None]
) -> None:
    (tokenizer / file).write_text(text)
    refuse()


def test_tokenizer_error_without_a_message(
    monkeypatch: pytest.MonkeyPatch, refuse: Callable[[], None]
) -> None:
    from transformers import AutoTokenizer

    def fail(_: str) -> None:
        raise ValueError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    refuse()
