"""Which implementation is chosen, and what a wrong choice says."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_thinkfast import envs
from vllm_thinkfast.ops.backend import OPERATORS, choose_backend, load_operator


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(envs.OPS_BACKEND, raising=False)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "cpu"), ("cuda", "triton")])
def test_choose_backend_by_device(device, backend):
    assert choose_backend(device) == backend


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_choose_backend_by_variable(monkeypatch, device, name):
    monkeypatch.setenv(envs.OPS_BACKEND, name)
    assert choose_backend(device) == name


def test_choose_backend_empty_variable_is_unset(monkeypatch):
    monkeypatch.setenv(envs.OPS_BACKEND, "")
    assert choose_backend("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda", "Triton", "cpu "])
def test_choose_backend_unknown_name(monkeypatch, name):
    monkeypatch.setenv(envs.OPS_BACKEND, name)
    with pytest.raises(ValueError, match=f"{envs.OPS_BACKEND}={name!r}; accepted: cpu, triton"):
        choose_backend("cpu")


def test_choose_backend_unknown_device():
    with pytest.raises(ValueError, match=r"'xpu'; accepted: cpu, cuda.*reference"):
        choose_backend("xpu")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_have_the_arguments_of_the_reference(operator, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    reference, module = load_operator(operator, "reference"), load_operator(operator, backend)
    assert module.__name__ == f"vllm_thinkfast.ops.{operator}.{backend}"
    for entry in ("prefill", "decode"):
        wanted = inspect.signature(getattr(reference, entry))
        assert inspect.signature(getattr(module, entry)) == wanted


def test_cpu_backend_needs_neither_triton_nor_vllm():
    script = (
        "import sys\n"
        "from vllm_thinkfast.ops.backend import OPERATORS, load_operator\n"
        "for operator in OPERATORS:\n"
        "    load_operator(operator, 'cpu'), load_operator(operator, 'reference')\n"
        "print(sorted({'triton', 'vllm'} & set(sys.modules)))\n"
    )
    root = str(Path(__file__).parents[3])
    finished = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert finished.stdout.strip() == "[]"
