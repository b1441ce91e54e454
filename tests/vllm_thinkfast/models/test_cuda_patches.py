"""What is patched for engines with CUDA graphs, without a GPU."""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.vllm_thinkfast.models.engines import EnginePool, greedy
from vllm_thinkfast import cuda_patches
from vllm_thinkfast.layers import recurrent_mixer

OURS = "LlambaForCausalLM"
METHOD = "_determine_batch_execution_and_padding"


def runner(
    monkeypatch: pytest.MonkeyPatch, architecture: str, num_done: list[int], num_prompt: list[int]
) -> Any:
    """Like vLLM's V1 runner; the batch has room for more sequences than it holds."""

    class GPUModelRunner:
        def _determine_batch_execution_and_padding(
            self,
            num_tokens: int,
            num_reqs: int,
            force_uniform_decode: bool | None = None,
        ) -> tuple[int, int, bool | None]:
            return num_tokens, num_reqs, force_uniform_decode

    module = ModuleType(cuda_patches._RUNNER)
    module.GPUModelRunner = GPUModelRunner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, cuda_patches._RUNNER, module)
    cuda_patches._look_for_prompts((OURS,))
    cuda_patches._look_for_prompts((OURS,))
    made: Any = GPUModelRunner()
    made.model_config = SimpleNamespace(architectures=[architecture])
    made.input_batch = SimpleNamespace(
        num_computed_tokens_cpu=np.array([*num_done, 0]), num_prompt_tokens=np.array(num_prompt)
    )
    return made


@pytest.mark.parametrize(
    ("num_done", "num_prompt", "expected"),
    [
        ([5, 7], [5, 6, 9], None),  # the third is of no sequence in the batch
        ([5, 0], [5, 1, 9], False),  # a prompt of one token
        ([5, 8], [5, 9, 9], False),  # the last one of a prompt
    ],
)
def test_steps_with_prompts_are_no_uniform_decodes(
    monkeypatch: pytest.MonkeyPatch,
    num_done: list[int],
    num_prompt: list[int],
    expected: bool | None,
) -> None:
    made = runner(monkeypatch, OURS, num_done, num_prompt)
    determine = getattr(made, METHOD)
    assert determine(2, 2) == (2, 2, expected)
    assert determine(num_tokens=2, num_reqs=2) == (2, 2, expected)
    # What captures graphs says itself what it is, whatever the batch holds.
    assert determine(2, 2, force_uniform_decode=True) == (2, 2, True)


def test_other_models_dispatch_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch, "Mamba2ForCausalLM", [0], [1])
    assert getattr(made, METHOD)(1, 1) == (1, 1, None)


def test_runner_without_the_method(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType(cuda_patches._RUNNER)
    module.GPUModelRunner = type("GPUModelRunner", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, cuda_patches._RUNNER, module)
    cuda_patches._look_for_prompts((OURS,))
    (record,) = caplog.records
    assert f"no GPUModelRunner.{METHOD}" in record.getMessage()


@pytest.mark.engine
def test_dispatch_in_an_engine(
    family_folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs the runner decides the same, though there are no graphs to choose from."""
    llm = engines.get(family_folder)
    core = llm.llm_engine.engine_core.engine_core
    made = core.model_executor.driver_worker.worker.model_runner
    if not hasattr(type(made), METHOD):
        pytest.skip("vLLM's V2 runner, which is not patched")
    parameters = list(inspect.signature(getattr(type(made), METHOD)).parameters)
    assert parameters[1:3] == ["num_tokens", "num_reqs"]
    dispatcher, asked = made.cudagraph_dispatcher, []
    dispatch = dispatcher.dispatch

    def noted(*args: Any, **named: Any) -> Any:
        asked.append(named["uniform_decode"])
        return dispatch(*args, **named)

    monkeypatch.setattr(dispatcher, "dispatch", noted)
    greedy(llm, [[7], [8]], 4)
    # vLLM may have scheduled a step ahead. Without the patch all are uniform decodes.
    assert asked[:4] == [False, True, True, True]


@pytest.mark.parametrize("is_capturing", [True, False])
def test_operators_are_no_part_of_breakable_graphs(
    monkeypatch: pytest.MonkeyPatch, is_capturing: bool
) -> None:
    module = pytest.importorskip(cuda_patches._BREAKABLE)
    calls: list[Any] = []

    def op(text: str) -> None:
        calls.append(text)

    cuda_patches.outside_of_graphs(op)("at once")
    assert calls.pop() == "at once"
    monkeypatch.setattr(module, "is_breakable_cudagraph_enabled", lambda: True)
    waiting: list[Callable[[], None]] = []
    capture = SimpleNamespace(_capturing=is_capturing, add_eager=waiting.append)
    monkeypatch.setattr(module.BreakableCUDAGraphCapture, "current", lambda: capture)
    cuda_patches.outside_of_graphs(op)("text")
    assert calls == ([] if is_capturing else ["text"])
    for call in waiting:
        call()
    assert calls == ["text"]


def test_vllm_without_breakable_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert cuda_patches.outside_of_graphs(repr) is repr


def test_breakable_graphs_under_another_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = pytest.importorskip(cuda_patches._BREAKABLE)
    monkeypatch.delattr(module, "eager_break_during_capture")
    assert cuda_patches.outside_of_graphs(repr) is repr
    (record,) = caplog.records
    assert "no eager_break_during_capture" in record.getMessage()


def test_mixers_operator_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered once per process: seen in a copy of the module."""
    registered: dict[str, Any] = {}
    monkeypatch.setattr(
        importlib.import_module("vllm.utils.torch_utils"),
        "direct_register_custom_op",
        lambda **named: registered.update(named),
    )
    monkeypatch.setattr(cuda_patches, "outside_of_graphs", lambda op: functools.partial(op))
    spec = importlib.util.spec_from_file_location("copy_of_mixer", recurrent_mixer.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert registered["op_func"].func is copy._thinkfast_mixer


@pytest.mark.parametrize("metadata", [None, {}, {"model.layers.1.attn": object()}])
def test_runs_without_metadata_of_a_mixer(
    monkeypatch: pytest.MonkeyPatch, metadata: dict[str, object] | None
) -> None:
    """vLLM's profiling has none at all, its tuning of FlashInfer those of attention layers."""
    context = SimpleNamespace(attn_metadata=metadata)
    monkeypatch.setattr(recurrent_mixer, "get_forward_context", lambda: context)
    mixer: Any = SimpleNamespace(prefix="model.layers.0.mixer")
    nothing: Any = None
    recurrent_mixer.RecurrentMixer.run(mixer, nothing, nothing, nothing)


@pytest.mark.parametrize(
    ("device", "mode", "expected"),
    [
        ("cuda", "FULL_AND_PIECEWISE", True),
        ("cuda", "FULL_DECODE_ONLY", True),
        ("cuda", "PIECEWISE", False),
        ("cuda", "NONE", False),
        ("cpu", "FULL_AND_PIECEWISE", False),
    ],
)
def test_has_graphs(device: str, mode: str, expected: bool) -> None:
    from vllm.config import CUDAGraphMode

    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
        device_config=SimpleNamespace(device=SimpleNamespace(type=device)),
    )
    assert cuda_patches.has_graphs(config) is expected


@pytest.mark.engine
def test_reference_operators_are_refused_with_graphs(
    family_folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_THINKFAST_OPS_BACKEND", "reference")
    monkeypatch.setattr(cuda_patches, "has_graphs", lambda _: True)
    with pytest.raises(ValueError, match="add --enforce-eager"):
        engines.get(family_folder)
