"""Weight files of a local folder: names, shapes and tensors, whatever the container.

Containers, in the order vLLM prefers them: safetensors (single, or sharded with an index), then
``pytorch_model.bin`` (single or sharded). ``.bin`` files are pickles and are only ever opened with
``weights_only=True``.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_thinkfast.checkpoints.key_map import CheckpointError

_SAFETENSORS_INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"
# What torch's unpickler raises on bytes that are no pickle at all.
_OF_NO_PICKLE = (LookupError, ValueError, TypeError, AttributeError)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a malformed file is an error that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights; empty if there are none.

    Raises:
        CheckpointError: an index names a file that is not there.
    """
    for index, pattern in (
        (_SAFETENSORS_INDEX, "*.safetensors"),
        (_BIN_INDEX, "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            named = read_json(folder / index).get("weight_map", {})
            files = sorted({folder / name for name in named.values()})
            absent = [file.name for file in files if not file.is_file()]
            if absent or not files:
                raise CheckpointError(
                    f"{folder / index}: names {absent or 'no file'}, which the folder lacks; "
                    "download the checkpoint again."
                )
            return files
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in the folder, from headers alone where the container has one."""
    for index in (_SAFETENSORS_INDEX, _BIN_INDEX):
        if (folder / index).is_file() and weight_files(folder):
            return sorted(read_json(folder / index).get("weight_map", {}))
        if weight_files(folder)[:1] and weight_files(folder)[0].suffix == ".safetensors":
            break
    names: list[str] = []
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as opened:
                names.extend(opened.keys())
        else:
            names.extend(_load_bin(file))
    return sorted(names)


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of every weight file; memory-mapped where the container allows it."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    yield name, opened.get_tensor(name)
        else:
            yield from _load_bin(file).items()


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 are no zip archive and cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, *_OF_NO_PICKLE) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: not a readable weight file: {first_line}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a state dict, found {type(state).__name__}.")
    other = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise CheckpointError(f"{file}: entries that are no tensors: {', '.join(other[:12])}.")
    return state
