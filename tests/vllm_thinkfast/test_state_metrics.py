"""What the metrics take from an engine's settings; no engine."""

from types import SimpleNamespace

import pytest
import torch

from vllm_thinkfast.configs import MambaInLlamaConfig
from vllm_thinkfast.state_metrics import _engine_bytes_per_sequence

HYBRID = MambaInLlamaConfig(num_key_value_heads=8, head_dim=128, attention_layers=[3, 8])


@pytest.mark.parametrize(("cache_dtype", "bytes_per_value"), [("auto", 4), ("fp8", 1)])
def test_kv_cache_dtype(cache_dtype: str, bytes_per_value: int) -> None:
    """``--kv-cache-dtype`` is of keys and values only; states keep theirs."""
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=HYBRID, dtype=torch.float32),
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype, mamba_cache_dtype="auto", mamba_ssm_cache_dtype="auto"
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        num_speculative_tokens=0,
    )
    sizes = _engine_bytes_per_sequence(vllm_config)
    assert sizes is not None
    assert sizes.kv_bytes_per_token == 2 * 2 * 8 * 128 * bytes_per_value
    assert sizes.conv_bytes == 26 * 3 * HYBRID.conv_dim * 4
