"""What a folder's files say, read without the package: the judge of damaged folders that load.

Written from the published definitions (see tests/reference/random_checkpoints.py), with Python's
own json and struct. ``complaints`` is empty if configuration and tensors are what the files say.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]

REQUIRED = object()


class UnsoundError(Exception):
    """The files say something that no model can be."""


def complaints(folder: Path, config: Any, tensors: Tensors) -> list[str]:
    """Differences between the files of ``folder`` and what was read from it.

    Args:
        folder: a damaged folder that was loaded all the same.
        config: the configuration object that was read.
        tensors: house name -> tensor that was read.
    """
    try:
        fields, layout = expected_fields(folder)
        stored = stored_tensors(folder)
        house = house_tensors(fields, layout, stored)
    except UnsoundError as error:
        return [f"loaded, but {error}"]
    found = [
        f"{name}: the files say {value!r:.80}, read {getattr(config, name, None)!r:.80}"
        for name, value in fields.items()
        if not same(getattr(config, name, None), value)
    ]
    if tensors.keys() != house.keys():
        found.append(f"tensors: {sorted(tensors.keys() ^ house.keys())[:5]} differ")
    return found + [
        f"{name}: other values than the file's"
        for name in tensors.keys() & house.keys()
        if not same_tensor(tensors[name], house[name])
    ]


def same(a: Any, b: Any) -> bool:
    """Equality that tells true from 1, but not 1 from 1.0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b) or (a != a and b != b)  # NaN


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


# ------------------------------------------------------------------------------------------------
# config.json and mamba_config.json


def count(value: Any) -> bool:
    return type(value) is int and value >= 1


def number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def flag(value: Any) -> bool:
    return type(value) is bool


def one_of(*accepted: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(a) and value == a for a in accepted)


def anything(value: Any) -> bool:
    return True


_SAVED_FLOATS = [[("__float__", text)] for text in ("Infinity", "-Infinity", "NaN")]
"""How transformers saves what JSON has no word for."""

Field = tuple[str, str, Callable[[Any], bool], Any]
"""(key in the file, house field, what values are possible, default)"""

