"""What a bench run does: models, cells, and the engine options that all models share."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_thinkfast.bench.shapes import FAMILIES, PRESETS, write_folder

Mode = Literal["separate", "samples"]
Engines = Literal["together", "one-by-one"]
DTYPES = ("float32", "bfloat16", "float16")
LOAD_FORMATS = ("dummy", "auto")
MAX_SEQS_WITHOUT_NUMBER = 1024
"""vLLM's max_num_seqs, at least, where a batch is "max" and the user names no limit."""
_FLAGS = {
    "model": "--models",
    "max_model_len": "--lengths",
    "seed": "--seed",
    "load_format": "--load-format",
    "dtype": "--dtype",
    "mamba_ssm_cache_dtype": "--ssm-dtype",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "kv_cache_memory_bytes": "--kv-cache-gib",
}
"""Arguments of ``vllm.LLM`` that an option of the bench decides."""
_PARALLEL_OPTIONS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True)
class Cell:
    """One measured point: a batch that is submitted at once and runs alone."""

    mode: Mode
    """"separate": prompts that share nothing; "samples": one prompt with n = batch."""
    batch: int | None
    """Sequences; None: as many as the model's cache holds at this length."""
    num_prompt_tokens: int
    num_tokens: int
    """Generated for each sequence, whatever it says."""

    @property
    def label(self) -> str:
        """For progress, tables and keys, such as ``64 x 128+128`` or ``n=64 x 128+128``."""
        batch = "max" if self.batch is None else str(self.batch)
        prefix = "n=" if self.mode == "samples" else ""
        return f"{prefix}{batch} x {self.num_prompt_tokens}+{self.num_tokens}"

    @property
    def length(self) -> int:
        """Tokens of a finished sequence."""
        return self.num_prompt_tokens + self.num_tokens


