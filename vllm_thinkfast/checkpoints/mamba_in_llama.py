"""Key maps of MambaInLlama folders: Mamba-1, Mamba-2, M1, and what ``thinkfast convert`` writes.

Published names: jxiw/MambaInLlama ``mamba/`` and ``mamba2/hybrid_mamba_layer.py``, jxiw/M1
``mamba/hybrid_mamba_layer.py``. The house keeps Llama's names for everything but the mixer, and one
fused ``mamba.in_proj`` with rows ``[z | x | B | C | dt]``, as Mamba-2 and M1 publish it.
"""

from collections.abc import Collection

from vllm_thinkfast.checkpoints.key_map import CheckpointError, Rule, Shape, rename
from vllm_thinkfast.configs import MambaInLlamaConfig
from vllm_thinkfast.configs.fields import printable
from vllm_thinkfast.configs.mamba_in_llama import WeightLayout


def in_proj_rows(config: MambaInLlamaConfig) -> dict[str, int]:
    """Rows of each part of the fused in_proj, in order."""
    is_mamba1 = config.mamba_version == "mamba1"
    return {
        "z": config.mixer_size,
        "x": config.xb_size,
        "B": config.xb_size,
        "C": config.mixer_size,
        # Mamba-1: input of dt_proj; Mamba-2: one logit per head.
        "dt": config.time_step_rank if is_mamba1 else config.mamba_num_heads,
    }


