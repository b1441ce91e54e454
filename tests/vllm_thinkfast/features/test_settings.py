"""Features that are settings of an engine: each engine here is compared with a plain one.

Tokens must be equal wherever the arithmetic is the same; where a setting changes the precision,
log-probabilities must be near.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from vllm import EngineArgs
from vllm.config.cache import MambaCacheMode

from tests.vllm_thinkfast.features.adapted import (
    write_adapter,
    write_int8,
    write_process_reward_model,
)
from tests.vllm_thinkfast.features.conftest import (
    CHUNKED,
    NUM_REPETITIVE_TOKENS,
    NUM_TOKENS,
    PLAIN,
    PROMPTS,
    REPETITIVE,
    Plain,
)
from tests.vllm_thinkfast.features.run_drafts import run_drafts
from tests.vllm_thinkfast.models.engines import (
    EnginePool,
    greedy,
    greedy_params,
    log_probabilities,
    token_prompts,
)
from vllm_thinkfast import compat

pytestmark = pytest.mark.engine


def mixers(llm: Any) -> list[Any]:
    """The recurrent layers of an engine in this process."""
    config = llm.llm_engine.vllm_config.compilation_config
    return [layer for layer in config.static_forward_context.values() if hasattr(layer, "scan_op")]


@pytest.mark.feature("prefix caching, off (mode none)")
def test_no_prefix_caching(folder: Path, engines: EnginePool, plain: Plain) -> None:
    llm = engines.get(folder, **PLAIN, enable_prefix_caching=False)
    assert llm.llm_engine.vllm_config.cache_config.mamba_cache_mode == "none"
    assert greedy(llm, PROMPTS, NUM_TOKENS) == plain.tokens


@pytest.mark.feature("prefix caching, mode align, blocks of 32 tokens")
def test_prefix_caching_by_blocks(
    folder: Path, engines: EnginePool, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own kind, without forking: a second request starts at the last full block."""
    monkeypatch.setenv("VLLM_THINKFAST_FORK", "0")
    llm = engines.get(
        folder,
        **PLAIN,
        enable_prefix_caching=True,
        mamba_block_size=32,
        block_size=32,
        enforce_eager=True,
    )
    assert llm.llm_engine.vllm_config.cache_config.mamba_cache_mode == "align"
    assert greedy(llm, PROMPTS, NUM_TOKENS) == plain.tokens
    outputs = llm.generate(token_prompts(PROMPTS), greedy_params(NUM_TOKENS), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == plain.tokens
    assert [bool(output.num_cached_tokens) for output in outputs][-1], "nothing was cached"


@pytest.mark.feature("torch.compile")
def test_compiled(
    folder: Path, engines: EnginePool, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traced graph, but not through inductor: that takes a minute for each model."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's switch for that
    llm = engines.get(folder, **PLAIN, enforce_eager=False)
    compilation = llm.llm_engine.vllm_config.compilation_config
    assert (compilation.mode.name, compilation.backend) == ("DYNAMO_TRACE_ONCE", "eager")
    assert greedy(llm, PROMPTS, NUM_TOKENS) == plain.tokens


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, id="bfloat16"),
        pytest.param(torch.float16, id="float16", marks=pytest.mark.extra),
    ],
)
@pytest.mark.feature("state dtype bfloat16 and float16")
def test_state_dtype(
    folder: Path,
    engines: EnginePool,
    plain: Plain,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """States of half the size, written between chunks of the prompt."""
    expected = plain.log_probabilities
    # On machines with AVX512-BF16 vLLM 0.32 sets the state back to float32.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    name = str(dtype).removeprefix("torch.")
    llm = engines.get(
        folder, **PLAIN, **CHUNKED, mamba_cache_dtype=name, mamba_ssm_cache_dtype=name
    )
    assert {state.dtype for mixer in mixers(llm) for state in mixer.kv_cache} == {dtype}
    for found, wanted in zip(log_probabilities(llm, PROMPTS), expected, strict=True):
        error = (found.exp() - wanted.exp()).abs().max()
        assert error < 16 * torch.finfo(dtype).eps
    assert error > 0, "the state was not rounded"


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.extra)])
@pytest.mark.feature("model dtype bfloat16 and float16")
def test_model_dtype(folder: Path, engines: EnginePool, plain: Plain, dtype: str) -> None:
    expected = plain.log_probabilities
    llm = engines.get(folder, **{**PLAIN, "dtype": dtype})
    for found, wanted in zip(log_probabilities(llm, PROMPTS), expected, strict=True):
        assert (found.exp() - wanted.exp()).abs().mean() < 2e-3


