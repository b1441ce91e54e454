"""``thinkfast convert``: one modern Hugging Face folder from any published one.

The result holds everything in one ``config.json`` (architecture of this plugin), safetensors under
the house's names, and the tokenizer and generation files as they were. Serving it needs neither
mamba_config.json nor any detection. It is written beside the destination and renamed at the end, so
a killed run leaves nothing that looks finished. What it replaces is renamed aside and deleted last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_thinkfast import __version__
from vllm_thinkfast.checkpoints.config_reader import MAMBA_CONFIG, read_config
from vllm_thinkfast.checkpoints.folder import read_folder, read_json, weight_files
from vllm_thinkfast.checkpoints.key_map import CheckpointError
from vllm_thinkfast.checkpoints.reader import house_tensors
from vllm_thinkfast.configs import LlambaConfig
from vllm_thinkfast.configs.fields import printable

RECORD = "thinkfast_convert.json"
MAX_SHARD_BYTES = 5 * 10**9

_ARCHITECTURES = {True: "LlambaForCausalLM", False: "MambaInLlamaForCausalLM"}
_LEFT_BEHIND_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
_LEFT_BEHIND = ("config.json", MAMBA_CONFIG, RECORD)
_TOKENIZER_FILES = (
    "tokenizer*",  # .json, .model, .model.v3, _config.json
    "tokenization_*.py",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
)
"""What --tokenizer replaces as a whole: files of two tokenizers make neither of them."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    destination: Path
    weight_layout: str
    """How the source's tensors were named."""
    num_tensors: int
    num_bytes: int
    was_done_before: bool
    """The destination already held this conversion; nothing was written."""