def house_shapes(config: MambaInLlamaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, under the house's names."""
    hidden, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    kept = set(config.attention_layers)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}"
        shapes[f"{p}.input_layernorm.weight"] = (hidden,)
        if i in kept:
            shapes[f"{p}.self_attn.q_proj.weight"] = (q_size, hidden)
            shapes[f"{p}.self_attn.k_proj.weight"] = (kv_size, hidden)
            shapes[f"{p}.self_attn.v_proj.weight"] = (kv_size, hidden)
            shapes[f"{p}.self_attn.o_proj.weight"] = (hidden, q_size)
            if config.attention_bias:
                shapes[f"{p}.self_attn.q_proj.bias"] = (q_size,)
                shapes[f"{p}.self_attn.k_proj.bias"] = (kv_size,)
                shapes[f"{p}.self_attn.v_proj.bias"] = (kv_size,)
                shapes[f"{p}.self_attn.o_proj.bias"] = (hidden,)
        else:
            shapes.update(_mixer_shapes(config, f"{p}.mamba"))
        shapes[f"{p}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{p}.mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[f"{p}.mlp.up_proj.weight"] = (mlp, hidden)
        shapes[f"{p}.mlp.down_proj.weight"] = (hidden, mlp)
        if config.mlp_bias if i in kept else config.mamba_mlp_bias:
            shapes[f"{p}.mlp.gate_proj.bias"] = (mlp,)
            shapes[f"{p}.mlp.up_proj.bias"] = (mlp,)
            shapes[f"{p}.mlp.down_proj.bias"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _mixer_shapes(config: MambaInLlamaConfig, p: str) -> dict[str, Shape]:
    hidden, width, heads = config.hidden_size, config.mixer_size, config.mamba_num_heads
    rows = sum(in_proj_rows(config).values())
    shapes: dict[str, Shape] = {
        f"{p}.in_proj.weight": (rows, hidden),
        f"{p}.conv1d.weight": (config.conv_dim, 1, config.conv_kernel),
        f"{p}.out_proj.weight": (hidden, width),
    }
    if config.use_conv_bias:
        shapes[f"{p}.conv1d.bias"] = (config.conv_dim,)
    if config.mamba_version == "mamba1":
        shapes[f"{p}.dt_proj.weight"] = (width, config.time_step_rank)
        shapes[f"{p}.dt_proj.bias"] = (width,)
        shapes[f"{p}.A_log"] = (width, config.ssm_state_size)
        shapes[f"{p}.D"] = (width,)
        if config.proj_x_bias:
            shapes[f"{p}.x_bias"] = (config.xb_size,)
        if config.proj_z_bias:
            shapes[f"{p}.z_bias"] = (width,)
        if config.out_proj_bias:
            shapes[f"{p}.out_proj.bias"] = (hidden,)
        return shapes
    shapes[f"{p}.dt_bias"] = (heads,)
    shapes[f"{p}.A_log"] = (heads,)
    shapes[f"{p}.D"] = (width if config.d_has_head_dim else heads,)
    if config.use_gated_norm:
        shapes[f"{p}.norm.weight"] = (width,)
    if config.use_bias:
        shapes[f"{p}.in_proj.bias"] = (rows,)
        shapes[f"{p}.out_proj.bias"] = (hidden,)
    return shapes


def rules(config: MambaInLlamaConfig) -> list[Rule]:
    """The key map of ``config.weight_layout``."""
    layout = config.weight_layout
    shapes = house_shapes(config)
    if layout in ("thinkfast", "mambainllama_mamba2"):
        return [rename(name, name) for name in shapes]
    found: list[Rule] = []
    for name in shapes:
        p, _, tail = name.rpartition(".mamba.")
        if tail and layout == "mambainllama_mamba1":
            found.append(_mamba1_rule(config, name, f"{p}.mamba", tail))
        elif ".self_attn." in name and layout == "m1":
            found.extend(_m1_attention_rule(name))
        else:
            found.append(rename(name, name))
    if layout == "m1" and (config.proj_x_bias or config.proj_z_bias or config.attention_bias):
        raise CheckpointError(
            "M1 folders have one fused in_proj without bias; proj_x_bias, proj_z_bias and "
            "attention_bias must be false in mamba_config.json and config.json."
        )
    return found


def _mamba1_rule(config: MambaInLlamaConfig, name: str, p: str, tail: str) -> Rule:
    if tail == "in_proj.weight":
        rows = in_proj_rows(config)
        # q -> C, k -> B, v -> x in the published initialisation, hence separate projections.
        published = {
            "z": "in_proj_z",
            "x": "in_proj_x",
            "B": "B_proj",
            "C": "C_proj",
            "dt": "dt_proj_down",
        }
        return Rule(
            (name,),
            tuple(f"{p}.{published[part]}.weight" for part in rows),
            tuple(rows.values()),
        )
    if tail == "x_bias":
        return rename(name, f"{p}.in_proj_x.bias")
    if tail == "z_bias":
        return rename(name, f"{p}.in_proj_z.bias")
    return rename(name, name)


def _m1_attention_rule(name: str) -> list[Rule]:
    p, _, tail = name.rpartition(".self_attn.")
    if tail == "q_proj.weight":
        house = tuple(f"{p}.self_attn.{part}_proj.weight" for part in "qkv")
        return [Rule(house, (f"{p}.mha.in_proj.weight",))]
    if tail == "o_proj.weight":
        return [rename(name, f"{p}.mha.out_proj.weight")]
    return []


def layout_of(names: Collection[str], source: str) -> WeightLayout:
    """Tells the published layouts apart by the names of their tensors.

    Args:
        names: names of the tensors in the folder.
        source: the folder, for messages.

    Raises:
        CheckpointError: no known layout fits.
    """
    tails = {name.rpartition(".mamba.")[2] for name in names if ".mamba." in name}
    if {"dt_bias", "in_proj.weight"} <= tails:
        return "mambainllama_mamba2"
    if "in_proj_x.weight" in tails:
        return "mambainllama_mamba1"
    if {"in_proj.weight", "dt_proj.weight"} <= tails:
        return "m1"
    if names and not tails:
        raise CheckpointError(
            f"{source}: mamba_config.json is there, but no weight belongs to a mixer (accepted: at "
            "least one mamba layer). If every layer is attention, remove mamba_config.json and "
            "serve the folder as the Llama it is."
        )
    found = [printable(tail) for tail in sorted(tails)[:12]]
    raise CheckpointError(
        f"{source}: mamba_config.json is there, but no known layout fits the weights; mixer "
        f"tensors found: {found or 'none'}; accepted: MambaInLlama Mamba-1 "
        "(mamba.in_proj_x), MambaInLlama Mamba-2 (mamba.in_proj with mamba.dt_bias), M1 "
        "(mamba.in_proj with mamba.dt_proj)."
    )
