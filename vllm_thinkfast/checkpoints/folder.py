"""Weight files of a local folder: names, shapes and tensors, whatever the container.

Containers, in the order vLLM prefers them: safetensors (single, or sharded with an index), then
``pytorch_model.bin`` (single or sharded). ``.bin`` files are pickles and are only ever opened with
``weights_only=True``.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_thinkfast.checkpoints.key_map import CheckpointError
from vllm_thinkfast.configs.fields import printable, shown

_SAFETENSORS_INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"
_SPECIAL_FLOATS = ("Infinity", "-Infinity", "NaN")
_DEEPEST_JSON = 32
_LONGEST_LINE = 400
_FORBIDDEN = re.compile(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)")
"""In torch's message: what a pickle uses beyond tensors."""
# What safetensors raises for types that this torch does not have.
_OF_NO_TENSOR = (SafetensorError, LookupError, ValueError, TypeError, AttributeError)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a malformed file is an error that names it.

    Infinity and NaN may also have the form {"__float__": "Infinity"}, in which transformers saves
    them. Stricter than ``json``: of two equal keys the last would win, and values nested without
    end would stop whatever walks through them later.
    """

    def checked(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: {shown(twice)} occurs twice; remove one.")
        special = found.get("__float__")
        if len(found) == 1 and special in _SPECIAL_FLOATS:
            return float(special)
        return found

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=checked)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: not a readable JSON file: nested too deeply.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    level: list[Any] = [value]
    for _ in range(_DEEPEST_JSON):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    if level:
        raise CheckpointError(f"{path}: values are nested deeper than {_DEEPEST_JSON} levels.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights; empty if there are none.

    Raises:
        CheckpointError: an index names a file that is not there, or outside of the folder.
    """
    for index, pattern in (
        (_SAFETENSORS_INDEX, "*.safetensors"),
        (_BIN_INDEX, "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            files = [folder / name for name in sorted(set(weight_map(folder / index).values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent or not files:
                raise CheckpointError(
                    f"{folder / index}: names {shown(absent) if absent else 'no file'}, which the "
                    "folder lacks; download the checkpoint again."
                )
            return files
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file of an index; only files beside the index, of the index's kind."""
    found = read_json(index).get("weight_map")
    suffix = ".safetensors" if index.name == _SAFETENSORS_INDEX else ".bin"
    if not isinstance(found, dict):
        raise CheckpointError(f"{index}: weight_map={shown(found)} must be an object {{...}}.")
    for tensor, file in found.items():
        is_name = isinstance(file, str) and Path(file).name == file and "\0" not in file
        if not is_name or not file.endswith(suffix):
            raise CheckpointError(
                f"{index}: {shown(tensor)} is in {shown(file)}; accepted: the name of a {suffix} "
                "file in the same folder."
            )
    return found


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in the folder, from headers alone where the container has one."""
    files = weight_files(folder)
    if not files:
        return []
    is_safetensors = files[0].suffix == ".safetensors"
    index = folder / (_SAFETENSORS_INDEX if is_safetensors else _BIN_INDEX)
    if index.is_file():
        return sorted(weight_map(index))
    names: list[str] = []
    for file in files:
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
                    try:
                        tensor = opened.get_tensor(name)
                    except _OF_NO_TENSOR as error:
                        raise CheckpointError(
                            f"{file}: tensor {shown(name)} cannot be read: {_first_line(error)}"
                        ) from error
                    yield name, tensor
        else:
            yield from _load_bin(file).items()


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file: {_first_line(error)}"
        ) from error


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 are no zip archive and cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises anything on damaged bytes
        raise CheckpointError(
            f"{file}: not a readable weight file: {_first_line(error)}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a state dict, found {type(state).__name__}.")
    other = [shown(name) for name, value in state.items() if not _is_plain(name, value)]
    if other:
        raise CheckpointError(f"{file}: entries that are no tensors: {', '.join(other[:12])}.")
    return state


def _is_plain(name: Any, value: Any) -> bool:
    """Whether an entry of a state dict is a name with a tensor that holds its numbers itself."""
    is_tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return isinstance(name, str) and is_tensor and not value.is_meta


def _first_line(error: BaseException) -> str:
    """What went wrong, in one printable line.

    torch says how a pickle that calls functions could be executed all the same; that is left out.
    """
    text = str(error)
    forbidden = _FORBIDDEN.search(text)
    if forbidden:
        return (
            f"it would call {printable(forbidden[1])} when it is opened, and only tensors are read "
            "from such a file; get the weights as safetensors."
        )
    if "weights_only" in text:
        return "no state dict as torch.save writes it; get the file again, or as safetensors."
    line = next(iter(text.splitlines()), "") or type(error).__name__
    line = line[:_LONGEST_LINE]
    return line if line.isprintable() else repr(line)
