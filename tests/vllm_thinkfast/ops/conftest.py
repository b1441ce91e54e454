"""Operator tests run once per backend, on the device the backend is for.

The Triton backend runs on a GPU (marker ``gpu``), or on CPU tensors in Triton's interpreter where
TRITON_INTERPRET=1 is set before Triton is imported: ``test_triton_interpreter.py`` runs this folder
again in such a process.

The CPU backend takes compiled kernels; its tests run again without them ("cpu-torch").
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

from vllm_thinkfast.ops import compiled
from vllm_thinkfast.ops.backend import load_operator

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton 3.9 warns whenever it compiles and this is unset; both settings suit our tolerances.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Without a GPU the Triton backend is left out here, not skipped: the interpreter covers it.
_BACKENDS = ["reference", "cpu"]
if INTERPRETED:
    _BACKENDS.append("triton")
elif torch.cuda.is_available():
    _BACKENDS.append(pytest.param("triton", marks=pytest.mark.gpu))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("backend", [*_BACKENDS, "cpu-torch"], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu-torch":
        monkeypatch.setattr(compiled, "find", lambda operator: None)
        return "cpu"
    return request.param


@pytest.fixture
def op(request: pytest.FixtureRequest, backend: str) -> Iterator[ModuleType]:
    """The operator named by the test file's OPERATOR; new tensors land on the backend's device."""
    on_gpu = backend == "triton" and not INTERPRETED
    with torch.device("cuda") if on_gpu else nullcontext():
        yield load_operator(request.module.OPERATOR, backend)


@pytest.fixture(autouse=True)
def nan_filled_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an operator allocates holds NaN, so that unwritten results are seen."""

    def filled(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
