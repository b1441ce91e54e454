"""Writes a student as a Hugging Face folder that vLLM serves with the vllm-thinkfast plugin.

The folder holds one config.json, safetensors under the names of ``vllm_thinkfast.checkpoints``, the
tokenizer with its chat template, a generation config and a model card. It is written beside the
destination and renamed at the end, so a killed export leaves nothing that looks finished; the same
student exported again gives the same files.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoTokenizer, LlamaConfig

from thinkfast_distill import model_card
from thinkfast_distill.architecture import ModelConfig
from vllm_thinkfast.checkpoints.reader import house_shapes
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

RECORD = "thinkfast_export.json"
"""Marks a folder as an export, with the facts of the model card in a form for programs."""

MAX_SHARD_SIZE = "5GB"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_GENERATION = "generation_config.json"
_FLOAT32 = (".A_log", ".D", ".dt_bias")
"""Parameters of the recurrence: few, and the plugin computes them in float32 in any model."""

_ARCHITECTURES: dict[type, str] = {
    LlambaConfig: "LlambaForCausalLM",
    MambaInLlamaConfig: "MambaInLlamaForCausalLM",
    LlamaConfig: "LlamaForCausalLM",
}


class ExportError(ValueError):
    """The student cannot be exported; the destination is as it was."""


def export(
    student: torch.nn.Module,
    config: ModelConfig,
    tokenizer_folder: Path | str,
    out: Path | str,
    *,
    card: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = None,
    gguf_file: str | None = None,
) -> Path:
    """Writes the folder.

    Args:
        student: its weights; a ``Student`` or ``LlamaStudent``, not sharded.
        config: the student's configuration; not changed.
        tokenizer_folder: where the tokenizer files are, usually the teacher's folder.
        out: the folder to write. An earlier export there is replaced, anything else is refused.
        card: facts for the model card, see ``model_card.KEYS``.
        dtype: of the weights, torch.float32 or torch.bfloat16; A_log, D and dt_bias stay float32.
        chat_template: Jinja text that replaces the tokenizer's own template.
        gguf_file: GGUF file in ``tokenizer_folder`` that holds the tokenizer.

    Returns:
        ``out``, resolved.

    Raises:
        ExportError: weights that do not fit the configuration or are not finite, no tokenizer, an
            unknown fact in the card, a destination in the way, or a write that failed.
    """
    source, out = Path(tokenizer_folder), Path(out).resolve()
    if dtype not in (torch.float32, torch.bfloat16):
        raise ExportError(f"dtype={dtype}; accepted: torch.float32, torch.bfloat16.")
    try:
        model_card.check(card)
    except ValueError as error:
        raise ExportError(str(error)) from error
    tensors = _tensors(student, config, dtype)
    _check_tokenizer(source, gguf_file)
    _check_destination(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tokenizer(source, partial, chat_template, gguf_file)
        tokens = _write_generation_config(source, partial)
        _write_config(config, partial, dtype, tokens)
        save_torch_state_dict(tensors, partial, max_shard_size=MAX_SHARD_SIZE)
        num_parameters = sum(tensor.numel() for tensor in tensors.values())
        facts = {**card, "num_parameters": num_parameters, "dtype": str(dtype).split(".")[-1]}
        (partial / RECORD).write_text(_json(facts), encoding="utf-8")
        text = model_card.render(facts, architecture=_ARCHITECTURES[type(config)])
        (partial / "README.md").write_text(text, encoding="utf-8")
        _publish(partial, out)
    except OSError as error:
        hint = "; free some space" if error.errno == errno.ENOSPC else ""
        raise ExportError(
            f"{out}: cannot be written: {error.strerror or error}{hint}; nothing was changed."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _tensors(
    student: torch.nn.Module, config: ModelConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors to write, checked against the configuration; a tied head is left out."""
    state = student.state_dict()
    if config.tie_word_embeddings:
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
            raise ExportError(
                "lm_head.weight differs from model.embed_tokens.weight although "
                "tie_word_embeddings is true; set it to false in the student's configuration."
            )
    if not isinstance(config, LlamaConfig):
        wanted = house_shapes(config)
        if config.tie_word_embeddings:
            del wanted["lm_head.weight"]
        wrong = [
            f"{name}: expected {list(wanted.get(name, ())) or 'nothing'}, found "
            f"{list(state[name].shape) if name in state else 'nothing'}"
            for name in sorted(set(wanted) | set(state))
            if name not in state or tuple(state[name].shape) != wanted.get(name)
        ]
        if wrong:
            raise ExportError(
                f"{len(wrong)} tensors do not fit the configuration; {wrong[0]}. Export a student "
                "with the configuration it was built from."
            )
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if hasattr(tensor, "full_tensor"):
            raise ExportError(f"{name}: is sharded; load the checkpoint into one process first.")
        if not bool(tensor.isfinite().all()):
            raise ExportError(f"{name}: holds values that are not finite; export an earlier step.")
        keeps = torch.float32 if name.endswith(_FLOAT32) else dtype
        found[name] = tensor.detach().to("cpu", keeps).contiguous()
    return found