_LLAMBA: tuple[Field, ...] = (
    ("d_model", "hidden_size", count, REQUIRED),
    ("n_layer", "num_hidden_layers", count, 32),
    ("tie_embeddings", "tie_word_embeddings", flag, False),
    ("norm_epsilon", "final_norm_eps", number, 1e-5),
    ("max_position_embeddings", "max_position_embeddings", count, 131072),
)
_LLAMBA_SSM: tuple[Field, ...] = (
    ("d_state", "ssm_state_size", count, 64),
    ("n_v_heads", "num_heads", count, 32),
    ("n_qk_heads", "n_groups", count, 32),
    ("expand", "expand", count, 1),
    ("chunk_size", "chunk_size", count, 128),
    ("activation", "mixer_activation", one_of("identity", "silu", "swish"), "identity"),
    ("bias", "use_bias", flag, False),
    ("d_conv", "conv_kernel", count, 4),
    ("conv_bias", "use_conv_bias", flag, True),
)
_LLAMBA_MLP: tuple[Field, ...] = (
    ("intermediate_size", "intermediate_size", count, 14336),
    ("bias", "mlp_bias", flag, False),
    ("act_fn", "hidden_act", one_of("silu", "swish"), "silu"),
)
_LLAMA: tuple[Field, ...] = (
    ("vocab_size", "vocab_size", count, REQUIRED),
    ("hidden_size", "hidden_size", count, REQUIRED),
    ("intermediate_size", "intermediate_size", count, REQUIRED),
    ("num_hidden_layers", "num_hidden_layers", count, REQUIRED),
    ("num_attention_heads", "num_attention_heads", count, REQUIRED),
    ("hidden_act", "hidden_act", one_of("silu", "swish"), "silu"),
    ("tie_word_embeddings", "tie_word_embeddings", flag, False),
    ("attention_bias", "attention_bias", flag, False),
)
_SSM: tuple[Field, ...] = (
    ("d_conv", "conv_kernel", count, 4),
    ("conv_bias", "use_conv_bias", flag, True),
)
_SSM1: tuple[Field, ...] = (
    *_SSM,
    ("repeat_kv_before_conv", "repeat_kv_before_conv", flag, True),
    ("proj_x_bias", "proj_x_bias", flag, False),
    ("proj_z_bias", "proj_z_bias", flag, False),
    ("out_proj_bias", "out_proj_bias", flag, False),
)
_SSM2: tuple[Field, ...] = (
    *_SSM,
    ("repeat_kv_before_conv", "repeat_kv_before_conv", flag, False),
    ("bias", "use_bias", flag, False),
    ("rmsnorm", "use_gated_norm", flag, True),
    ("norm_before_gate", "norm_before_gate", flag, False),
    ("D_has_hdim", "d_has_head_dim", flag, False),
    ("chunk_size", "chunk_size", count, 256),
)
# Converted folders: the house's names on both sides. What is absent has the class's default, which
# save_pretrained leaves out.
_HF_LLAMBA: tuple[Field, ...] = (
    *(
        (house, house, is_possible, default)
        for _, house, is_possible, default in (*_LLAMBA[1:], *_LLAMBA_SSM, *_LLAMBA_MLP)
    ),
    ("hidden_size", "hidden_size", count, 2048),
    ("vocab_size", "vocab_size", count, 128256),
    ("rms_norm_eps", "rms_norm_eps", number, 1e-5),
    ("lm_head_bias", "lm_head_bias", flag, False),
)
_HF_HYBRID: tuple[Field, ...] = tuple(
    (name, name, is_possible, default)
    for name, is_possible, default in (
        ("vocab_size", count, 128256),
        ("hidden_size", count, 3072),
        ("intermediate_size", count, 8192),
        ("num_hidden_layers", count, 28),
        ("num_attention_heads", count, 24),
        ("rms_norm_eps", number, 1e-5),
        ("max_position_embeddings", count, 131072),
        ("tie_word_embeddings", flag, False),
        ("attention_bias", flag, False),
        ("mlp_bias", flag, False),
        ("mamba_version", one_of("mamba1", "mamba2"), "mamba1"),
        ("mamba_num_heads", count, 192),
        ("mamba_n_groups", count, 64),
        ("ssm_state_size", count, 16),
        ("conv_kernel", count, 4),
        ("use_conv_bias", flag, True),
        ("proj_x_bias", flag, False),
        ("proj_z_bias", flag, False),
        ("out_proj_bias", flag, False),
        ("use_bias", flag, False),
        ("use_gated_norm", flag, True),
        ("norm_before_gate", flag, False),
        ("d_has_head_dim", flag, False),
        ("chunk_size", count, 256),
        ("hidden_act", one_of("silu", "swish"), "silu"),
    )
)


def read_json(path: Path) -> Json:
    """The file's object; ``UnsoundError`` if it is none, or if a key occurs twice."""

    def checked(pairs: list[tuple[str, Any]]) -> Any:
        if len(dict(pairs)) != len(pairs):
            raise UnsoundError(f"{path.name} has a key twice")
        if pairs in _SAVED_FLOATS:
            return float(pairs[0][1])
        return dict(pairs)

    try:
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=checked)
    except (ValueError, RecursionError) as error:
        raise UnsoundError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsoundError(f"{path.name} is no object")
    return value


def take(given: Mapping[str, Any], fields: tuple[Field, ...], *, null: bool = False) -> Json:
    """House field -> value, every value possible; ``null``: null stands for the default."""
    found = {}
    for key, house, is_possible, default in fields:
        value = given.get(key, default)
        if value is None and null:
            value = default
        if value is REQUIRED:
            raise UnsoundError(f"{key} is missing")
        if not is_possible(value):
            raise UnsoundError(f"{key} is {value!r:.80}")
        found[house] = "silu" if value == "swish" else value
    return found


