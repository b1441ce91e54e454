"""8-bit SSM states in the cache: engines with VLLM_THINKFAST_SSM_STATE=int8.

Tokens are not those of float32 states; they are near, and the same however they are scheduled.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_thinkfast.features.conftest import CHUNKED, PLAIN, PROMPTS, REPETITIVE, Plain
from tests.vllm_thinkfast.features.run_drafts import run_drafts
from tests.vllm_thinkfast.features.test_settings import mixers
from tests.vllm_thinkfast.models.engines import (
    EnginePool,
    greedy,
    log_probabilities,
    random_prompts,
    token_prompts,
)
from vllm_thinkfast import compat, envs

pytestmark = pytest.mark.engine

NUM_TOKENS = 48
LARGEST_ERROR = 0.03
"""Of probabilities, after up to six roundings of a state. Measured: 0.007."""


@pytest.fixture
def llm(folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model's engine with 8-bit states."""
    monkeypatch.setenv(envs.SSM_STATE, "int8")
    return engines.get(folder, **PLAIN)


@pytest.mark.feature("8-bit state")
def test_log_probabilities(
    folder: Path, engines: EnginePool, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts in chunks of 16 tokens: a state is rounded up to six times."""
    expected = plain.log_probabilities
    monkeypatch.setenv(envs.SSM_STATE, "int8")
    llm = engines.get(folder, **PLAIN, **CHUNKED)
    for mixer in mixers(llm):
        _, ssm, scales = mixer.kv_cache
        assert (ssm.dtype, scales.dtype) == (torch.int8, torch.float32)
        assert ssm.shape[:-1] == scales.shape
    for found, wanted in zip(log_probabilities(llm, PROMPTS), expected, strict=True):
        error = (found.exp() - wanted.exp()).abs().max()
        assert error < LARGEST_ERROR
    assert error > 0, "the state was not rounded"


@pytest.mark.feature("8-bit state")
def test_alone_and_batched(llm: Any) -> None:
    """Rounding depends neither on the slot nor on the neighbours."""
    prompts = random_prompts([1, 2, 5, 17, 33, 64, 100, 129], 150, seed=4)
    alone = [greedy(llm, [prompt], NUM_TOKENS)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) > 4
    assert greedy(llm, prompts, NUM_TOKENS) == alone
    assert greedy(llm, prompts[::-1], NUM_TOKENS) == alone[::-1]


@pytest.mark.feature("8-bit state")
def test_samples_and_prefix_cache(llm: Any) -> None:
    """One prefill for all samples; the state that they are copies of has its scales with it."""
    from vllm import SamplingParams

    (prompt,) = random_prompts([130], 150, seed=5)
    assert llm.reset_prefix_cache()

    def params(seed: int, n: int) -> Any:
        return SamplingParams(
            n=n, seed=seed, temperature=1.0, max_tokens=24, ignore_eos=True, detokenize=False
        )

    request = token_prompts([prompt])
    (first,) = llm.generate(request, params(7, 6), use_tqdm=False)
    samples = [list(sample.token_ids) for sample in first.outputs]
    assert len({tuple(tokens) for tokens in samples}) > 3
    # vLLM gives the samples of a request the seeds that follow the request's.
    outputs = llm.generate(
        token_prompts([prompt] * 6), [params(7 + i, 1) for i in range(6)], use_tqdm=False
    )
    assert [list(output.outputs[0].token_ids) for output in outputs] == samples
    if compat.fork_obstacle() is None:
        assert all(output.num_cached_tokens == len(prompt) - 1 for output in outputs)
    assert llm.reset_prefix_cache()
    (again,) = llm.generate(request, params(7, 6), use_tqdm=False)
    assert [list(sample.token_ids) for sample in again.outputs] == samples


@pytest.mark.feature("8-bit state")
def test_bytes(llm: Any, folder: Path) -> None:
    """What ``thinkfast state-size`` says and the metrics show is what was allocated."""
    from vllm_thinkfast.checkpoints.config_reader import read_config
    from vllm_thinkfast.state_cache import bytes_per_sequence
    from vllm_thinkfast.state_metrics import _engine_bytes_per_sequence

    stated = bytes_per_sequence(read_config(folder), dtype=torch.float32, ssm_dtype=torch.int8)
    layers = mixers(llm)
    assert stated.conv_bytes == sum(layer.kv_cache[0][0].nbytes for layer in layers)
    found = sum(state[0].nbytes for layer in layers for state in layer.kv_cache[1:])
    assert stated.ssm_bytes == found > 0
    assert _engine_bytes_per_sequence(llm.llm_engine.vllm_config) == stated
    (specs,) = llm.collective_rpc("get_kv_cache_spec")
    pages = [compat.state_bytes(specs[layer.prefix]) for layer in layers]
    assert sum(pages) == stated.conv_bytes + stated.ssm_bytes


@pytest.mark.extra
@pytest.mark.feature("8-bit state")
def test_drafts(folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speculative decoding keeps and copies scales with their states: same tokens as without.

    A speculating engine has no prefix cache, and so does not round the state before a prompt's last
    token.
    """
    if not compat.has_drafts():
        pytest.skip("refused with this vLLM: tests/vllm_thinkfast/models/test_speculation.py")
    monkeypatch.setenv(envs.SSM_STATE, "int8")
    llm = engines.get(folder, **PLAIN, enable_prefix_caching=False)
    expected = greedy(llm, REPETITIVE, NUM_TOKENS)
    tokens, num_drafted, num_accepted, _ = run_drafts(folder, REPETITIVE, NUM_TOKENS)
    assert 0 < num_accepted < num_drafted
    assert tokens == expected


@pytest.mark.feature("8-bit state")
def test_contradiction(folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(envs.SSM_STATE, "int8")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match=r"SSM_STATE=int8 and --mamba-ssm-cache-dtype bfloat16"):
        engines.get(folder, **PLAIN, mamba_ssm_cache_dtype="bfloat16")
