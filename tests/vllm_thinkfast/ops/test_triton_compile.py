"""Every kernel compiles for NVIDIA and AMD at the published sizes; this needs no device."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.vllm_thinkfast.ops.conftest import INTERPRETED
from tests.vllm_thinkfast.ops.triton_calls import CALLS, record

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_MEMORY_BYTES = 48 * 1024
"""What every NVIDIA and AMD device gives a program without opting in to more."""

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.bool: "i1",
    torch.int8: "i8",
}  # fmt: skip

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


def compiled(kernel, args, options, target):
    """Compiles a recorded launch: types from the arguments, None and special 1s as constants."""
    signature, constants = {}, {}
    given = dict(zip(kernel.arg_names, args, strict=False))
    for parameter in kernel.params:
        name = parameter.name
        value = given.get(name, options.get(name))
        is_special = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
        elif parameter.is_constexpr or value is None or (value == 1 and is_special):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    chosen = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
    return triton.compile(ASTSource(kernel, signature, constants), target=target, options=chosen)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("operator", "entry", "size"), CALLS)
def test_compiles(operator, entry, size, target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, launches = record(operator, entry, size, torch.bfloat16)
    assert launches
    for kernel, _, args, options in launches:
        binary = compiled(kernel, args, options, TARGETS[target])
        assert binary.metadata.shared <= SHARED_MEMORY_BYTES
