"""What a run of the demo does: one object, made from the command line, stored with the results."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = ROOT / "lm_eval_tasks" / "tasks" / "arith" / "test.jsonl"
NOT_SERVED = ("README.md", "thinkfast_export.json")
"""Files of a model folder: the card, and where the weights came from."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers; the same for every model."""

    data: str = str(PROBLEMS)
    """Word problems, JSON lines in GSM8K's field layout."""
    limit: int | None = 60
    """Use only the first problems of the file; None for all."""
    num_samples: int = 64
    """Samples per problem (N)."""
    max_tokens: int = 128
    """Longest answer in tokens; longer ones are cut and counted as truncated."""
    temperature: float = 0.7
    seed: int = 1234
    """Seed of the sampling."""
    max_num_seqs: int = 256
    """Sequences that run at once, in sampling and in the speed measurement."""
    max_model_len: int = 2048
    """Longest prompt and answer together, in tokens."""
    kv_cache_bytes: int = 2**30
    """Memory for keys, values and states, the same for every model."""
    dtype: str = "float32"
    speed_rounds: int = 5
    """Repetitions of the speed measurement; each round runs every model once."""
    speed_sequences: int = 64
    """Sequences that a round decodes at once."""
    speed_tokens: int = 128
    """Tokens generated for each sequence of a round."""


def resolved(settings: Settings) -> dict[str, Any]:
    """The settings as they are stored: with the data file's content in place of its location."""
    values = asdict(settings)
    values["data_sha256"] = file_hash(Path(settings.data))
    return values


def file_hash(*files: Path) -> str:
    """SHA-256 over the contents of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def folder_hash(folder: Path) -> str:
    """Short hash of everything that a model folder serves: all files but those that describe it."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in NOT_SERVED:
            digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()[:16]


def code_hash() -> str:
    """Hash of the sources that take part in a measurement, so that old results are not reused."""
    here = Path(__file__).resolve().parent
    files = [here / "worker.py"]
    for package in ("vllm_thinkfast", "lm_eval_tasks"):
        for pattern in ("*.py", "*.yaml", "*.jsonl"):  # the problems, too
            files += (ROOT / package).rglob(pattern)
    return file_hash(*sorted(files))[:16]


@dataclass(frozen=True)
class Contender:
    """A model folder that takes part. Where it came from does not matter from here on."""

    name: str
    """Short key, used in file names."""
    label: str
    """In the table and the figure."""
    folder: Path
    identity: str
    """Changes when the model changes."""
    attention_layers: str
    """For the table, such as "1 of 3"."""
