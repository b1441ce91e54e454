"""Features of requests and of a running engine: one plain engine per model shows them all."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_thinkfast.features.conftest import PLAIN, PROMPTS, folder_of
from tests.vllm_thinkfast.models.engines import (
    EnginePool,
    greedy,
    log_probabilities,
    token_prompts,
)

pytestmark = pytest.mark.engine


@pytest.fixture
def llm(folder: Path, engines: EnginePool) -> Any:
    """The model's plain engine."""
    return engines.get(folder, **PLAIN)


def structured(llm: Any, **grammar: Any) -> str:
    """A sampled text that has to follow a grammar."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = SamplingParams(
        temperature=1.0,
        seed=3,
        max_tokens=64,
        structured_outputs=StructuredOutputsParams(**grammar),
    )
    (output,) = llm.generate(["one two"], params, use_tqdm=False)
    return output.outputs[0].text


@pytest.mark.feature("structured output")
def test_structured_output(llm: Any) -> None:
    """Random weights would never write any of these by themselves."""
    assert re.fullmatch(r"[0-9]{3}-[a-c]{2}", structured(llm, regex=r"[0-9]{3}-[a-c]{2}"))
    assert structured(llm, choice=["yes", "no"]) in ("yes", "no")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert json.loads(structured(llm, json=schema))["a"] in range(10)


@pytest.mark.feature("logprobs")
def test_logprobs(llm: Any) -> None:
    """Of generated tokens and of the prompt: one distribution, whichever way it is asked for."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6, logprobs=-1, detokenize=False)
    for prompt in PROMPTS[:2]:
        (output,) = llm.generate(token_prompts([prompt]), params, use_tqdm=False)
        sample = output.outputs[0]
        (whole,) = log_probabilities(llm, [prompt + list(sample.token_ids)])
        for i, (token, row) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
            decoded = torch.tensor([row[j].logprob for j in range(len(row))])
            assert math.isclose(decoded.exp().sum(), 1, abs_tol=1e-4)
            assert int(decoded.argmax()) == token
            assert (decoded - whole[len(prompt) - 1 + i]).abs().max() < 2e-3


@pytest.mark.feature("beam search")
def test_beam_search(llm: Any) -> None:
    """The two best of all pairs of tokens, found by hand: with a beam of half the vocabulary."""
    from vllm.sampling_params import BeamSearchParams

    prompt = PROMPTS[0]
    (rows,) = log_probabilities(llm, [[*prompt, 3]])
    first = rows[-1]
    kept = first.topk(len(first) // 2).indices
    rows = log_probabilities(llm, [[*prompt, int(token), 3] for token in kept])
    scores = first[kept][:, None] + torch.stack([row[-1] for row in rows])
    best = scores.flatten().topk(2)
    expected = [[int(kept[i // len(first)]), int(i) % len(first)] for i in best.indices]
    params = BeamSearchParams(beam_width=len(kept), max_tokens=2, ignore_eos=True)
    (output,) = llm.beam_search(token_prompts([prompt]), params)
    assert [s.tokens[-2:] for s in output.sequences[:2]] == expected
    found = torch.tensor([s.cum_logprob for s in output.sequences[:2]])
    assert torch.allclose(found, best.values, atol=4e-3)


@pytest.mark.feature("weight reload")
def test_reload_weights(
    llm: Any, family: str, folder: Path, engines: EnginePool, tmp_path: Path
) -> None:
    """Other weights come into a running engine, and the first ones back."""
    other = folder_of(family, tmp_path, seed=12)
    before = greedy(llm, PROMPTS, 8)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert llm.reset_prefix_cache()
    reloaded = greedy(llm, PROMPTS, 8)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    assert llm.reset_prefix_cache()
    assert greedy(llm, PROMPTS, 8) == before != reloaded
    assert greedy(engines.get(other, **PLAIN), PROMPTS, 8) == reloaded


@pytest.mark.feature("metrics of state memory")
def test_state_memory_metrics(llm: Any) -> None:
    """The figures are the bytes of one slot in the tensors that the engine allocated."""
    from prometheus_client import REGISTRY

    from vllm_thinkfast.state_metrics import StateMemoryLogger

    config = llm.llm_engine.vllm_config
    logger = StateMemoryLogger(config, engine_index=7)
    logger.record(SimpleNamespace(num_running_reqs=3), None)

    def value(name: str) -> float:
        labels = {"model_name": config.model_config.served_model_name, "engine": "7"}
        return REGISTRY.get_sample_value(f"thinkfast:{name}", labels)

    layers = config.compilation_config.static_forward_context.values()
    mixers = [layer.kv_cache for layer in layers if isinstance(layer.kv_cache, list | tuple)]
    conv, ssm = (sum(states[i][0].nbytes for states in mixers) for i in (0, 1))
    assert value("conv_state_bytes_per_sequence") == conv > 0
    assert value("ssm_state_bytes_per_sequence") == ssm > 0
    assert value("running_state_bytes") == 3 * (conv + ssm)
    caches = [layer.kv_cache for layer in layers if isinstance(layer.kv_cache, torch.Tensor)]
    per_token = sum(c[0].nbytes // config.cache_config.block_size for c in caches)
    assert value("kv_bytes_per_token") == per_token


@pytest.mark.feature("metrics of state memory")
def test_state_memory_metrics_entry_point(family: str) -> None:
    """``vllm serve`` finds the metrics by itself."""
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    from vllm_thinkfast.state_metrics import StateMemoryLogger

    assert StateMemoryLogger in load_stat_logger_plugin_factories()


@pytest.mark.feature(
    "sleep and wake", refused="vLLM has no sleep mode on CPUs: its allocator is for GPUs"
)
def test_sleep_is_refused(folder: Path, engines: EnginePool) -> None:
    with pytest.raises(ValueError, match=r"[Ss]leep mode is not supported"):
        engines.get(folder, enable_sleep_mode=True)


@pytest.mark.feature(
    "stochastic rounding of states",
    refused="it belongs to vLLM's own Mamba-2 kernels for GPUs, which these models do not use",
)
def test_stochastic_rounding_is_refused(folder: Path, engines: EnginePool) -> None:
    settings = {"mamba_ssm_cache_dtype": "float16", "enable_mamba_cache_stochastic_rounding": True}
    with pytest.raises(ValueError, match=r"stochastic"):
        engines.get(folder, **settings)
