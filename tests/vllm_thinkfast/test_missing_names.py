"""A later vLLM that renamed, moved or extended what a patch in every process wraps.

What is gone costs a line in the log, no error; what moved is found; a new argument arrives.
"""

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_thinkfast import compat, cpu_patches, scheduler_patches


def put_back_in_engine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A patch also replaces what the engine imported; afterwards it shall be as before."""
    engine_core = sys.modules.get("vllm.v1.engine.core")
    if engine_core is not None:
        monkeypatch.setattr(engine_core, name, getattr(engine_core, name))


def our_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Without vLLM's own, which warns where it is imported for the first time."""
    return [record for record in caplog.records if record.name.startswith("vllm_thinkfast")]


def cache_planning() -> list[ModuleType]:
    """The modules that may have ``get_kv_cache_configs`` in this vLLM, older first."""
    names = [name for name in compat._CACHE_PLANNING if importlib.util.find_spec(name)]
    return [importlib.import_module(name) for name in names]


def test_memory_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for module in cache_planning():
        monkeypatch.delattr(module, "get_kv_cache_configs", raising=False)
    caplog.clear()  # of what vLLM says at its first import
    compat.register_memory_message(("LlambaForCausalLM",))
    assert not any(hasattr(module, "get_kv_cache_configs") for module in cache_planning())
    (record,) = our_records(caplog)
    assert "no get_kv_cache_configs" in record.getMessage()


def test_memory_message_of_a_function_that_moved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM 0.33 has it in another module, with an argument more."""

    def get_kv_cache_configs(*arguments: object) -> object:
        return arguments

    older = cache_planning()[0]
    caplog.clear()
    monkeypatch.delattr(older, "get_kv_cache_configs", raising=False)
    put_back_in_engine(monkeypatch, "get_kv_cache_configs")
    name = "vllm.v1.core.kv_cache_planning"
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    # It imports the older one before it has the function itself.
    compat._explain_lack_of_memory(("LlambaForCausalLM",), older.__name__)
    module.get_kv_cache_configs = get_kv_cache_configs  # type: ignore[attr-defined]
    compat.register_memory_message(("LlambaForCausalLM",))
    assert not hasattr(older, "get_kv_cache_configs")
    assert module.get_kv_cache_configs.thinkfast_original is get_kv_cache_configs
    assert module.get_kv_cache_configs(None, [], [], "groups") == (None, [], [], "groups")
    assert not caplog.records


@pytest.mark.parametrize("lookahead", [(), (0,), (2,)])
def test_hasher_with_lookahead(monkeypatch: pytest.MonkeyPatch, lookahead: tuple[int, ...]) -> None:
    """vLLM 0.33 calls it with a third argument; what is not 0 has to arrive, and forks nothing."""
    from vllm.v1.core import kv_cache_utils

    arrived: list[tuple[Any, ...]] = []

    def hasher(request: Any) -> list[bytes]:
        return []

    def get_request_block_hasher(*arguments: Any) -> Callable[[Any], list[bytes]]:
        arrived.append(arguments)
        return hasher

    monkeypatch.setattr(kv_cache_utils, "get_request_block_hasher", get_request_block_hasher)
    put_back_in_engine(monkeypatch, "get_request_block_hasher")
    compat._remember_prompt_hashes()
    found = kv_cache_utils.get_request_block_hasher(1, hash, *lookahead)
    assert arrived == [(1, hash, *lookahead)]
    assert (found is hasher) is any(lookahead)


@pytest.mark.parametrize("name", ["_sample", "_bookkeeping_sync"])
def test_cpu_seeds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The name that is left stays vLLM's own: half of the patch would be worse than none."""
    from vllm.platforms import current_platform
    from vllm.v1.worker import cpu_model_runner

    class Renamed:
        def _sample(self) -> None: ...

        def _bookkeeping_sync(self) -> None: ...

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    monkeypatch.setattr(cpu_model_runner, "CPUModelRunner", Renamed)
    monkeypatch.delattr(Renamed, name)
    before = dict(vars(Renamed))
    compat._restore_cpu_generators()
    assert dict(vars(Renamed)) == before
    (record,) = our_records(caplog)
    assert "no CPUModelRunner._sample or ._bookkeeping_sync" in record.getMessage()


