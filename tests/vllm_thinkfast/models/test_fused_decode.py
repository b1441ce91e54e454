"""Which decode steps go through ``ops.fused_decode``; what it computes is tested there."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.reference.published_models import reference_greedy
from tests.vllm_thinkfast.models.engines import EnginePool, greedy
from vllm_thinkfast.layers.mamba_in_llama import Mamba2Mixer
from vllm_thinkfast.layers.recurrent_mixer import RecurrentMixer
from vllm_thinkfast.ops import fused_decode

pytestmark = pytest.mark.engine

PROMPT, NEW_TOKENS = [3, 14, 15], 8
FUNCTIONS = ("conv_ssd", "conv_scan")


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        function = getattr(fused_decode, name)

        def counted(*arguments: Any) -> None:
            calls[name] += 1
            function(*arguments)

        monkeypatch.setattr(fused_decode, name, counted)

    for name in FUNCTIONS:
        count(name)
    return calls


def _mixers(llm: Any) -> list[RecurrentMixer]:
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, RecurrentMixer)]


def test_float32(family_folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of every layer, but those of Mamba-2 layers of hybrids; the text is the same."""
    llm = engines.get(family_folder)
    mixers = _mixers(llm)
    num_fused = sum(not isinstance(mixer, Mamba2Mixer) for mixer in mixers)
    expected = reference_greedy(family_folder, PROMPT, NEW_TOKENS)
    calls = _count_calls(monkeypatch)
    assert greedy(llm, [PROMPT], NEW_TOKENS)[0] == expected
    # Once per layer and token, and perhaps in a step that vLLM scheduled ahead.
    assert calls.total() in (num_fused * (NEW_TOKENS - 1), num_fused * NEW_TOKENS)
    calls.clear()
    for mixer in mixers:
        monkeypatch.setitem(mixer.__dict__, "_fuses_decode", False)
    assert greedy(llm, [PROMPT], NEW_TOKENS)[0] == expected
    assert not calls


def test_bfloat16(
    family_folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _count_calls(monkeypatch)
    assert len(greedy(engines.get(family_folder, dtype="bfloat16"), [PROMPT], NEW_TOKENS)[0]) == 8
    assert not calls
