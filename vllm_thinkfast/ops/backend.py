"""Which implementation an operator uses. Chosen once, by name; there is no silent fallback."""

import importlib
from types import ModuleType
from typing import Literal, get_args

from vllm_thinkfast import envs

Backend = Literal["cpu", "triton", "reference"]
OPERATORS = ("discrete_ssd", "selective_scan", "causal_conv")


def choose_backend(device_type: str) -> Backend:
    """The backend for tensors on a device.

    Args:
        device_type: ``torch.device.type``.

    Returns:
        "triton" on CUDA and ROCm, "cpu" on CPU, or what VLLM_THINKFAST_OPS_BACKEND names.

    Raises:
        ValueError: no backend for the device, or an unknown name in the variable.
    """
    named = envs.ops_backend()
    if named is not None:
        if named not in get_args(Backend):
            raise ValueError(
                f"{envs.OPS_BACKEND}={named!r}; accepted: {', '.join(get_args(Backend))}."
            )
        return named  # type: ignore[return-value]
    if device_type == "cpu":
        return "cpu"
    if device_type == "cuda":  # torch's name for ROCm devices too
        return "triton"
    raise ValueError(
        f"no operators for device {device_type!r}; accepted: cpu, cuda. "
        f"{envs.OPS_BACKEND}=reference runs the slow plain-torch ones anywhere."
    )


def load_operator(operator: str, backend: Backend) -> ModuleType:
    """The module that implements an operator in a backend."""
    assert operator in OPERATORS, operator
    return importlib.import_module(f"vllm_thinkfast.ops.{operator}.{backend}")
