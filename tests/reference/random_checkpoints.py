"""Tiny random checkpoint folders in every published format, with names and shapes as published.

The weights are random but not arbitrary: logits have a standard deviation of about one, decays
reach from one token to about a hundred, and every element of every tensor that a prompt can reach
changes the logits (test_published_models.py checks it). Head widths of attention layers are 32 or
64, which vLLM's CPU attention accepts. `VARIANTS` names the combinations of options to test.

Written from the published definitions (see published_models.py), not from the plugin.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor

FORMATS = ("llamba", "mambainllama_mamba1", "mambainllama_mamba2", "m1")
CONTAINERS = ("safetensors", "sharded_safetensors", "bin", "sharded_bin")

Json = dict[str, Any]
ABSENT = object()
"""As the value of an override: leave the key out of the file."""

LLAMBA_CONFIG: Json = {
    "architectures": ["LlambaLMHeadModel"],
    "model_type": "llamba",
    "vocab_size": 160,
    "pad_vocab_size_multiple": 8,
    "d_model": 64,
    "n_layer": 3,
    "tie_embeddings": True,
    "lm_head_bias": False,
    "resid_dropout": 0.0,
    "norm_epsilon": 1e-5,
    "mlp_cfg": {"intermediate_size": 128, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {
        "d_state": 16,
        "n_v_heads": 4,
        "n_qk_heads": 4,
        "expand": 1,
        "chunk_size": 128,
        "activation": "identity",
        "bias": False,
    },
}
LLAMA_CONFIG: Json = {
    "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "vocab_size": 160,
}
ROPE_LLAMA3: Json = {
    # The published kind with a short original context, so that a few tokens show the difference.
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
LLAMA32: Json = {
    "_name_or_path": "meta-llama/Llama-3.2-3B-Instruct",
    "head_dim": 32,
    "max_position_embeddings": 131072,
    "rope_scaling": ROPE_LLAMA3,
    "tie_word_embeddings": True,
}
MISTRAL: Json = {
    # zephyr-7b-beta's keys: no attention_bias, mlp_bias, pretraining_tp or rope_scaling.
    "_name_or_path": "HuggingFaceH4/zephyr-7b-beta",
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "attention_bias": ABSENT,
    "mlp_bias": ABSENT,
    "pretraining_tp": ABSENT,
    "rope_scaling": ABSENT,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 6,
}


def write_checkpoint(
    folder: Path,
    format: str,
    *,
    seed: int = 0,
    container: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    mamba_config: Mapping[str, Any] | None = None,
    has_tokenizer: bool = False,
) -> Path:
    """Write a tiny random model in a published layout.

    Args:
        folder: created if need be.
        format: one of FORMATS.
        seed: of the weights.
        container: one of CONTAINERS; the sharded ones have two shards and an index.
        dtype: of the stored weights. M1 keeps A_log and D in float32, as its conversion does.
        config: changes to config.json, merged into dictionaries; ABSENT removes a key.
        mamba_config: the same for mamba_config.json (not for Llamba, which has none).
        has_tokenizer: add tokenizer files with a chat template.

    Returns:
        The folder.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: one of {FORMATS}")
    if container not in CONTAINERS:
        raise ValueError(f"container {container!r}: one of {CONTAINERS}")
    draw = _Draw(seed)
    files: dict[str, Json] = {}
    if format == "llamba":
        if mamba_config is not None:
            raise ValueError("a Llamba folder has no mamba_config.json")
        merged = files["config.json"] = _merged(LLAMBA_CONFIG, config or {})
        tensors = _llamba_tensors(merged, draw)
    else:
        base = _merged(LLAMA_CONFIG, LLAMA32) if format == "m1" else LLAMA_CONFIG
        merged = files["config.json"] = _merged(base, config or {})
        shared = _merged(_mamba_config(merged, format), mamba_config or {})
        files["mamba_config.json"] = shared
        ids = {key: merged[key] for key in ("bos_token_id", "eos_token_id")}
        version = merged["transformers_version"]
        files["generation_config.json"] = {
            "_from_model_config": True,
            **ids,
            "transformers_version": version,
        }
        tensors = _hybrid_tensors(merged, shared, format, draw)
    is_kept_float32 = format == "m1"
    tensors = {
        name: tensor
        if is_kept_float32 and name.endswith((".A_log", ".mamba.D"))
        else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    _write_tensors(folder, tensors, container)
    if has_tokenizer:
        write_tokenizer(folder, merged["vocab_size"])
    return folder


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Json:
    """`base` with `changes`, dictionaries merged key by key."""
    result: Json = dict(base)
    for key, value in changes.items():
        if value is ABSENT:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _mamba_config(config: Json, format: str) -> Json:
    """mamba_config.json as the training scripts of `format` write it."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    ssm_cfg: Json = {"expand": 1}
    inner: int | None = width
    if format == "mambainllama_mamba1":
        inner = None
    elif format == "mambainllama_mamba2":
        ssm_cfg |= {"ngroups": heads, "d_state": head_dim}
        inner = heads * head_dim
    return {
        "d_model": width,
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": config["rms_norm_eps"],
        "vocab_size": None,
        "d_inner": inner,
        "d_xb": config["num_key_value_heads"] * head_dim,
        "intermediate_size": config["intermediate_size"],
        "hidden_act": config["hidden_act"],
        "n_layer": config["num_hidden_layers"],
        "attn_layers": [1],
    }


class _Draw:
    """Random tensors of the kinds a model needs, from one seeded generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform between `low` and `high`."""
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def linear(self, rows: int, columns: int, gain: float = 1.0) -> Tensor:
        """A projection that gives inputs of unit variance outputs of variance gain squared."""
        return gain * self.normal(rows, columns) / math.sqrt(columns)

    def norm(self, width: int) -> Tensor:
        """Norm weights around one."""
        return self.uniform(0.6, 1.4, width)

    def conv(self, channels: int, taps: int) -> Tensor:
        """Depthwise taps, all of the same size."""
        return self.normal(channels, 1, taps) / math.sqrt(taps)

    def step_bias(self, count: int) -> Tensor:
        """Values whose softplus is log-uniform from 0.02 to 1: long and short memory."""
        steps = torch.exp(self.uniform(math.log(0.02), 0.0, count))
        return torch.log(torch.expm1(steps))


def _mlp_tensors(
    layer: str, width: int, mlp_width: int, stream: float, has_bias: bool, draw: _Draw
) -> dict[str, Tensor]:
    tensors = {
        f"{layer}.mlp.gate_proj.weight": draw.linear(mlp_width, width),
        f"{layer}.mlp.up_proj.weight": draw.linear(mlp_width, width),
        f"{layer}.mlp.down_proj.weight": draw.linear(width, mlp_width, stream),
    }
    if has_bias:
        tensors |= {
            f"{layer}.mlp.gate_proj.bias": 0.5 * draw.normal(mlp_width),
            f"{layer}.mlp.up_proj.bias": 0.5 * draw.normal(mlp_width),
            f"{layer}.mlp.down_proj.bias": 0.3 * stream * draw.normal(width),
        }
    return tensors


def _llamba_tensors(config: Json, draw: _Draw) -> dict[str, Tensor]:
    """State dict of a Llamba (cartesia_pytorch naming)."""
    ssm, mlp, width = config["ssm_cfg"], config["mlp_cfg"], config["d_model"]
    multiple = config.get("pad_vocab_size_multiple", 8)
    vocabulary = math.ceil(config["vocab_size"] / multiple) * multiple
    is_tied = config.get("tie_embeddings", False)
    heads, inner = ssm["n_v_heads"], ssm.get("expand", 1) * width
    group_width = ssm["n_qk_heads"] * ssm["d_state"]
    has_bias = ssm.get("bias", False)
    # A tied embedding is small, so that the logits are not; the blocks write at its scale.
    stream = 1.2 / math.sqrt(width) if is_tied else 1.0
    # The decay projection has no bias: a direction shared by all embeddings takes its place.
    common = torch.sign(draw.normal(width))
    embedding = stream * (0.8 * draw.normal(vocabulary, width) + 0.6 * common)
    tensors = {"backbone.embedding.weight": embedding}
    for index in range(config["n_layer"]):
        layer = f"backbone.layers.{index}"
        mixer = f"{layer}.mixer"
        bc_scale = ssm["d_state"] ** -0.25
        decay_logits = torch.linspace(-5.0, 1.0, heads)[
            torch.randperm(heads, generator=draw.generator)
        ]
        in_proj = torch.cat(
            [
                draw.linear(inner, width),
                draw.linear(2 * group_width, width, bc_scale),
                draw.linear(inner, width),
                draw.linear(heads, width) + decay_logits[:, None] * common / (0.5 * width),
            ]
        )
        conv_width = inner + 2 * group_width
        tensors |= {
            f"{mixer}.in_proj.weight": in_proj,
            f"{mixer}.conv1d.weight": draw.conv(conv_width, ssm.get("d_conv", 4)),
            f"{mixer}.D": draw.uniform(0.5, 2.0, heads),
            f"{mixer}.out_proj.weight": draw.linear(width, inner, 0.6 * stream),
            f"{layer}.input_layernorm.weight": draw.norm(width),
            f"{layer}.post_attention_layernorm.weight": draw.norm(width),
        }
        if ssm.get("conv_bias", True):
            tensors[f"{mixer}.conv1d.bias"] = 0.3 * draw.normal(conv_width)
        if has_bias:
            tensors[f"{mixer}.in_proj.bias"] = 0.5 * draw.normal(len(in_proj))
            tensors[f"{mixer}.out_proj.bias"] = 0.3 * stream * draw.normal(width)
        else:
            tensors[f"{mixer}.z_bias"] = draw.normal(inner)
        tensors |= _mlp_tensors(layer, width, mlp["intermediate_size"], stream, mlp["bias"], draw)
    tensors["backbone.final_layernorm.weight"] = draw.norm(width)
    if not is_tied:
        tensors["lm_head.weight"] = draw.linear(vocabulary, width, 1.2)
        if config.get("lm_head_bias", False):
            tensors["lm_head.bias"] = draw.normal(vocabulary)
    return tensors


def _hybrid_tensors(config: Json, shared: Json, format: str, draw: _Draw) -> dict[str, Tensor]:
    """State dict of a MambaInLlama or M1 model."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    is_tied = config["tie_word_embeddings"]
    stream = 1.2 / math.sqrt(width) if is_tied else 1.0
    embedding = stream * draw.normal(vocabulary, width)
    tensors = {"model.embed_tokens.weight": embedding}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        if index in shared["attn_layers"]:
            tensors |= _attention_tensors(layer, config, format, stream, draw)
        elif format == "mambainllama_mamba2":
            tensors |= _mamba2_tensors(f"{layer}.mamba", width, shared, stream, draw)
        else:
            tensors |= _mamba1_tensors(f"{layer}.mamba", width, shared, format, stream, draw)
        tensors |= {
            f"{layer}.input_layernorm.weight": draw.norm(width),
            f"{layer}.post_attention_layernorm.weight": draw.norm(width),
            **_mlp_tensors(layer, width, config["intermediate_size"], stream, False, draw),
        }
    tensors["model.norm.weight"] = draw.norm(width)
    if not is_tied:
        tensors["lm_head.weight"] = draw.linear(vocabulary, width, 1.2)
    elif format != "m1":
        # MambaInLlama is loaded strictly, and nothing adds the head of a tied model.
        tensors["lm_head.weight"] = embedding.clone()
    return tensors


def _attention_tensors(
    layer: str, config: Json, format: str, stream: float, draw: _Draw
) -> dict[str, Tensor]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or width // heads
    q_rows, kv_rows = heads * head_dim, config["num_key_value_heads"] * head_dim
    # Queries and keys above unit variance, so that attention is not close to uniform.
    q, k = draw.linear(q_rows, width, 1.5), draw.linear(kv_rows, width, 1.5)
    v, out = draw.linear(kv_rows, width), draw.linear(width, q_rows, stream)
    if format == "m1":
        return {
            f"{layer}.mha.in_proj.weight": torch.cat([q, k, v]),
            f"{layer}.mha.out_proj.weight": out,
        }
    projections = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": out}
    return {f"{layer}.self_attn.{name}.weight": weight for name, weight in projections.items()}


def _mamba1_tensors(
    mamba: str, width: int, shared: Json, format: str, stream: float, draw: _Draw
) -> dict[str, Tensor]:
    ssm, narrow = shared["ssm_cfg"], shared["d_xb"]
    inner = ssm.get("expand", 2) * width if shared["d_inner"] is None else shared["d_inner"]
    d_state, rank = ssm.get("d_state", 16), ssm.get("dt_rank", "auto")
    rank = math.ceil(width / 16) if rank == "auto" else rank
    conv_width = inner if ssm.get("repeat_kv_before_conv", True) else narrow
    projections = {
        "in_proj_z": draw.linear(inner, width),
        "in_proj_x": draw.linear(narrow, width, 1.5),
        "B_proj": draw.linear(narrow, width),
        "C_proj": draw.linear(inner, width),
        "dt_proj_down": draw.linear(rank, width),
    }
    tensors = {
        f"{mamba}.dt_proj.weight": draw.linear(inner, rank, 0.7),
        f"{mamba}.dt_proj.bias": draw.step_bias(inner) / 2,  # it counts twice
        f"{mamba}.conv1d.weight": draw.conv(conv_width, ssm.get("d_conv", 4)),
        f"{mamba}.A_log": draw.uniform(math.log(0.3), math.log(6.0), inner, d_state),
        f"{mamba}.D": draw.uniform(0.5, 1.5, inner),
        f"{mamba}.out_proj.weight": draw.linear(width, inner, stream),
    }
    if format == "m1":
        tensors[f"{mamba}.in_proj.weight"] = torch.cat(list(projections.values()))
    else:
        tensors |= {f"{mamba}.{name}.weight": weight for name, weight in projections.items()}
        for option, name, rows in (
            ("proj_x_bias", "in_proj_x", narrow),
            ("proj_z_bias", "in_proj_z", inner),
        ):
            if ssm.get(option, False):
                tensors[f"{mamba}.{name}.bias"] = 0.5 * draw.normal(rows)
    if ssm.get("out_proj_bias", False):
        tensors[f"{mamba}.out_proj.bias"] = 0.3 * stream * draw.normal(width)
    if ssm.get("conv_bias", True):
        tensors[f"{mamba}.conv1d.bias"] = 0.3 * draw.normal(conv_width)
    return tensors


def _mamba2_tensors(
    mamba: str, width: int, shared: Json, stream: float, draw: _Draw
) -> dict[str, Tensor]:
    ssm, narrow = shared["ssm_cfg"], shared["d_xb"]
    inner = ssm.get("expand", 2) * width if shared["d_inner"] is None else shared["d_inner"]
    heads = ssm["ngroups"]
    conv_width = 3 * inner if ssm.get("repeat_kv_before_conv", False) else inner + 2 * narrow
    rows = 2 * inner + 2 * narrow + heads
    tensors = {
        f"{mamba}.in_proj.weight": draw.linear(rows, width),
        f"{mamba}.conv1d.weight": draw.conv(conv_width, ssm.get("d_conv", 4)),
        f"{mamba}.dt_bias": draw.step_bias(heads),
        f"{mamba}.A_log": draw.uniform(math.log(0.3), math.log(3.0), heads),
        f"{mamba}.D": draw.uniform(0.5, 1.5, inner if ssm.get("D_has_hdim", False) else heads),
        f"{mamba}.out_proj.weight": draw.linear(width, inner, 0.6 * stream),
    }
    if ssm.get("rmsnorm", True):
        tensors[f"{mamba}.norm.weight"] = draw.norm(inner)
    if ssm.get("conv_bias", True):
        tensors[f"{mamba}.conv1d.bias"] = 0.3 * draw.normal(conv_width)
    if ssm.get("bias", False):
        tensors[f"{mamba}.in_proj.bias"] = 0.5 * draw.normal(rows)
        tensors[f"{mamba}.out_proj.bias"] = 0.3 * stream * draw.normal(width)
    return tensors


def _write_tensors(folder: Path, tensors: dict[str, Tensor], container: str) -> None:
    """Write the state dict as one file, or as two shards and an index."""
    suffix = "safetensors" if container.endswith("safetensors") else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"

    def save(part: dict[str, Tensor], path: Path) -> None:
        part = {name: tensor.contiguous() for name, tensor in part.items()}
        if suffix == "safetensors":
            save_file(part, path, metadata={"format": "pt"})
        else:
            torch.save(part, path)

    if not container.startswith("sharded"):
        save(tensors, folder / f"{stem}.{suffix}")
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")


SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of exactly `vocab_size` ids: printable ASCII, newline, and letter pairs.

    <s> is 1 and </s> is 2, as in the config files; text outside the alphabet becomes <unk>.
    """
    alphabet = ["\n", *map(chr, range(32, 127))]
    vowels, consonants = "aeiou", "thnsrldcm"
    pairs = [(a, b) for a in consonants for b in vowels] + [
        (b, a) for a in consonants for b in vowels
    ]
    count = vocab_size - len(SPECIAL_TOKENS) - len(alphabet)
    if not 0 <= count <= len(pairs):
        smallest = len(SPECIAL_TOKENS) + len(alphabet)
        raise ValueError(f"vocab_size {vocab_size}: {smallest} to {smallest + len(pairs)}")
    merges = pairs[:count]
    tokens = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def _hybrid(format: str, ssm_cfg: Json | None = None, **options: Any) -> tuple[str, Json]:
    """A variant of a hybrid format; `ssm_cfg` goes into mamba_config.json."""
    shared = {**options.pop("mamba_config", {}), "ssm_cfg": ssm_cfg or {}}
    return format, {**options, "mamba_config": shared}


def _llamba(ssm_cfg: Json | None = None, **options: Any) -> tuple[str, Json]:
    """A variant of Llamba; `ssm_cfg` goes into config.json."""
    config = {**options.pop("config", {}), "ssm_cfg": ssm_cfg or {}}
    return "llamba", {**options, "config": config}


_MIL1, _MIL2, _M1 = "mambainllama_mamba1", "mambainllama_mamba2", "m1"
_PURE: Json = {"attn_layers": []}
_ALL_HEADS: Json = {"num_key_value_heads": 4}
_BF16 = torch.bfloat16

VARIANTS: dict[str, tuple[str, Json]] = {
    "llamba_published": _llamba(),
    "llamba_untied_head_bias": _llamba(
        config={"tie_embeddings": False, "lm_head_bias": True}, container="bin"
    ),
    # P = 24 (not a power of two, as in the 3B model) differs from N = 16; two heads share B and C.
    "llamba_grouped": _llamba({"n_qk_heads": 2}, config={"d_model": 96}),
    "llamba_silu_expand2": _llamba(
        {"activation": "silu", "expand": 2, "d_state": 64}, config={"tie_embeddings": False}
    ),
    "llamba_biases": _llamba({"bias": True}, config={"mlp_cfg": {"bias": True}}),
    "llamba_conv3_no_bias": _llamba({"d_conv": 3, "conv_bias": False}),
    "llamba_conv2_final_eps": _llamba({"d_conv": 2}, config={"norm_epsilon": 0.05}),
    "llamba_padded_tied": _llamba(
        config={"vocab_size": 150, "pad_vocab_size_multiple": 64}, dtype=_BF16
    ),
    "llamba_padded_untied_sharded": _llamba(
        config={"vocab_size": 157, "tie_embeddings": False}, container="sharded_bin"
    ),
    "llamba_defaults_left_out": _llamba(
        {"expand": ABSENT, "activation": ABSENT, "bias": ABSENT, "chunk_size": ABSENT},
        config={
            "architectures": ABSENT,
            "tie_embeddings": ABSENT,
            "lm_head_bias": ABSENT,
            "norm_epsilon": ABSENT,
            "pad_vocab_size_multiple": ABSENT,
            "resid_dropout": ABSENT,
        },
    ),
    "mamba1_published": _hybrid(_MIL1, container="bin"),
    "mamba1_tied_llama3_rope": _hybrid(_MIL1, config=LLAMA32, container="bin", dtype=_BF16),
    "mamba1_repeat_after_conv": _hybrid(
        _MIL1,
        {"repeat_kv_before_conv": False},
        mamba_config={"d_inner": 128},
        container="sharded_safetensors",
    ),
    "mamba1_dt_rank_d_state8": _hybrid(_MIL1, {"dt_rank": 5, "d_state": 8, "conv_bias": False}),
    "mamba1_biases_d_state32": _hybrid(
        _MIL1, {"proj_x_bias": True, "proj_z_bias": True, "out_proj_bias": True, "d_state": 32}
    ),
    "mamba1_expand2_conv3": _hybrid(
        _MIL1,
        {"expand": 2, "d_conv": 3, "dt_rank": "auto"},
        config={"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "mamba1_default_expand": _hybrid(_MIL1, {"expand": ABSENT}),
    "mamba1_own_norm_eps": _hybrid(
        _MIL1, config={"rms_norm_eps": 0.02}, mamba_config={"rms_norm_eps": 0.3}
    ),
    "mamba1_inner_not_width": _hybrid(_MIL1, mamba_config={"d_inner": 192}),
    "mamba1_pure": _hybrid(_MIL1, mamba_config=_PURE, config=_ALL_HEADS),
    "mamba1_mistral_window": _hybrid(
        _MIL1, config=MISTRAL, mamba_config={"attn_layers": [0, 2]}, container="bin"
    ),
    "mamba1_head_dim": _hybrid(
        _MIL1, config={"head_dim": 64}, mamba_config={"d_inner": 256, "d_xb": 128}
    ),
    "mamba2_published": _hybrid(_MIL2, container="bin"),
    "mamba2_ratio3_tied_llama3_rope": _hybrid(
        _MIL2,
        config={**LLAMA32, "hidden_size": 192, "num_attention_heads": 6},
        container="bin",
        dtype=_BF16,
    ),
    "mamba2_repeat_before_conv": _hybrid(_MIL2, {"repeat_kv_before_conv": True}),
    "mamba2_no_norm_conv3": _hybrid(_MIL2, {"rmsnorm": False, "d_conv": 3}),
    "mamba2_norm_before_gate_dt_floor": _hybrid(
        _MIL2, {"norm_before_gate": True, "dt_limit": [0.1, math.inf]}
    ),
    "mamba2_wide_skip_dt_limit": _hybrid(_MIL2, {"D_has_hdim": True, "dt_limit": [0.1, 0.6]}),
    "mamba2_biases": _hybrid(_MIL2, {"bias": True, "conv_bias": False}),
    "mamba2_pure_no_groups": _hybrid(
        _MIL2, mamba_config=_PURE, config=_ALL_HEADS, container="sharded_bin"
    ),
    "mamba2_expand2": _hybrid(
        _MIL2, {"expand": 2, "ngroups": 8}, mamba_config={"d_inner": None, "d_xb": 64}
    ),
    "mamba2_mistral_head_dim": _hybrid(_MIL2, config={**MISTRAL, "head_dim": 64}),
    "m1_published": _hybrid(
        _M1, mamba_config={"attn_layers": [0, 2]}, container="sharded_safetensors", dtype=_BF16
    ),
    "m1_untied_repeat_after_conv": _hybrid(
        _M1,
        {"repeat_kv_before_conv": False, "d_state": 8, "dt_rank": 6, "conv_bias": False},
        config={"tie_word_embeddings": False},
    ),
    "m1_inner_not_width": _hybrid(
        _M1, {"out_proj_bias": True, "d_conv": 3}, mamba_config={"d_inner": 256}
    ),
}
"""Name -> (format, options of write_checkpoint). Each name says what differs from published."""


def write_variant(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write the variant called `name` of VARIANTS."""
    format, options = VARIANTS[name]
    return write_checkpoint(folder, format, seed=seed, **options)
