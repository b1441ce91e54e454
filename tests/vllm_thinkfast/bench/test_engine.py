"""The bench's engine, and memory: what ``state-size`` says is what the engine allocates."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_thinkfast.bench import worker
from vllm_thinkfast.bench.settings import Settings, parse_cells
from vllm_thinkfast.bench.shapes import write_folder
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.state_cache import BytesPerSequence, bytes_per_sequence

pytestmark = pytest.mark.engine

CACHE_BYTES = 2 * 2**20
LENGTHS = ((12, 12), (32, 32))
NUM_PROMPT_TOKENS, NUM_TOKENS = 12, 12


def options(lengths: str = "32+32", **changes: Any) -> dict[str, Any]:
    cells, _ = parse_cells("1", lengths, "", None)
    settings = Settings(
        cells=cells,
        rounds=1,
        load_format="dummy",
        dtype="float32",
        ssm_dtype="float32",
        threads=1,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        kv_cache_bytes=CACHE_BYTES,
        engines="together",
        seed=0,
        engine_options={"enforce_eager": True, **changes},
    )
    return settings.llm_options()


def close(engine: worker.Engine) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=["llamba", "mambainllama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bench") / request.param, request.param, "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[worker.Engine]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as `process.Worker` does
    engine = worker.Engine(str(folder), options())
    yield engine
    close(engine)


@pytest.fixture(scope="module")
def stated(folder: Path) -> BytesPerSequence:
    """What ``thinkfast state-size`` prints."""
    return bytes_per_sequence(read_config(folder), dtype=torch.float32, ssm_dtype=torch.float32)


def test_state_size_is_what_is_allocated(engine: worker.Engine, stated: BytesPerSequence) -> None:
    """Bytes of one slot in the tensors that vLLM bound to the layers."""
    layers = engine.config.compilation_config.static_forward_context.values()
    slots = [layer.kv_cache for layer in layers if hasattr(layer, "get_state_shape")]
    assert stated.conv_bytes == sum(conv[0].nbytes for conv, _ in slots)
    assert stated.ssm_bytes == sum(ssm[0].nbytes for _, ssm in slots)
    cost = engine.describe(LENGTHS)["step_cost"]
    assert cost["state_bytes"] == stated.conv_bytes + stated.ssm_bytes
    assert cost["kv_bytes_per_token"] == stated.kv_bytes_per_token
    assert 4 * cost["state_elements"] == stated.ssm_bytes


def test_parameters(engine: worker.Engine, folder: Path) -> None:
    """Counted from the config; the engine's modules have packed theirs."""
    described = engine.describe(LENGTHS)
    from vllm_thinkfast.bench.shapes import num_parameters

    assert described["num_parameters"] == num_parameters(read_config(folder))
    assert described["step_cost"]["weight_bytes"] == 4 * described["num_parameters"]


def test_cache_bytes(engine: worker.Engine) -> None:
    """What the engine was given; groups of layers that share the memory count once."""
    described = engine.describe(LENGTHS)
    assert 0.9 * CACHE_BYTES < described["cache_bytes"] <= CACHE_BYTES
    assert engine.block_bytes * described["num_blocks"] == described["cache_bytes"]


def test_measure(engine: worker.Engine, stated: BytesPerSequence) -> None:
    found = engine.measure("separate", 4, NUM_PROMPT_TOKENS, NUM_TOKENS, seed=0)
    assert found["most_running"] == 4
    assert found["num_preempted"] == 0
    assert found["num_prefilled_tokens"] == 4 * NUM_PROMPT_TOKENS
    # The last step of the prefill may take a second one, that of the prompts' last tokens.
    assert NUM_TOKENS - 3 <= found["num_decode_steps"] <= NUM_TOKENS - 1
    assert found["step_s_least"] <= found["step_s"] <= found["step_s_most"]
    assert found["prefill_s"] < found["seconds"]
    assert found["tokens_per_s"] == pytest.approx(4 * NUM_TOKENS / found["seconds"])
    assert found["peak_memory_bytes"]["process"] > 2**27
    assert found["peak_cache_bytes"] >= 4 * stated.total(0)


def test_measure_samples(engine: worker.Engine) -> None:
    """One prompt: prefilled once, and one token for each further sample."""
    found = engine.measure("samples", 4, NUM_PROMPT_TOKENS, NUM_TOKENS, seed=0)
    assert found["most_running"] == 4
    assert found["num_prefilled_tokens"] == NUM_PROMPT_TOKENS + 3