@pytest.mark.feature("LoRA on the linear layers")
def test_lora(folder: Path, engines: EnginePool, plain: Plain, tmp_path: Path) -> None:
    """Two adapters and the base model in one batch: as three models with merged weights."""
    from vllm.lora.request import LoRARequest

    expected, requests = [plain.tokens], [None]
    for i in (1, 2):
        adapter, merged = tmp_path / f"adapter{i}", tmp_path / f"merged{i}"
        write_adapter(folder, adapter, merged, seed=i)
        expected.append(greedy(engines.get(merged, **PLAIN), PROMPTS, NUM_TOKENS))
        requests.append(LoRARequest(f"adapter{i}", i, str(adapter)))
    assert expected[0] != expected[1] != expected[2]
    llm = engines.get(folder, **PLAIN, enable_lora=True, max_loras=2, max_lora_rank=8)
    cases = [(p, request) for request in requests for p in token_prompts(PROMPTS)]
    outputs = llm.generate(
        [prompt for prompt, _ in cases],
        greedy_params(NUM_TOKENS),
        lora_request=[request for _, request in cases],
        use_tqdm=False,
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert [tokens[i : i + len(PROMPTS)] for i in range(0, len(tokens), len(PROMPTS))] == expected


@pytest.mark.feature("int8 weights (compressed-tensors, W8A8)")
def test_int8(folder: Path, engines: EnginePool, tmp_path: Path) -> None:
    """Near the same rounded weights in float32: what is left is the rounding of activations."""
    from vllm_thinkfast.checkpoints.convert import convert_checkpoint

    convert_checkpoint(folder, tmp_path / "house")
    write_int8(tmp_path / "house", tmp_path / "int8", tmp_path / "rounded")
    expected = log_probabilities(engines.get(tmp_path / "rounded", **PLAIN), PROMPTS)
    llm = engines.get(tmp_path / "int8", **PLAIN)
    assert mixers(llm)
    for found, wanted in zip(log_probabilities(llm, PROMPTS), expected, strict=True):
        assert (found.exp() - wanted.exp()).abs().mean() < 2e-3


@pytest.mark.feature("pooling: hidden states")
def test_hidden_states(folder: Path, engines: EnginePool, plain: Plain) -> None:
    """The last hidden states times the head are the logits of the generating engine."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    head = tensors.get("lm_head.weight")
    if head is None:
        head = next(t for name, t in tensors.items() if "embed" in name)
    settings = {**PLAIN, "runner": "pooling", "convert": "embed"}
    llm = engines.get(folder, **settings, pooler_config={"task": "token_embed"})
    from vllm import PoolingParams

    params = PoolingParams(use_activation=False)
    outputs = llm.encode(
        token_prompts(PROMPTS), pooling_params=params, pooling_task="token_embed", use_tqdm=False
    )
    for output, wanted in zip(outputs, plain.log_probabilities, strict=True):
        found = (output.outputs.data.float() @ head.float().T).log_softmax(-1)[:-1]
        assert (found - wanted).abs().max() < 2e-3


@pytest.mark.feature("pooling: process reward model (a linear head on every token)")
def test_process_reward_model(
    folder: Path, engines: EnginePool, plain: Plain, tmp_path: Path
) -> None:
    """A head made of two rows of the LM head: its two labels are as likely as those two tokens."""
    good, bad = 5, 9
    write_process_reward_model(folder, tmp_path / "scored", (good, bad))
    settings = {**PLAIN, "runner": "pooling", "convert": "classify"}
    llm = engines.get(tmp_path / "scored", **settings, pooler_config={"task": "token_classify"})
    outputs = llm.encode(token_prompts(PROMPTS), pooling_task="token_classify", use_tqdm=False)
    for output, wanted in zip(outputs, plain.log_probabilities, strict=True):
        found = output.outputs.data.float()[:-1, 0]
        assert (found - torch.sigmoid(wanted[:, good] - wanted[:, bad])).abs().max() < 1e-3


@pytest.mark.feature("speculative decoding, n-gram")
def test_ngram(folder: Path, plain: Plain) -> None:
    """Same tokens, some of them from accepted drafts, others after rejected ones."""
    if not compat.has_drafts():
        pytest.skip("refused with this vLLM: tests/vllm_thinkfast/models/test_speculation.py")
    tokens, num_drafted, num_accepted, _ = run_drafts(folder, REPETITIVE, NUM_REPETITIVE_TOKENS)
    assert tokens == plain.repetitive
    assert 0 < num_accepted < num_drafted


@pytest.mark.feature("mamba cache mode all", refused="vLLM 0.32 has no such mode any more")
def test_cache_mode_all(folder: Path, engines: EnginePool) -> None:
    if "all" in get_args(MambaCacheMode):
        pytest.skip("this vLLM has the mode, and takes align for models without it")
    if {f.name: f.default for f in fields(EngineArgs)}["mamba_cache_mode"] is None:
        pytest.skip("this vLLM derives the mode, and says that it ignores the option")
    with pytest.raises(ValueError, match="mamba_cache_mode"):
        engines.get(folder, **PLAIN, mamba_cache_mode="all")
