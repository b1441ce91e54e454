"""What samples depend on besides their settings: model files, versions, hardware, commit."""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lm_eval_tasks.workers import num_usable_cores

_DISTRIBUTIONS = (
    "vllm-thinkfast",
    "vllm",
    "torch",
    "transformers",
    "lm_eval",
    "math-verify",
)
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.py", "*.txt")
_BLOCK = 1 << 16
_BLOCKS_PER_FILE = 64


def model_id(model: str, revision: str | None) -> str:
    """Return what identifies a model: a folder by its files, wherever it lies; others by name.

    Large files are read in part (size and 64 blocks spread over the file), which notices other
    weights without reading gigabytes.

    Args:
        model: folder or hub name.
        revision: of a hub name.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= _BLOCK * _BLOCKS_PER_FILE:
                digest.update(opened.read())
                continue
            for number in range(_BLOCKS_PER_FILE):
                opened.seek((size - _BLOCK) * number // (_BLOCKS_PER_FILE - 1))
                digest.update(opened.read(_BLOCK))
    return f"files:{digest.hexdigest()}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of every distribution that takes part."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str | int]:
    """Return processor, cores, memory and GPUs, as far as the system tells."""
    info: dict[str, str | int] = {"machine": platform.machine()}
    for file, key, name in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue  # not Linux
        values = [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
        if values:
            info[name] = values[0]
    info["cores"] = num_usable_cores()
    gpus = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    if gpus:
        info["gpus"] = gpus.replace("\n", "; ")
    return info


def git_commit() -> str:
    """Return the commit of this package's checkout, "-dirty" if changed; "unknown" without one."""
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    if not _output([*git, "ls-files", "--error-unmatch", file.name]):
        return "unknown"  # installed, maybe below somebody else's repository
    return _output([*git, "describe", "--always", "--abbrev=40", "--dirty"])


def _output(command: list[str]) -> str:
    """Return what a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