def test_warm_up_prefills_as_many_tokens_at_once(
    engine: worker.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the cell does; at first, matrix products of a new size are slower."""
    steps = []
    original = engine._prompts

    def prompts(seed: int, batch: int, num_tokens: int, mode: str) -> Any:
        steps.append((batch, num_tokens))
        return original(seed, batch, num_tokens, mode)

    monkeypatch.setattr(engine, "_prompts", prompts)
    engine.warm_up(2, "separate", NUM_PROMPT_TOKENS)
    assert steps[-1] == (1, NUM_PROMPT_TOKENS)


def test_warm_up_leaves_no_trace(engine: worker.Engine) -> None:
    engine.warm_up(2, "samples", NUM_PROMPT_TOKENS)
    assert not engine.engine.has_unfinished_requests()


def test_shortest_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up fits into an engine for one prompt token and two generated ones."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engine = worker.Engine(str(write_folder(tmp_path / "m", "llamba", "tiny")), options("1+2"))
    try:
        for mode in ("separate", "samples"):
            engine.warm_up(2, mode, 1)
            found = engine.measure(mode, 2, 1, 2, seed=0)
            assert found["tokens_per_s"] == pytest.approx(2 * 2 / found["seconds"])
    finally:
        close(engine)


def test_parameters_of_a_model_in_parts() -> None:
    """A step reads only a part of a model with towers or experts, and which one is not known."""
    from transformers import Gemma3Config, LlamaConfig, LlavaConfig, MixtralConfig

    for config in (Gemma3Config(), LlavaConfig(), MixtralConfig()):
        assert worker.count_parameters(config) == (None, 0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    count, embedding = worker.count_parameters(LlamaConfig(num_hidden_layers=1, **sizes))
    assert (count, embedding) == (2 * 128 + 4 * 64 + 3 * 64 + 3 * 8, 128)


@pytest.mark.parametrize("at_once", [True, False])
def test_largest_batch(
    engine: worker.Engine, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That many run together and are never preempted; 5% more do not.

    Prompts that all end in one step, and prompts that the token budget lets end a few at a time.
    """
    num_tokens = 40
    if not at_once:
        budget = engine.max_decoding(NUM_PROMPT_TOKENS, num_tokens) + 4 * NUM_PROMPT_TOKENS
        monkeypatch.setattr(engine.scheduler, "max_num_scheduled_tokens", budget)
    computed = engine.largest_batch(NUM_PROMPT_TOKENS, num_tokens)
    found = engine.measure("separate", computed, NUM_PROMPT_TOKENS, num_tokens, seed=0)
    assert found["num_preempted"] == 0
    assert found["most_running"] == found["most_decoding"] == computed
    more = math.ceil(1.05 * computed) + 1
    found = engine.measure("separate", more, NUM_PROMPT_TOKENS, num_tokens, seed=0)
    assert found["num_preempted"] or found["most_running"] < more
    assert found["num_decode_steps"] == 0


def test_most_that_decode_at_once(engine: worker.Engine) -> None:
    """However many come: one block of states for each, not vLLM's two."""
    num_tokens = 40
    computed = engine.max_decoding(NUM_PROMPT_TOKENS, num_tokens)
    many = math.ceil(1.5 * computed)
    found = engine.measure("separate", many, NUM_PROMPT_TOKENS, num_tokens, seed=0)
    assert found["most_decoding"] == pytest.approx(computed, rel=0.05, abs=1)


def test_capacity_follows_from_state_size(engine: worker.Engine, stated: BytesPerSequence) -> None:
    """Memory divided by what ``state-size`` says: one state per sequence."""
    if stated.kv_bytes_per_token:
        pytest.skip("vLLM pads the states of hybrids to its attention pages")
    computed = engine.max_decoding(NUM_PROMPT_TOKENS, NUM_TOKENS)
    assert computed == stated.max_sequences(CACHE_BYTES, NUM_PROMPT_TOKENS + NUM_TOKENS)


def test_impossible_memory(engine: worker.Engine, folder: Path, stated: BytesPerSequence) -> None:
    """Too little for one sequence: refused with the numbers, by vLLM's own path."""
    from vllm.v1.engine import core

    (specs,) = engine.executor.get_kv_cache_specs()
    needed = sum(spec.max_memory_usage_bytes(engine.config) for spec in specs.values())
    assert needed >= 2 * stated.total(0)
    more = []
    if hasattr(core, "get_global_kv_cache_groups"):  # since vLLM 0.33
        more = [core.get_global_kv_cache_groups(engine.config, [dict(specs)])]
    for available in (0, needed - 1):
        with pytest.raises(ValueError, match="one sequence of max_model_len=64 tokens") as caught:
            core.get_kv_cache_configs(engine.config, [dict(specs)], [available], *more)
        assert f"needs {needed / 2**20:.3f} MiB" in str(caught.value)
        assert f"{available / 2**20:.3f} MiB are available" in str(caught.value)
        is_copied = engine.config.cache_config.mamba_cache_mode == "align"
        assert ("--no-enable-prefix-caching halves" in str(caught.value)) == is_copied
