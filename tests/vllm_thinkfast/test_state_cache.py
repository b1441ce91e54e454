"""Shapes, bytes and tensor-parallel limits of the state, against the numbers of real models."""

import re
from types import SimpleNamespace

import pytest
import torch

from vllm_thinkfast import envs
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig
from vllm_thinkfast.state_cache import (
    bytes_per_sequence,
    check_alignment,
    check_tensor_parallel,
    lack_of_memory,
    state_copy_funcs,
    state_dtypes,
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


def test_int8() -> None:
    """A scale of 4 bytes for each row of N elements of one byte."""
    int8 = torch.int8
    assert state_shapes(LLAMBA_3B, 4, int8) == ((3, 1792), (8, 96, 64), (8, 96))
    assert state_shapes(M1_3B, 1, int8) == ((3, 3072), (3072, 16), (3072,))
    assert state_shapes(MAMBA2_3B, 2, int8) == ((3, 2560), (12, 128, 128), (12, 128))
    assert bytes_per_sequence(LLAMBA_3B, ssm_dtype=int8).ssm_bytes == 28 * 32 * 96 * (64 + 4)
    assert bytes_per_sequence(M1_3B, ssm_dtype=int8, tp_size=2).ssm_bytes == 22 * 1536 * (16 + 4)


def settings(ssm_dtype: str) -> SimpleNamespace:
    """As much of vLLM's configuration as the dtypes depend on."""
    cache = SimpleNamespace(mamba_cache_dtype="auto", mamba_ssm_cache_dtype=ssm_dtype)
    return SimpleNamespace(cache_config=cache, model_config=SimpleNamespace(dtype=torch.bfloat16))


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(envs.SSM_STATE, raising=False)
    assert state_dtypes(settings("auto")) == (torch.bfloat16, torch.float32)
    assert state_dtypes(settings("float16")) == (torch.bfloat16, torch.float16)
    assert len(state_copy_funcs()) == 2
    monkeypatch.setenv(envs.SSM_STATE, "int8")
    for accepted in ("auto", "float32"):
        found = state_dtypes(settings(accepted))
        assert found == (torch.bfloat16, torch.int8, torch.float32)
    conv, ssm, scales = state_copy_funcs()
    assert scales is ssm is not conv
    for refused in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match=rf"SSM_STATE=int8 and .*-dtype {refused} contradict"):
            state_dtypes(settings(refused))
    monkeypatch.setenv(envs.SSM_STATE, "fp8")
    with pytest.raises(ValueError, match=r"VLLM_THINKFAST_SSM_STATE=fp8: accepted is int8"):
        state_dtypes(settings("auto"))


def test_alignment() -> None:
    """vLLM packs the states of a page, and a float32 must begin at a multiple of 4."""
    dtypes = (torch.bfloat16, torch.int8, torch.float32)
    check_alignment(((3, 6), (4, 8), (4,)), dtypes)
    check_alignment(((3, 5), (1, 2), (1,)), dtypes)
    with pytest.raises(ValueError, match=r"of 4 bytes cannot begin at byte 62.*unset it"):
        check_alignment(((3, 5), (4, 8), (4,)), dtypes)


def test_impossible_split() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 does not divide num_heads=32"):
        check_tensor_parallel(LLAMBA_3B, 3)
    with pytest.raises(ValueError, match=r"mamba_n_groups=8.*accepted below it: 1, 2, 4, 8"):
        check_tensor_parallel(MAMBA2_3B, 16)


@pytest.mark.parametrize(
    ("is_copied", "num_drafts", "says"),
    [
        (True, 0, "a copy for the prefix cache, and keys"),
        (True, 0, "--no-enable-prefix-caching halves the states"),
        (False, 3, "its state and those after 3 drafted tokens, and keys"),
        (False, 3, "fewer num_speculative_tokens need fewer states"),
        (
            False,
            0,
            r"cache \(its state, and keys .*VLLM_CPU_KVCACHE_SPACE\); `thinkfast state-size`",
        ),
    ],
)
def test_lack_of_memory_names_a_fix_that_helps(is_copied: bool, num_drafts: int, says: str) -> None:
    said = lack_of_memory(2**21, 2**20, 64, is_copied=is_copied, num_drafts=num_drafts)
    assert "max_model_len=64 tokens needs 2.000 MiB" in said
    assert "1.000 MiB are available" in said
    assert re.search(says, said)
    assert ("--no-enable-prefix-caching" in said) == is_copied
    assert ("num_speculative_tokens" in said) == (num_drafts > 0)
