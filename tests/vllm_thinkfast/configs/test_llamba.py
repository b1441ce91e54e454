"""Published Llamba config files under the house's names, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig

from vllm_thinkfast.configs import LlambaConfig


def published(**changes: Any) -> dict[str, Any]:
    """A published config.json with the values of Llamba-3B."""
    return {
        "model_type": "llamba",
        "vocab_size": 128256,
        "pad_vocab_size_multiple": 8,
        "d_model": 3072,
        "n_layer": 28,
        "tie_embeddings": True,
        "lm_head_bias": False,
        "resid_dropout": 0.0,
        "norm_epsilon": 1e-6,
        "mlp_cfg": {"intermediate_size": 8192, "bias": False, "act_fn": "silu"},
        "ssm_cfg": {
            "d_state": 64,
            "n_v_heads": 32,
            "n_qk_heads": 32,
            "expand": 1,
            "chunk_size": 128,
            "activation": "identity",
            "bias": False,
        },
        **changes,
    }


def with_ssm(**changes: Any) -> dict[str, Any]:
    """The same with changed options of the mixer."""
    return published(ssm_cfg={**published()["ssm_cfg"], **changes})


def test_published_fields() -> None:
    config = LlambaConfig.from_dict(published())
    assert (config.hidden_size, config.num_hidden_layers) == (3072, 28)
    # P = 96 is no power of two and differs from N = 64.
    assert (config.num_heads, config.head_dim, config.ssm_state_size) == (32, 96, 64)
    assert config.conv_dim == 7168
    assert config.tie_word_embeddings
    assert config.weight_layout == "llamba"
    # norm_epsilon is for the final norm only; the blocks' 1e-5 is a literal.
    assert (config.final_norm_eps, config.rms_norm_eps) == (1e-6, 1e-5)


def test_architecture_default() -> None:
    """vLLM needs one, published files may have none."""
    assert LlambaConfig.from_dict(published()).architectures == ["LlambaLMHeadModel"]


@pytest.mark.parametrize(
    ("vocab", "multiple", "rows"), [(157, 8, 160), (160, 8, 160), (157, 1, 157)]
)
def test_padded_vocabulary(vocab: int, multiple: int, rows: int) -> None:
    config = LlambaConfig.from_dict(published(vocab_size=vocab, pad_vocab_size_multiple=multiple))
    assert config.vocab_size == rows


def test_round_trip(tmp_path: Path) -> None:
    """What is saved has the house's names alone and reads back the same."""
    config = LlambaConfig.from_dict(with_ssm(n_qk_heads=8, d_conv=3, conv_bias=False))
    config.save_pretrained(tmp_path)
    AutoConfig.register("llamba", LlambaConfig, exist_ok=True)
    again = AutoConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "_name_or_path", "dtype"}
    assert {k: v for k, v in again.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    assert "d_model" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_ssm(d_stat=64), "ssm_cfg: unknown option.*d_stat=64.*accepted"),
        (with_ssm(activation="gelu"), "activation='gelu'.*identity"),
        (with_ssm(n_v_heads=5), "mixer_width=3072 must be a multiple of num_heads=5"),
        (with_ssm(n_qk_heads=12), "num_heads=32 must be a multiple of n_groups=12"),
        (with_ssm(d_state=0), "ssm_state_size=0 must be an integer >= 1"),
        (with_ssm(d_conv=1), "conv_kernel=1 must be at least 2"),
        (published(mlp_cfg={"intermediate_size": 8, "act_fn": "gelu"}), "hidden_act='gelu'"),
        (published(vocab_size=None), "vocab_size is missing"),
        (published(n_layer=-1), "num_hidden_layers=-1"),
        (published(norm_epsilon=0.0), "final_norm_eps=0.0 must be a number > 0"),
    ],
)
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlambaConfig.from_dict(config)


def test_saved_by_transformers_4() -> None:
    """``save_pretrained`` of the published class adds every field of transformers' base class."""
    added = {**GenerationConfig().to_dict(), "torch_dtype": "bfloat16", "_name_or_path": "x"}
    for tie in (True, False):
        fields = published(tie_embeddings=tie, tie_word_embeddings=True, **added)
        assert LlambaConfig(**fields).tie_word_embeddings == tie