@dataclass(frozen=True)
class Model:
    """A folder that takes part."""

    name: str
    folder: Path
    family: str | None
    """Of the preset, whose config.json the run writes; None: the user's own folder."""

    @property
    def identity(self) -> str:
        """Changes when the model does: its config files, and size and time of its weights."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            if file.suffix == ".json":
                digest.update(file.read_bytes())
            elif file.is_file():
                stat = file.stat()
                digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers; the same for every model."""

    cells: tuple[Cell, ...]
    rounds: int
    load_format: str
    dtype: str
    ssm_dtype: str
    """Of the recurrent state; vLLM's own Mamba-2 gets the same."""
    threads: int
    """OpenMP threads of each engine and of the roofline measurement."""
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int | None
    """Memory for keys, values and states; None: what vLLM finds free."""
    engines: Engines
    """Whether all engines stay alive for the whole run or one at a time."""
    seed: int
    engine_options: dict[str, Any]
    """Further arguments of ``vllm.LLM``."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence of any cell."""
        return max(cell.length for cell in self.cells)

    def llm_options(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` besides the model.

        Prefix caching is left to the defaults: on for Llama and our models, off for vLLM's own
        Mamba-2, whose prefill fails with it on CPUs (vLLM 0.32, IndexError in
        ``mamba_mixer2.py``).
        """
        options: dict[str, Any] = {
            "load_format": self.load_format,
            "dtype": self.dtype,
            "mamba_ssm_cache_dtype": self.ssm_dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "skip_tokenizer_init": True,
            "seed": self.seed,
        }
        if self.kv_cache_bytes is not None:
            options["kv_cache_memory_bytes"] = self.kv_cache_bytes
            # On a GPU vLLM still asks whether this part of the device is free, which it is not for
            # the second of several engines. With the cache's size given nothing else depends on it.
            options["gpu_memory_utilization"] = 0.01
        return options | self.engine_options

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        fields = asdict(self)
        fields["cells"] = [cell.label for cell in self.cells]
        return fields


def parse_cells(
    batch_sizes: str, lengths: str, num_samples: str, max_num_seqs: int | None
) -> tuple[tuple[Cell, ...], int]:
    """Cells of the command line's lists, and vLLM's max_num_seqs.

    Args:
        batch_sizes: such as ``1,16,max``; may be empty.
        lengths: such as ``128+128,1024+64``: prompt and generated tokens.
        num_samples: such as ``16,64``; may be empty.
        max_num_seqs: the user's limit; None: the largest number in the lists, and at least
            MAX_SEQS_WITHOUT_NUMBER if a batch is "max".

    Raises:
        ValueError: something is no number, too small, or larger than the limit.
    """
    batches = [_batch(item) for item in _items(batch_sizes)]
    samples = [_number(item, "--num-samples", 2) for item in _items(num_samples)]
    if not batches and not samples:
        raise ValueError("--batch-sizes and --num-samples are both empty: nothing to measure")
    pairs = [_pair(item) for item in _items(lengths)]
    if not pairs:
        raise ValueError("--lengths is empty; give for example 128+128")
    cells = [Cell("separate", batch, *pair) for pair in pairs for batch in batches]
    cells += [Cell("samples", number, *pair) for pair in pairs for number in samples]
    numbers = [cell.batch for cell in cells if cell.batch is not None]
    if max_num_seqs is None:
        least = [MAX_SEQS_WITHOUT_NUMBER] if None in batches else []
        max_num_seqs = max(least + numbers)
    elif max_num_seqs < max(numbers, default=1):
        raise ValueError(
            f"--max-num-seqs {max_num_seqs}: less than the batch of {max(numbers, default=1)} that "
            "is to be measured; raise it, or leave it out"
        )
    return tuple(dict.fromkeys(cells)), max_num_seqs


def parse_engine_options(text: str) -> dict[str, Any]:
    """The JSON object of ``--engine-options``.

    Raises:
        ValueError: no JSON object, or it sets what another option decides.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--engine-options {text!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(
            f'--engine-options {text!r}: need an object such as {{"enforce_eager": true}}'
        )
    wrong = [name for name in _FLAGS if name in options]
    if wrong:
        flags = ", ".join(_FLAGS[name] for name in wrong)
        raise ValueError(
            f"--engine-options: {', '.join(wrong)}: leave it out, and use {flags} instead"
        )
    wrong = [name for name in _PARALLEL_OPTIONS if options.get(name, 1) != 1]
    if wrong:
        raise ValueError(
            f"--engine-options: {wrong[0]} {options[wrong[0]]}: the bench is for one device; leave "
            "it out"
        )
    return options


def find_models(names: str, preset: str, load_format: str, out: Path) -> list[Model]:
    """The models of ``--models``; `write_models` makes the folders of those named by family.

    Args:
        names: such as ``llama,llamba,mine=path/to/folder``.
        preset: shape of those without a folder.
        load_format: only "dummy" can do without weights.
        out: folder of the run.

    Raises:
        ValueError: unknown or repeated name, or a folder without config.json.
    """
    models: list[Model] = []
    for item in _items(names):
        name, equals, folder = item.partition("=")
        if name in [model.name for model in models]:
            raise ValueError(f"--models {names}: {name} stands there twice")
        if equals:
            path = Path(folder)
            if not (path / "config.json").is_file():
                raise ValueError(f"--models {item}: {path} has no config.json")
        elif name not in FAMILIES:
            raise ValueError(
                f"--models {name}: accepted are {', '.join(FAMILIES)}, and NAME=FOLDER"
            )
        elif load_format != "dummy":
            raise ValueError(
                f"--models {name} has no weights: use --load-format dummy, or give NAME=FOLDER"
            )
        else:
            path = out / "models" / f"{preset}-{name}"
        models.append(Model(name, path, None if equals else name))
    if not models:
        raise ValueError(f"--models is empty; accepted are {', '.join(FAMILIES)} and NAME=FOLDER")
    return models


def write_models(models: Sequence[Model], preset: str) -> None:
    """Writes config.json of the models that are named by family."""
    for model in models:
        if model.family is not None:
            write_folder(model.folder, model.family, preset)


def num_usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_gib(value: float | None, flag: str) -> int | None:
    """GiB as bytes.

    Raises:
        ValueError: less than a byte, or more than vLLM and torch count.
    """
    if value is None:
        return None
    if not 2**-30 <= value < 2**33:  # also false for nan
        raise ValueError(
            f"{flag} {value}: must be a number above 0, at least a byte, and less than 2**33"
        )
    return int(value * 2**30)


def check_preset(preset: str) -> None:
    """Raises ValueError for a preset that does not exist."""
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: accepted are {', '.join(PRESETS)}")


def _items(text: str) -> Sequence[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _number(text: str, flag: str, least: int = 1) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{flag} {text}: need whole numbers from {least} up")
    return int(text)


def _batch(text: str) -> int | None:
    return None if text == "max" else _number(text, "--batch-sizes")


def _pair(text: str) -> tuple[int, int]:
    prompt, plus, generated = text.partition("+")
    if not plus:
        raise ValueError(f"--lengths {text}: need PROMPT+GENERATED tokens, such as 128+128")
    return (
        _number(prompt, f"--lengths {text}: prompt"),
        # The first token belongs to the prefill.
        _number(generated, f"--lengths {text}: generated tokens", 2),
    )