def convert_checkpoint(
    src: Path,
    dst: Path,
    *,
    tokenizer: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConvertReport:
    """Converts a published folder.

    Args:
        src: a Llamba, MambaInLlama or M1 folder, or an already converted one.
        dst: where to write; created. Converting the same source again changes nothing.
        tokenizer: folder or hub name to take the tokenizer from. Published Llamba folders have
            none; without it the result has what the source has, with it none of the source's
            tokenizer files.
        overwrite: replace a destination that holds something else.
        max_shard_bytes: a weight file is closed when the next tensor would exceed this.

    Returns:
        what was done.

    Raises:
        CheckpointError: the source is not of a known format, or its weights do not match its
            configuration, or the destination is in the way, or the tokenizer cannot be loaded. The
            destination is unchanged then.
    """
    src, dst = src.resolve(), dst.resolve()
    config = read_config(src)
    files = weight_files(src)
    if not files:
        raise CheckpointError(
            f"{src}: no weights; expected *.safetensors or pytorch_model.bin beside config.json."
        )
    _check_destination(src, dst)
    partial = dst.with_name(f".{dst.name}.partial")
    replaced = dst.with_name(f".{dst.name}.replaced")
    _finish_killed_run(dst, partial, replaced)
    layout = config.weight_layout
    fingerprint = _fingerprint(src, files, tokenizer)
    if not _is_absent_or_empty(dst):
        record = _record_of(dst)
        is_done = record.get("source_fingerprint") == fingerprint and _is_complete(dst, record)
        if is_done and not overwrite:
            return ConvertReport(
                dst, layout, record["num_tensors"], record["num_bytes"], was_done_before=True
            )
        if not overwrite:
            raise CheckpointError(
                f"{dst}: exists and is not this conversion; remove it, choose another folder, or "
                "pass --overwrite."
            )
        if not any((dst / name).is_file() for name in ("config.json", RECORD)):
            raise CheckpointError(
                f"{dst}: holds files but no config.json; --overwrite replaces model folders only. "
                "Empty it, or choose another folder."
            )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if tokenizer is not None:  # before the weights, which can take long
            _save_tokenizer(tokenizer, partial)
        tensors = house_tensors(config, read_folder(src), source=str(src))
        num_tensors, num_bytes, dtype = _write_shards(tensors, partial, max_shard_bytes)
        config.weight_layout = "thinkfast"
        config.architectures = [_ARCHITECTURES[isinstance(config, LlambaConfig)]]
        config.dtype = dtype
        config.save_pretrained(partial)
        _copy_other_files(src, partial, () if tokenizer is None else _TOKENIZER_FILES)
        record = {
            "source_fingerprint": fingerprint,
            "source_layout": layout,
            "num_tensors": num_tensors,
            "num_bytes": num_bytes,
            "files": _files_below(partial),
            "vllm_thinkfast": __version__,
        }
        for file in partial.glob("*.safetensors"):
            # safetensors 0.8 makes files that only their owner can read.
            shutil.copymode(partial / "config.json", file)
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _put_in_place(partial, dst, replaced)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return ConvertReport(dst, layout, num_tensors, num_bytes, was_done_before=False)


def _check_destination(src: Path, dst: Path) -> None:
    """Refuses destinations that would touch the source, and files in the way."""
    if dst == src or src in dst.parents:
        raise CheckpointError(f"{dst}: the destination must lie outside of the source {src}.")
    if dst in src.parents:
        # --overwrite replaces the whole destination.
        raise CheckpointError(f"{dst}: holds the source {src}; choose another destination.")
    for path in (dst, *dst.parents):
        if path.exists():
            if not path.is_dir():
                raise CheckpointError(f"{path}: is a file; the destination must be a folder.")
            break


def _is_absent_or_empty(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _finish_killed_run(dst: Path, partial: Path, replaced: Path) -> None:
    """Cleans up after a run that was killed while it replaced ``dst``."""
    if not replaced.exists():
        return
    if _is_absent_or_empty(dst):  # between the two renames
        os.replace(replaced, dst)
    else:
        _delete_replaced(replaced, partial)


def _put_in_place(partial: Path, dst: Path, replaced: Path) -> None:
    """Renames ``partial`` to ``dst``; at every moment one complete folder is left."""
    if not dst.exists():
        os.replace(partial, dst)
        return
    try:
        os.replace(dst, replaced)
        os.replace(partial, dst)
    except BaseException:
        # Asks the disk: Ctrl-C may have come after either rename.
        if replaced.exists() and not dst.exists():
            os.replace(replaced, dst)
        raise
    _delete_replaced(replaced, partial)


def _delete_replaced(replaced: Path, partial: Path) -> None:
    # Under the name of rubbish: ``_finish_killed_run`` may bring back what has the other name, so
    # that is only ever a complete folder.
    shutil.rmtree(partial, ignore_errors=True)
    os.replace(replaced, partial)
    shutil.rmtree(partial)


def _files_below(folder: Path) -> list[str]:
    return sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )


def _is_complete(dst: Path, record: dict[str, Any]) -> bool:
    """Whether a converted folder still has what its record counts and lists."""
    if not all(isinstance(record.get(name), int) for name in ("num_tensors", "num_bytes")):
        return False
    names = record.get("files", [])  # older records have none
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    if not all((dst / name).is_file() for name in ("config.json", *names)):
        return False
    try:
        files = weight_files(dst)
    except CheckpointError:  # a shard is gone
        return False
    found_bytes = sum(file.stat().st_size for file in files)
    return bool(files) and found_bytes >= int(record["num_bytes"])


def _write_shards(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int
) -> tuple[int, int, torch.dtype]:
    """Writes tensors as they come; returns (tensors, bytes, dtype of most of the bytes)."""
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = 0
    names_by_shard: list[list[str]] = []
    bytes_by_dtype: dict[torch.dtype, int] = {}

    def close_shard() -> None:
        nonlocal shard, shard_bytes
        save_file(shard, folder / f"shard-{len(names_by_shard)}", metadata={"format": "pt"})
        names_by_shard.append(list(shard))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + num_bytes > max_shard_bytes:
            close_shard()
        # Parts of a fused tensor are views into it; safetensors wants tensors of their own.
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        shard_bytes += num_bytes
        bytes_by_dtype[tensor.dtype] = bytes_by_dtype.get(tensor.dtype, 0) + num_bytes
    close_shard()
    total = sum(bytes_by_dtype.values())
    num_shards = len(names_by_shard)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(names_by_shard):
        file = "model.safetensors"
        if num_shards > 1:
            file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        os.replace(folder / f"shard-{i}", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if num_shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return len(weight_map), total, max(bytes_by_dtype, key=lambda d: bytes_by_dtype[d])


def _other_files(src: Path) -> Iterator[Path]:
    """Tokenizer, chat template, generation config, licence: everything but weights and configs."""
    for file in sorted(src.iterdir()):
        is_left_behind = file.name in _LEFT_BEHIND or file.name.endswith(_LEFT_BEHIND_SUFFIXES)
        if file.is_file() and not is_left_behind and not file.name.startswith("."):
            yield file


def _copy_other_files(src: Path, dst: Path, replaced: tuple[str, ...]) -> None:
    """Copies them but for names that fit a pattern in ``replaced``, or that ``dst`` has already."""
    for file in _other_files(src):
        is_replaced = any(fnmatchcase(file.name, pattern) for pattern in replaced)
        if not is_replaced and not (dst / file.name).exists():
            shutil.copy2(file, dst / file.name)


def _save_tokenizer(tokenizer: str, dst: Path) -> None:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # on damaged files transformers and tokenizers raise anything
        lines = (line.strip(" :.") for line in str(error).splitlines())
        reason = printable(next(filter(None, lines), "no reason given"))
        if not isinstance(error, (OSError, ValueError)):  # KeyError: 'added_tokens'
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(
            f"--tokenizer {tokenizer}: cannot be loaded: {reason}; give a folder with "
            "tokenizer files or a hub name you have access to."
        ) from error
    loaded.save_pretrained(dst)


def _fingerprint(src: Path, files: list[Path], tokenizer: str | None) -> str:
    """Changes when source or tokenizer do: config contents, names, sizes and times of the rest."""
    digest = hashlib.sha256()

    def add_stat(file: Path) -> None:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())

    if tokenizer is None or not Path(tokenizer).exists():
        digest.update(f"{tokenizer}\n".encode())
    else:
        local = Path(tokenizer).resolve()
        digest.update(f"{local}\n".encode())
        for file in _tokenizer_files(local):
            add_stat(file)
    for name in ("config.json", MAMBA_CONFIG):
        if (src / name).is_file():
            digest.update((src / name).read_bytes())
    for file in (*files, *_other_files(src)):
        add_stat(file)
    return digest.hexdigest()


def _tokenizer_files(local: Path) -> list[Path]:
    """What a local tokenizer may be read from; where config.json has the name of its class."""
    if local.is_file():
        return [local]
    templates = sorted(local.glob("additional_chat_templates/*.jinja"))
    config = local / "config.json"
    return [*_other_files(local), *templates, *([config] if config.is_file() else [])]


def _record_of(dst: Path) -> dict[str, Any]:
    if not (dst / RECORD).is_file():
        return {}
    return read_json(dst / RECORD)
