"""MambaInLlama's pair of config files merged into one, and what is refused."""

from typing import Any

import pytest
import transformers

from vllm_thinkfast.checkpoints.config_reader import merge_published
from vllm_thinkfast.configs import MambaInLlamaConfig

LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def base(**changes: Any) -> dict[str, Any]:
    """config.json with the values of Llama-3.2-3B."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": dict(LLAMA3_SCALING),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **changes,
    }


def mamba(**changes: Any) -> dict[str, Any]:
    """mamba_config.json of a Mamba-1 hybrid."""
    return {
        "d_model": 3072,
        "ssm_cfg": {"expand": 1},
        "rms_norm_eps": 1e-6,
        "vocab_size": None,
        "d_inner": None,
        "d_xb": 1024,
        "intermediate_size": 8192,
        "hidden_act": "silu",
        "n_layer": 28,
        "attn_layers": [3, 8, 13, 18, 23, 27],
        **changes,
    }


def mamba2(**changes: Any) -> dict[str, Any]:
    """mamba_config.json of a Mamba-2 hybrid."""
    ssm_cfg = {"expand": 1, "ngroups": 24, "d_state": 128, **changes.pop("ssm_cfg", {})}
    return mamba(d_inner=3072, ssm_cfg=ssm_cfg, **changes)


def test_mamba1() -> None:
    config = MambaInLlamaConfig.from_published(base(), mamba(), "mambainllama_mamba1")
    assert config.architectures == ["MambaInLlamaForCausalLM"]
    assert (config.mixer_size, config.xb_size, config.ssm_state_size) == (3072, 1024, 16)
    assert config.time_step_rank == 192
    assert config.repeat_kv_before_conv
    assert config.conv_dim == 3072  # x alone, after the repetition
    assert config.layers_block_type.count("attention") == 6
    # Mamba blocks take their eps from mamba_config.json.
    assert (config.rms_norm_eps, config.mamba_rms_norm_eps) == (1e-5, 1e-6)
    assert config.rope_parameters == {**LLAMA3_SCALING, "rope_theta": 500000.0}


def test_mamba2() -> None:
    config = MambaInLlamaConfig.from_published(base(), mamba2(), "mambainllama_mamba2")
    assert (config.mamba_num_heads, config.mamba_n_groups, config.ssm_state_size) == (24, 8, 128)
    assert not config.repeat_kv_before_conv
    assert config.conv_dim == 3072 + 2 * 1024


def test_m1_never_scales_rope() -> None:
    """M1's code passes only rope_theta, although its config.json carries rope_scaling."""
    config = MambaInLlamaConfig.from_published(base(), mamba(d_inner=3072), "m1")
    assert config.rope_parameters == {"rope_theta": 500000.0, "rope_type": "default"}


def test_old_rope_scaling_key() -> None:
    """Older files say "type" instead of "rope_type"."""
    config = MambaInLlamaConfig.from_published(
        base(rope_scaling={"type": "linear", "factor": 2.0}), mamba(), "mambainllama_mamba1"
    )
    assert config.rope_parameters == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 500000.0,
    }


