"""Shapes, bytes and tensor-parallel limits of the state, against the numbers of real models."""

import pytest
import torch

from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig
from vllm_thinkfast.state_cache import (
    bytes_per_sequence,
    check_tensor_parallel,
    state_shapes,
)

LLAMBA_3B = LlambaConfig(hidden_size=3072, num_hidden_layers=28, intermediate_size=8192)
M1_3B = MambaInLlamaConfig(
    num_key_value_heads=8, head_dim=128, attention_layers=[3, 8, 13, 18, 23, 27]
)
MAMBA2_3B = MambaInLlamaConfig(
    num_key_value_heads=8,
    head_dim=128,
    attention_layers=list(range(1, 28, 2)),
    mamba_version="mamba2",
    mamba_num_heads=24,
    mamba_n_groups=8,
    ssm_state_size=128,
)


def test_shapes() -> None:
    assert state_shapes(LLAMBA_3B) == ((3, 7168), (32, 96, 64))
    assert state_shapes(LLAMBA_3B, 4) == ((3, 1792), (8, 96, 64))
    assert state_shapes(M1_3B) == ((3, 3072), (3072, 16))
    assert state_shapes(MAMBA2_3B, 2) == ((3, 2560), (12, 128, 128))


def test_bytes() -> None:
    """5.51e6 state elements for Llamba-3B: published table of sizes."""
    llamba = bytes_per_sequence(LLAMBA_3B, dtype=torch.bfloat16, ssm_dtype=torch.float32)
    assert llamba.ssm_bytes == 4 * 28 * 32 * 96 * 64
    assert llamba.conv_bytes == 2 * 28 * 3 * 7168
    assert llamba.kv_bytes_per_token == 0
    hybrid = bytes_per_sequence(M1_3B, dtype=torch.bfloat16, ssm_dtype=torch.bfloat16)
    assert hybrid.ssm_bytes == 2 * 22 * 3072 * 16
    assert hybrid.kv_bytes_per_token == 2 * 2 * 6 * 8 * 128
    assert hybrid.total(100) == hybrid.conv_bytes + hybrid.ssm_bytes + 100 * 24576


def test_impossible_split() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 does not divide num_heads=32"):
        check_tensor_parallel(LLAMBA_3B, 3)
    with pytest.raises(ValueError, match=r"mamba_n_groups=8.*accepted below it: 1, 2, 4, 8"):
        check_tensor_parallel(MAMBA2_3B, 16)
