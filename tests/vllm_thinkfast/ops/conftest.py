"""Operator tests run once per backend, on the device the backend is for.

The Triton backend runs on a GPU (marker ``gpu``), or on CPU tensors in Triton's interpreter where
TRITON_INTERPRET=1 is set before Triton is imported: ``test_triton_interpreter.py`` runs this folder
again in such a process.

The CPU backend takes vLLM's kernels for decode steps and for the prefill of one operator; the tests
of those run again without them ("cpu-torch").
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

from vllm_thinkfast.ops import vllm_kernels
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
        calls = inspect.getsource(metafunc.function)
        has_scan = metafunc.module.OPERATOR == "discrete_ssd" and "prefill(" in calls
        backends = [*_BACKENDS, "cpu-torch"] if "decode(" in calls or has_scan else _BACKENDS
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu-torch":
        monkeypatch.setattr(vllm_kernels, "find", lambda name: None)
        return "cpu"
    if request.param == "cpu":
        request.getfixturevalue("kernels_of_vllm")
    return request.param


@pytest.fixture(scope="session")
def kernels_of_vllm() -> None:
    """Loads them as an engine does; without a vLLM of this platform there are none to load."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    vllm_kernels.find.cache_clear()


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