def part(given: Mapping[str, Any], key: str, known: tuple[str, ...]) -> Json:
    """A dictionary in the file without unknown fields; null is an empty one."""
    value = given.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or not value.keys() <= set(known):
        raise UnsoundError(f"{key} is {value!r:.80}")
    return value


def expected_fields(folder: Path) -> tuple[Json, str]:
    """(house field -> value, layout of the weights) by the JSON files of a folder."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == "llamba":
        if "d_model" in config or "ssm_cfg" in config:
            return _llamba_fields(config), "llamba"
        return take(config, _HF_LLAMBA) | {"weight_layout": "thinkfast"}, "thinkfast"
    if kind == "mambainllama":
        return _converted_hybrid_fields(config), "thinkfast"
    if kind not in ("llama", "mistral"):
        raise UnsoundError(f"model_type is {kind!r:.80}")
    return _published_hybrid_fields(folder, config)


def _llamba_fields(config: Json) -> Json:
    ssm = part(config, "ssm_cfg", tuple(key for key, *_ in _LLAMBA_SSM))
    mlp = part(config, "mlp_cfg", tuple(key for key, *_ in _LLAMBA_MLP))
    fields = take(config, _LLAMBA) | take(ssm, _LLAMBA_SSM) | take(mlp, _LLAMBA_MLP)
    sizes = take(
        config,
        (
            ("vocab_size", "vocab_size", count, REQUIRED),
            ("pad_vocab_size_multiple", "multiple", count, 8),
            ("lm_head_bias", "lm_head_bias", flag, False),
        ),
    )
    multiple = sizes["multiple"]
    fields["vocab_size"] = math.ceil(sizes["vocab_size"] / multiple) * multiple
    # The published class builds a head, and its bias, only if embeddings are not tied.
    fields["lm_head_bias"] = sizes["lm_head_bias"] and not fields["tie_word_embeddings"]
    return fields | {"rms_norm_eps": 1e-5, "weight_layout": "llamba"}


def _published_hybrid_fields(folder: Path, config: Json) -> tuple[Json, str]:
    shared = read_json(folder / "mamba_config.json")
    names = stored_tensors(folder).keys()
    is_mistral = config["model_type"] == "mistral"
    if any(name.endswith(".mamba.dt_bias") for name in names):
        layout = "mambainllama_mamba2"
    elif any(name.endswith(".mamba.in_proj_x.weight") for name in names):
        layout = "mambainllama_mamba1"
    else:
        layout = "m1"
    if layout == "m1":
        config = {**config, "mlp_bias": False}  # its code has none, and never scales RoPE
    fields = take(config, _LLAMA, null=True)
    heads = fields["num_attention_heads"]
    fields |= take(
        config,
        (
            ("num_key_value_heads", "num_key_value_heads", count, 8 if is_mistral else heads),
            ("head_dim", "head_dim", count, fields["hidden_size"] // heads),
            ("rms_norm_eps", "rms_norm_eps", number, 1e-6),
            (
                "max_position_embeddings",
                "max_position_embeddings",
                count,
                131072 if is_mistral else 2048,
            ),
            ("mlp_bias", "mlp_bias", flag, False),
        ),
        null=True,
    )
    window = config.get("sliding_window", 4096)  # null: none
    fields["sliding_window"] = window if is_mistral and layout != "m1" else None
    theta = 10000.0 if config.get("rope_theta") is None else config["rope_theta"]
    rope: Json = {"rope_type": "default"}
    if layout != "m1":
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        rope |= {key: value for key, value in given.items() if value is not None}
    fields["rope_parameters"] = {**rope, "rope_theta": rope.get("rope_theta", theta)}
    _check_rope(fields["rope_parameters"])
    return fields | _mixer_fields(shared, fields, layout), layout


def _check_rope(rope: Json) -> None:
    llama3 = {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    }  # fmt: skip
    needed = {"default": set(), "linear": {"factor"}, "llama3": llama3}.get(rope["rope_type"])
    numbers = {key: value for key, value in rope.items() if key != "rope_type"}
    if needed is not None and numbers.keys() != {"rope_theta", *needed}:
        raise UnsoundError(f"rope has {rope!r:.80}")
    if not all(map(number, numbers.values())):
        raise UnsoundError(f"rope has {rope!r:.80}")


_MAMBA_KEYS = {
    "d_model", "ssm_cfg", "rms_norm_eps", "vocab_size", "d_inner", "d_xb", "intermediate_size",
    "hidden_act", "n_layer", "attn_layers", "attention_layers",
}  # fmt: skip


def _mixer_fields(shared: Json, fields: Json, layout: str) -> Json:
    if not shared.keys() <= _MAMBA_KEYS:
        raise UnsoundError(f"mamba_config.json has {sorted(shared.keys() - _MAMBA_KEYS)}")
    for key, house in (
        ("d_model", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("n_layer", "num_hidden_layers"),
        ("hidden_act", "hidden_act"),
    ):
        if shared.get(key) is not None and not same(shared[key], fields[house]):
            raise UnsoundError(f"{key} of both files differs")
    is_mamba2 = layout == "mambainllama_mamba2"
    own = _SSM2 if is_mamba2 else _SSM1
    further = ("ngroups", "headdim", "d_ssm", "dt_limit") if is_mamba2 else ("dt_rank",)
    ssm = part(shared, "ssm_cfg", (*(key for key, *_ in own), "expand", "d_state", *further))
    width = ssm.get("expand", 2) * fields["hidden_size"]
    inner = width if shared.get("d_inner") is None else shared["d_inner"]
    state = ssm.get("d_state", 128 if is_mamba2 else 16)
    xb = shared.get("d_xb", 2560)
    if not (count(state) and count(int(inner)) and count(xb) and not (inner % state or xb % state)):
        raise UnsoundError(f"d_inner {inner!r:.80}, d_xb {xb!r:.80}, d_state {state!r:.80}")
    layers = shared.get("attn_layers") or shared.get("attention_layers") or []
    if not all(type(i) is int and 0 <= i < fields["num_hidden_layers"] for i in layers):
        raise UnsoundError(f"attn_layers {layers!r:.80}")
    eps = shared.get("rms_norm_eps")
    found = take(ssm, own) | {
        "mamba_rms_norm_eps": 1e-5 if eps is None else eps,
        "attention_layers": sorted(layers),
        "mamba_num_heads": inner // state,
        "mamba_n_groups": xb // state,
        "ssm_state_size": state,
        "mamba_version": "mamba2" if is_mamba2 else "mamba1",
        "mamba_mlp_bias": False,
        "weight_layout": layout,
    }
    if is_mamba2:
        limit = ssm.get("dt_limit")
        return found | {"time_step_limit": None if limit is None else list(limit)}
    rank = ssm.get("dt_rank", "auto")
    return found | {
        "time_step_rank": math.ceil(fields["hidden_size"] / 16) if rank == "auto" else rank
    }


def _converted_hybrid_fields(config: Json) -> Json:
    fields = take(config, _HF_HYBRID)
    heads, layers = fields["num_attention_heads"], config.get("attention_layers", [])

    def stated(key: str, is_possible: Callable[[Any], bool], default: Any) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if value is not None and not is_possible(value):
            raise UnsoundError(f"{key} is {value!r:.80}")
        return value

    rope = stated("rope_parameters", lambda v: isinstance(v, dict), {"rope_theta": 10000.0})
    rope = {name: value for name, value in rope.items() if value is not None}
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    rope = {"rope_type": "default", **rope}
    _check_rope(rope)
    if not all(type(i) is int for i in layers):
        raise UnsoundError(f"attention_layers {layers!r:.80}")
    is_mamba1 = fields["mamba_version"] == "mamba1"
    return fields | {
        "num_key_value_heads": stated("num_key_value_heads", count, heads),
        "head_dim": stated("head_dim", count, fields["hidden_size"] // heads),
        "mamba_rms_norm_eps": stated("mamba_rms_norm_eps", number, fields["rms_norm_eps"]),
        "mamba_mlp_bias": stated("mamba_mlp_bias", flag, fields["mlp_bias"]),
        "repeat_kv_before_conv": stated("repeat_kv_before_conv", flag, is_mamba1),
        "time_step_rank": stated("time_step_rank", count, math.ceil(fields["hidden_size"] / 16)),
        "time_step_limit": stated("time_step_limit", lambda v: isinstance(v, list), None),
        "sliding_window": stated("sliding_window", count, None),
        "rope_parameters": rope,
        "attention_layers": sorted(layers),
        "weight_layout": "thinkfast",
    }


# ------------------------------------------------------------------------------------------------
# Weights


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def stored_tensors(folder: Path) -> Tensors:
    """Published name -> tensor of all weight files of a folder."""
    found: Tensors = {}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {folder / name for name in read_json(index)["weight_map"].values()}
    else:
        files = set(folder.glob("*.safetensors"))
    for file in files:
        found |= parsed(file.read_bytes())
    for file in () if files else folder.glob("pytorch_model*.bin"):
        found |= torch.load(file, weights_only=True)
    return found


def parsed(raw: bytes) -> Tensors:
    """The tensors of a safetensors file; ``UnsoundError`` if the header does not fit the data."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    found, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None or begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise UnsoundError(f"the header says {entry} of {name!r:.80} after byte {end}")
        end = stop
        values = torch.frombuffer(bytearray(data[begin:stop]) or bytearray(8), dtype=dtype)
        found[name] = values[: math.prod(shape)].reshape(shape)
    if end != len(data):
        raise UnsoundError(f"{len(data) - end} bytes belong to no tensor")
    return found