def test_cpu_runner(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.worker import cpu_model_runner

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    monkeypatch.delattr(cpu_model_runner, "CPUModelRunner")
    compat._restore_cpu_generators()
    assert len(caplog.records) == 1


def scheduler_of(num_drafted: int, architecture: str, **attributes: object) -> Any:
    """An instance of a class like vLLM's scheduler, made after the patch was applied to it."""

    class Scheduler:
        def __init__(self, name: str) -> None:
            self.name = name
            self.num_spec_tokens = num_drafted
            model_config = SimpleNamespace(architecture=architecture)
            self.vllm_config = SimpleNamespace(model_config=model_config)
            self.scheduler_config = SimpleNamespace(max_num_seqs=4)
            vars(self).update(attributes)

    module = importlib.import_module("vllm.v1.core.sched.scheduler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Scheduler", Scheduler)
        scheduler_patches.register_scheduler_patches(("LlambaForCausalLM",))
        scheduler_patches.register_scheduler_patches(("LlambaForCausalLM",))
    return Scheduler("one")


def test_draft_lengths_of_scheduler() -> None:
    ours = scheduler_of(3, "LlambaForCausalLM", dynamic_sd_lookup=None)
    assert (ours.name, ours.dynamic_sd_lookup) == ("one", [3] * 5)
    by_user = scheduler_of(3, "LlambaForCausalLM", dynamic_sd_lookup=[0, 3, 2, 1, 1])
    assert by_user.dynamic_sd_lookup == [0, 3, 2, 1, 1]
    assert scheduler_of(0, "LlambaForCausalLM", dynamic_sd_lookup=None).dynamic_sd_lookup is None
    assert scheduler_of(3, "LlamaForCausalLM", dynamic_sd_lookup=None).dynamic_sd_lookup is None


def test_scheduler_without_table(caplog: pytest.LogCaptureFixture) -> None:
    assert scheduler_of(3, "LlamaForCausalLM").name == "one"
    assert not caplog.records
    assert scheduler_of(3, "LlambaForCausalLM").name == "one"
    (record,) = our_records(caplog)
    assert "no Scheduler.dynamic_sd_lookup" in record.getMessage()


def test_no_scheduler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module = importlib.import_module("vllm.v1.core.sched.scheduler")
    monkeypatch.delattr(module, "Scheduler")
    caplog.clear()
    scheduler_patches.register_scheduler_patches(("LlambaForCausalLM",))
    (record,) = our_records(caplog)
    assert "no Scheduler, which" in record.getMessage()


def test_llvmlite_is_hidden_from_vllms_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numba imported vLLM's own function fails; it is hidden for no longer than the call."""
    importlib.import_module("numba")
    dispatcher = importlib.import_module("vllm.triton_utils.dispatcher")
    original = getattr(dispatcher.register_kernels, "thinkfast_original", None)
    monkeypatch.setattr(dispatcher, "register_kernels", original or dispatcher.register_kernels)
    monkeypatch.setattr(dispatcher, "_registry", {})
    holder = ModuleType("thinkfast_kernel_holder")
    monkeypatch.setitem(sys.modules, holder.__name__, holder)
    override = {f"{holder.__name__}.kernel": lambda: "override"}
    holder.kernel = lambda: "original"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="_lib_fn_wrapper"):
        dispatcher.register_kernels(override)
    cpu_patches.register_llvmlite_fix()
    cpu_patches.register_llvmlite_fix()
    dispatcher.register_kernels(override)
    assert isinstance(holder.kernel, dispatcher.KernelOverride)
    assert "llvmlite.binding.ffi" in sys.modules


def test_dispatcher_without_register_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = importlib.import_module("vllm.triton_utils.dispatcher")
    monkeypatch.delattr(dispatcher, "register_kernels")
    cpu_patches.register_llvmlite_fix()
    assert "no register_kernels, which" in caplog.text


@pytest.mark.parametrize(
    ("values", "replaced", "expected"),
    [
        (torch.tensor([0.7, 0.0, 1.5]), (0, 1), [0.7, 0.7, 1.0, 1.5, 1.5, 1.5]),
        (torch.tensor([50, 3, 7], dtype=torch.int32), (0, 0), [50, 50, 3, 7, 7, 7]),
    ],
)
def test_sampling_settings_reach_the_drafted_tokens(
    values: torch.Tensor, replaced: tuple[int, int], expected: list[float]
) -> None:
    """vLLM's own function leaves the result as it was; the plugin's is in its place."""
    kernels = pytest.importorskip("vllm.utils.cpu_triton_utils")
    cpu_patches.register_draft_sampling_fix()
    assert kernels._expand_kernel_impl is cpu_patches.expand_to_tokens
    output = torch.full((6,), -1, dtype=values.dtype)
    before = values.clone()
    ends = torch.tensor([2, 3, 6], dtype=torch.int32)
    kernels._expand_kernel_impl(output, values, ends, *replaced, MAX_NUM_TOKENS=128)
    assert torch.equal(output, torch.tensor(expected, dtype=values.dtype))
    assert torch.equal(values, before)