@pytest.mark.parametrize(
    ("config", "mamba_config", "layout", "message"),
    [
        (
            base(),
            mamba(d_model=4096),
            "m1",
            "d_model=4096 contradicts config.json: hidden_size=3072",
        ),
        (base(), mamba(n_layer=5), "m1", "n_layer=5 contradicts"),
        (base(), mamba(attn_layers=[28]), "m1", "attention_layers=.28..*0 to 27"),
        (base(), mamba(attn_layers=[3, 3]), "m1", "duplicates"),
        (base(), mamba(surprise=1), "m1", "unknown option.*surprise=1"),
        (base(), mamba(ssm_cfg={"expand": 1, "rmsnorm": True}), "m1", "unknown option.*rmsnorm"),
        (base(), mamba(d_xb=1000), "m1", "d_xb=1000 must be a multiple of d_state=16"),
        (base(), mamba2(ssm_cfg={"ngroups": 12}), "mambainllama_mamba2", "ngroups=12 times"),
        (base(), mamba2(ssm_cfg={"dt_softplus": 1}), "mambainllama_mamba2", "dt_softplus"),
        (base(hidden_act="gelu"), mamba(hidden_act="gelu"), "m1", "hidden_act='gelu'"),
        (base(), mamba2(ssm_cfg={"dt_limit": [1.0]}), "mambainllama_mamba2", "two numbers"),
        (base(), mamba2(ssm_cfg={"dt_limit": [2.0, 1.0]}), "mambainllama_mamba2", "low < high"),
        (base(), mamba2(ssm_cfg={"rmsnorm": "no"}), "mambainllama_mamba2", "use_gated_norm='no'"),
        (base(tie_word_embeddings="false"), mamba(), "m1", "without quotes"),
        (
            base(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            mamba(),
            "mambainllama_mamba1",
            "lacks low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        (base(rope_scaling={"type": "spiral"}), mamba(), "mambainllama_mamba1", "'spiral'"),
        (base(rope_theta=-1.0), mamba(), "m1", "rope_theta=-1.0"),
        (
            base(model_type="mistral", sliding_window=-1),
            mamba(),
            "mambainllama_mamba1",
            "sliding_window=-1",
        ),
    ],
)
def test_refused(
    config: dict[str, Any], mamba_config: dict[str, Any], layout: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MambaInLlamaConfig.from_published(config, mamba_config, layout)


@pytest.mark.parametrize(
    ("model_type", "layout", "window"),
    [
        ("mistral", "mambainllama_mamba1", 4096),
        ("llama", "mambainllama_mamba1", None),  # Llama's class ignores the field
        ("mistral", "m1", None),  # M1's attention has no window
    ],
)
def test_sliding_window(model_type: str, layout: Any, window: int | None) -> None:
    config = base(model_type=model_type, sliding_window=4096)
    merged = MambaInLlamaConfig.from_published(config, mamba(d_inner=3072), layout)
    assert merged.sliding_window == window


@pytest.mark.parametrize(("layout", "attention"), [("mambainllama_mamba1", True), ("m1", False)])
def test_mlp_bias(layout: Any, attention: bool) -> None:
    """The published mamba blocks have no MLP biases, whatever the base model has."""
    merged = MambaInLlamaConfig.from_published(base(mlp_bias=True), mamba(d_inner=3072), layout)
    assert (merged.mlp_bias, merged.mamba_mlp_bias) == (attention, False)


@pytest.mark.parametrize("config_class", [transformers.LlamaConfig, transformers.MistralConfig])
def test_fields_of_transformers_are_no_misspellings(
    config_class: type[transformers.PretrainedConfig],
) -> None:
    """Old releases wrote every generation setting into config.json, other models have more."""
    generation = transformers.GenerationConfig().to_dict()
    others = transformers.Qwen2Config().to_dict()
    fields = {**generation, **others, **config_class().to_dict()}
    known = base(model_type=config_class.model_type, sliding_window=None)
    foreign = {name: value for name, value in fields.items() if name not in known}
    # Refused for their values: beside rope_theta and rope_scaling, and of another number of layers.
    del foreign["rope_parameters"], foreign["layer_types"]
    assert len(foreign) > 40
    config = MambaInLlamaConfig.from_published({**foreign, **known}, mamba(), "mambainllama_mamba1")
    assert config.hidden_size == 3072


@pytest.mark.parametrize(
    ("stated", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 9}, 9)]
)
def test_window_of_mistral(stated: dict[str, Any], window: int | None) -> None:
    """Absent is Mistral's default; null is none, as Mistral 0.2 and later say."""
    config = {**base(model_type="mistral"), **stated}
    assert merge_published(config, mamba(), [], "x").sliding_window == window


def test_rope_of_an_older_conversion() -> None:
    """Nulls were copied, and transformers 5 keeps the rotated share of a head there."""
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e6,
        "original_max_position_embeddings": 4096,
        "attention_factor": None,
        "partial_rotary_factor": 1.0,
    }
    config = MambaInLlamaConfig.from_published(base(), mamba(), "mambainllama_mamba1").to_dict()
    read = MambaInLlamaConfig(**{**config, "rope_parameters": rope})
    assert set(rope) - set(read.rope_parameters) == {"attention_factor", "partial_rotary_factor"}
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        MambaInLlamaConfig(**{**config, "rope_parameters": {**rope, "partial_rotary_factor": 0.5}})