def _check_tokenizer(source: Path, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if not (source / gguf_file).is_file():
            raise ExportError(f"{source / gguf_file}: no such file; it should hold the tokenizer.")
    elif not any((source / name).is_file() for name in _VOCABULARIES):
        raise ExportError(
            f"{source}: no tokenizer; expected one of {', '.join(_VOCABULARIES)} there."
        )


def _check_destination(out: Path) -> None:
    """Refuses destinations that hold something other than an export."""
    if out.is_dir():
        if any(out.iterdir()) and not (out / RECORD).is_file():
            raise ExportError(
                f"{out}: holds files that are not an export; choose another folder, or empty it."
            )
        return
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise ExportError(f"{path}: is a file; the destination must be a folder.")
            return


def _write_tokenizer(
    source: Path, folder: Path, chat_template: str | None, gguf_file: str | None
) -> None:
    if gguf_file is not None:
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if chat_template is None:
        return
    # One template only: which of several wins differs between versions of transformers.
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        kept = json.loads(settings.read_text(encoding="utf-8"))
        kept.pop("chat_template", None)
        settings.write_text(_json(kept), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _write_generation_config(source: Path, folder: Path) -> dict[str, Any]:
    """The tokenizer folder's generation config, or one with the tokenizer's special tokens.

    Returns:
        ids of the special tokens in it. Without an end-of-sequence id, generation never stops.
    """
    path = source / _GENERATION
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        found = {"_from_model_config": True}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if found.get("eos_token_id") is None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in names:
            if found.get(name) is None and getattr(tokenizer, name) is not None:
                found[name] = getattr(tokenizer, name)
    if found.get("eos_token_id") is None:
        raise ExportError(
            f"{source}: neither {_GENERATION} nor the tokenizer has an end-of-sequence token; "
            "generation would never stop. Set eos_token in tokenizer_config.json."
        )
    (folder / _GENERATION).write_text(_json(found), encoding="utf-8")
    return {name: found.get(name) for name in names}


def _write_config(
    config: ModelConfig, folder: Path, dtype: torch.dtype, tokens: Mapping[str, Any]
) -> None:
    written = type(config).from_dict(config.to_dict())
    written.architectures = [_ARCHITECTURES[type(config)]]
    if not isinstance(written, LlamaConfig):
        written.weight_layout = "thinkfast"
    written.dtype = dtype
    for name, value in tokens.items():
        setattr(written, name, value)
    written.save_pretrained(folder)


def _publish(partial: Path, out: Path) -> None:
    """Puts the finished folder in place of an earlier one; each step is a rename."""
    for file in partial.glob("*.safetensors"):
        # safetensors 0.8 makes files that only their owner can read.
        shutil.copymode(partial / "config.json", file)
    if not out.is_dir():
        os.replace(partial, out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(out, old)
    try:
        os.replace(partial, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


assert set(_ARCHITECTURES) == set(get_args(ModelConfig))
