"""What a measurement depends on besides its settings: versions, hardware, code."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vllm_thinkfast
from vllm_thinkfast import compat
from vllm_thinkfast.bench.process import CACHE_VARIABLE
from vllm_thinkfast.bench.settings import Settings, num_usable_cores
from vllm_thinkfast.ops.backend import OPERATORS

_PACKAGE = Path(vllm_thinkfast.__file__).parent
_WITHOUT_EFFECT = ("cli.py", "doctor.py", "bench/report.py", "bench/figure.py")
"""Sources that can change without changing a measurement."""
_SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
_OTHERS = (
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def versions(*more: str) -> dict[str, str]:
    """Version of Python and of every distribution that takes part.

    Args:
        *more: names of further distributions.
    """
    found = {"python": platform.python_version(), "vllm-thinkfast": vllm_thinkfast.__version__}
    distribution = compat.vllm_distribution()
    if distribution is not None:
        name, found_version = distribution
        found[name] = found_version
    for name in ("torch", "transformers", "triton", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory, and the GPUs if there are any."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": num_usable_cores(),
    }
    for file, field, name in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        path = Path(file)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        values = [line.partition(":")[2].strip() for line in lines if line.startswith(field)]
        if values:
            found[name] = values[0]
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    found["gpus"] = _output(query).splitlines()
    return found


def cpu_operators() -> dict[str, str]:
    """Operator -> "compiled" or "torch": which implementation engines on this CPU use."""
    # Late: `--dry-run` and `--help` do without torch and numba.
    from vllm_thinkfast.ops import compiled

    return {name: compiled.implementation(name) for name in OPERATORS}


def git_commit() -> str:
    """Commit of the checkout, with "-dirty" after changes; empty for an installed package."""
    if not (_PACKAGE.parent / ".git").exists():
        return ""  # site-packages may lie in somebody else's repository
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--abbrev=40", "--dirty"]
    return _output(command)


def code_hash() -> str:
    """Hash of the sources that take part in a measurement."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        name = file.relative_to(_PACKAGE).as_posix()
        if name not in _WITHOUT_EFFECT:
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def environment_of_runs(settings: Settings) -> dict[str, str]:
    """vLLM's and our own environment variables, which the engines see; without secrets.

    And others that decide how fast an engine is: preloaded libraries (vLLM advises an allocator and
    an OpenMP for CPUs), which GPU it gets, torch's allocator there and reduced float32 products.

    Args:
        settings: of the run.
    """
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _OTHERS or (name.startswith("VLLM_") and not name.endswith(_SECRETS))
    }
    if settings.kv_cache_bytes is not None:
        found.pop(CACHE_VARIABLE, None)
    return found


def _output(command: list[str]) -> str:
    """What a program says; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
