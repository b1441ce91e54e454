"""The models of the demo: the embedded teacher and its students, see ``thinkfast/README.md``."""

import json
from pathlib import Path

from demo.errors import InputError
from demo.settings import ROOT, Contender, folder_hash

MODELS = ROOT / "thinkfast"
LABELS = {
    "llama-tiny": "Llama (teacher)",
    "llamba-tiny": "Llamba",
    "mambainllama-tiny": "MambaInLlama",
}
"""Folder -> name in table and figure; ratios are relative to the first."""


def find_contenders(models: Path = MODELS) -> list[Contender]:
    """The models, in the order of the table.

    Args:
        models: folder of the model folders.

    Raises:
        InputError: a folder is missing or not complete.
    """
    return [_contender(models / name, label) for name, label in LABELS.items()]


def _contender(folder: Path, label: str) -> Contender:
    files = [folder / "config.json", folder / "model.safetensors", folder / "tokenizer.json"]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file}: no such file; the demo's models belong to the repository: restore them "
                "with `git checkout thinkfast`, or train them with `make tiny`"
            )
    layers, attention = _layers(folder)
    return Contender(
        name=folder.name,
        label=label,
        folder=folder,
        identity=folder_hash(folder),
        attention_layers=f"{attention} of {layers}",
    )


def _layers(folder: Path) -> tuple[int, int]:
    """Number of layers, and of those with attention."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] == ["LlamaForCausalLM"]:
        return config["num_hidden_layers"], config["num_hidden_layers"]
    return config["num_hidden_layers"], len(config.get("attention_layers", []))
