"""The host side of the Triton backend: what it launches, and that it does nothing else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from tests.vllm_thinkfast.ops.triton_calls import (
    CALLS,
    SIZES,
    arguments,
    entry_point,
    record,
    recorded,
)
from vllm_thinkfast.ops.backend import OPERATORS, load_operator

KERNELS = {
    ("discrete_ssd", "prefill"): ["_prefill_kernel"],
    ("discrete_ssd", "decode"): ["_decode_kernel"],
    ("discrete_ssd", "decode_int8"): ["_decode_kernel"],
    ("selective_scan", "prefill"): ["_prefill_kernel"],
    ("selective_scan", "decode"): ["_decode_kernel"],
    ("selective_scan", "decode_int8"): ["_decode_kernel"],
    ("causal_conv", "prefill"): ["_prefill_kernel", "_store_tail_kernel"],
    ("causal_conv", "decode"): ["_decode_kernel"],
}


@pytest.mark.parametrize(("operator", "entry", "size"), CALLS)
def test_results_come_from_the_kernels(operator, entry, size):
    result, launches = record(operator, entry, size, torch.float32)
    assert [kernel.fn.__name__ for kernel, *_ in launches] == KERNELS[operator, entry]
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.isnan().all(), "written by something else than a kernel"


@pytest.mark.parametrize(("operator", "entry", "size"), CALLS)
def test_no_tensor_is_read_by_the_host(operator, entry, size):
    """Allocation is all that may happen: anything else could wait for the device."""
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    args = arguments(operator, entry, size, torch.bfloat16)
    module = load_operator(operator, "triton")
    with recorded(module), Record():
        entry_point(module, entry)(*args)
    # The fixture that fills allocations with NaN adds the second one.
    assert called == {"aten.empty.memory_format", "aten.fill_.Scalar"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_launches_do_not_depend_on_contents(operator):
    """A CUDA graph of decode replays the launch whatever the slots are."""
    entry, size = "decode", SIZES[operator][0]
    module = load_operator(operator, "triton")
    seen = []
    for slots in ([1, 2, 4], [0, 0, 3]):
        args = arguments(operator, entry, size, torch.float32)
        args[1].copy_(torch.tensor(slots))
        with recorded(module) as launches:
            module.decode(*args)
        seen.append([
            (grid, [a for a in args if not isinstance(a, torch.Tensor)], options)
            for _, grid, args, options in launches
        ])  # fmt: skip
    assert seen[0] == seen[1]