def house_tensors(fields: Json, layout: str, stored: Tensors) -> Tensors:
    """The published tensors under the house's names."""
    found: Tensors = {}
    q = fields.get("num_attention_heads", 0) * fields.get("head_dim", 0)
    for name, tensor in stored.items():
        if layout == "llamba":
            name = name.replace("backbone.embedding.", "model.embed_tokens.")
            name = name.replace("backbone.final_layernorm.", "model.norm.")
            found[name.replace("backbone.", "model.")] = tensor
        elif layout == "m1" and ".mha.in_proj." in name:
            kv = fields["num_key_value_heads"] * fields["head_dim"]
            for letter, rows in zip("qkv", tensor.split([q, kv, kv]), strict=True):
                found[name.replace("mha.in_proj", f"self_attn.{letter}_proj")] = rows
        elif layout == "m1" and ".mha.out_proj." in name:
            found[name.replace("mha.out_proj", "self_attn.o_proj")] = tensor
        elif layout == "mambainllama_mamba1" and ".mamba.in_proj_z.weight" in name:
            mamba = name.removesuffix("in_proj_z.weight")
            parts = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
            rows = torch.cat([stored[f"{mamba}{each}.weight"] for each in parts])
            found[f"{mamba}in_proj.weight"] = rows
        elif layout == "mambainllama_mamba1" and name.endswith(
            ("in_proj_x.bias", "in_proj_z.bias")
        ):
            found[name.replace("in_proj_x.bias", "x_bias").replace("in_proj_z.bias", "z_bias")] = (
                tensor
            )
        elif layout == "mambainllama_mamba1" and name.endswith(
            ("in_proj_x.weight", "B_proj.weight", "C_proj.weight", "dt_proj_down.weight")
        ):
            continue
        else:
            found[name] = tensor
    if fields["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)
    return found
