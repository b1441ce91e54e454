"""``thinkfast doctor``: what is installed, what will be used, what is wrong and how to mend it."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_thinkfast import __version__, compat, envs
from vllm_thinkfast.ops.backend import OPERATORS, choose_backend, load_operator

ENTRY_POINT_GROUP = "vllm.general_plugins"
ENTRY_POINT_NAME = "thinkfast"
_SHOWN = ("torch", "transformers", "triton", "numba", "lm-eval", "math-verify")
# PyPI's builds of these are made for the CUDA torch; vLLM imports them if they are there.
_BREAK_CPU_VLLM = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Problem:
    """Something that keeps the plugin from working."""

    what: str
    fix: str
    """One line: a command, or what to change."""


@dataclass
class Diagnosis:
    """Everything ``thinkfast doctor`` prints."""

    versions: dict[str, str | None] = field(default_factory=dict)
    accepted_vllm: str = ""
    tested_vllm: str = ""
    is_plugin_active: bool = False
    device: str = ""
    backends: dict[str, str] = field(default_factory=dict)
    """Operator -> backend that will compute it."""
    problems: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Looks at this environment; changes nothing, imports torch but not vllm."""
    found = Diagnosis()
    found.versions = {"python": platform.python_version(), "vllm-thinkfast": __version__}
    found.versions |= {name: _version(name) for name in _SHOWN}
    found.accepted_vllm = f">={compat.OLDEST_VLLM}"
    found.tested_vllm = ", ".join(compat.TESTED_VLLM)
    _check_vllm(found)
    _check_entry_point(found)
    _check_torch(found)
    _check_variables(found)
    return found


def render(found: Diagnosis) -> Iterable[str]:
    """The lines of the report."""
    for name, version in found.versions.items():
        yield f"{name:<16} {version or 'not installed'}"
    yield f"{'vLLM accepted':<16} {found.accepted_vllm}"
    yield f"{'vLLM tested':<16} {found.tested_vllm}"
    yield f"{'plugin':<16} {'active' if found.is_plugin_active else 'NOT ACTIVE'}"
    yield f"{'device':<16} {found.device or 'unknown'}"
    for operator, backend in found.backends.items():
        yield f"{operator:<16} {backend}"
    if not found.problems:
        yield "no problems found"
    for problem in found.problems:
        yield f"PROBLEM: {problem.what}"
        yield f"    fix: {problem.fix}"


def _check_vllm(found: Diagnosis) -> None:
    distribution = compat.vllm_distribution()
    if distribution is None:
        found.versions["vllm"] = None
        found.problems.append(
            Problem("vLLM is not installed", "pip install vllm  (on a CPU machine: make install)")
        )
        return
    name, version = distribution
    found.versions[name] = version
    if compat.is_too_old(version):
        found.problems.append(
            Problem(
                f"{name} {version} is older than the accepted {compat.OLDEST_VLLM}",
                f'pip install --upgrade "{name}>={compat.OLDEST_VLLM}"',
            )
        )
    if compat.is_newer_than_tested(version):
        found.problems.append(
            Problem(
                f"{name} {version} is newer than the tested {compat.TESTED_VLLM[-1]}",
                "run `make test TESTS=tests/vllm_thinkfast`, or install a tested version",
            )
        )


def _check_entry_point(found: Diagnosis) -> None:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=ENTRY_POINT_NAME)
    selected = os.environ.get("VLLM_PLUGINS")
    is_selected = selected is None or ENTRY_POINT_NAME in selected.split(",")
    if not points:
        found.problems.append(
            Problem(
                f"entry point {ENTRY_POINT_GROUP}:{ENTRY_POINT_NAME} is not registered",
                "pip install --no-deps --force-reinstall vllm-thinkfast",
            )
        )
    elif not is_selected:
        found.problems.append(
            Problem(
                f"VLLM_PLUGINS={selected} leaves out {ENTRY_POINT_NAME}",
                f"unset VLLM_PLUGINS, or add {ENTRY_POINT_NAME} to it",
            )
        )
    distribution = compat.vllm_distribution()
    is_accepted = distribution is not None and not compat.is_too_old(distribution[1])
    found.is_plugin_active = bool(points) and is_selected and is_accepted


def _check_torch(found: Diagnosis) -> None:
    if importlib.util.find_spec("torch") is None:
        found.problems.append(Problem("torch is not installed", "install vLLM, which brings it"))
        return
    import torch

    found.device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.version.cuda is None and "+cpu" in torch.__version__:
        present = [name for name in _BREAK_CPU_VLLM if _version(name)]
        if present:
            found.problems.append(
                Problem(
                    f"{', '.join(present)} from PyPI do not work with the CPU build of torch and "
                    "break `import vllm`",
                    f"{sys.executable} -m pip uninstall -y {' '.join(present)}",
                )
            )
    try:
        backend = choose_backend(found.device)
    except ValueError as error:
        found.problems.append(Problem(str(error), f"unset {envs.OPS_BACKEND}"))
        return
    if backend == "triton" and found.device == "cpu":
        found.problems.append(
            Problem(
                f"{envs.OPS_BACKEND}=triton, but there is no GPU to run Triton on",
                f"unset {envs.OPS_BACKEND}",
            )
        )
    if backend == "reference" and found.device == "cuda":
        found.problems.append(
            Problem(
                f"{envs.OPS_BACKEND}=reference does not run in CUDA graphs, which are the default",
                f"unset {envs.OPS_BACKEND}, or serve with --enforce-eager",
            )
        )
    if backend == "cpu":
        _check_compiler(found)
    for operator in OPERATORS:
        found.backends[operator] = backend
        try:
            load_operator(operator, backend)
        except ImportError as error:
            found.problems.append(
                Problem(
                    f"{operator}: backend {backend} cannot be loaded: {error}", "install triton"
                )
            )


def _check_compiler(found: Diagnosis) -> None:
    from vllm_thinkfast.ops import compiled  # imports torch

    reason = None
    try:
        importlib.import_module("numba")
    except ModuleNotFoundError as error:
        reason = "is not installed" if error.name == "numba" else f"cannot be imported ({error})"
    # A package of another one's version raises what it likes.
    except Exception as error:
        reason = f"cannot be imported ({type(error).__name__}: {error})".splitlines()[0]
    fix = f"{sys.executable} -m pip install --upgrade numba"
    if reason is None and any(compiled.find(name) is None for name in OPERATORS):
        reason, fix = "does not compile the kernels", "see the warnings above"
    if reason is not None:
        found.problems.append(
            Problem(f"numba {reason}: on a CPU the operators use plain torch, which is slower", fix)
        )


def _check_variables(found: Diagnosis) -> None:
    """The variables that stop a model at start; `_check_torch` has looked at the operators'."""
    for name, read in ((envs.FORK, envs.fork), (envs.SSM_STATE, envs.is_ssm_state_int8)):
        try:
            read()
        except ValueError as error:
            found.problems.append(Problem(str(error), f"unset {name}"))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
