"""The student: a MambaInLlama (Mamba-1) folder made from a Llama folder, without any training.

What is copied follows MambaInLlama (jxiw/MambaInLlama ``mamba/``, arXiv 2408.15237): query -> C,
key -> B, value -> x, output -> out_proj; MLPs, norms, embedding and some attention layers stay the
teacher's. Gate, convolution, step size and D start as a fresh Mamba-1 layer does.

One difference: the published code cuts heads into slices of ``d_state`` channels and repeats keys
and values per SLICE, which pairs a query slice with a key slice of another head. Here the slices of
C and out_proj are put in the order in which the repetition serves them (`slice_order`), so that
every query slice meets the key and value slice of its own head.

The folder is in the published layout: config.json says LlamaForCausalLM, and mamba_config.json
holds the rest.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

D_STATE = 16
"""State width, as in every published Mamba-1 checkpoint."""
D_CONV = 4
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
"""Range of the initial step sizes and their lower bound, as in mamba_ssm's Mamba-1 layer."""
_NOT_COPIED = ("config.json", "mamba_config.json")
_NOT_COPIED_SUFFIXES = (".safetensors", ".bin", ".index.json")


def every_nth_layer(num_layers: int, n: int = 4) -> list[int]:
    """Layers that keep attention: the last of every ``n``."""
    return list(range(n - 1, num_layers, n))


def slice_order(num_heads: int, num_kv_heads: int, head_dim: int, d_state: int) -> torch.Tensor:
    """Where each channel of C comes from among the teacher's query channels.

    Mixer slice ``(g * M + m) * r + j`` is served by slice ``m`` of key head ``g``; it must hold
    slice ``m`` of query head ``g * r + j``. M slices per head, r query heads per key head.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: channels of a head.
        d_state: channels of a slice; divides head_dim.

    Returns:
        [num_heads * head_dim] indices; the identity when ``d_state == head_dim``.
    """
    index = torch.arange(num_heads * head_dim)
    index = index.view(num_kv_heads, num_heads // num_kv_heads, head_dim // d_state, d_state)
    return index.transpose(1, 2).reshape(-1)


def mixer_tensors(
    attention: dict[str, torch.Tensor],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    d_state: int,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """A Mamba-1 mixer from one attention layer, under the published names.

    Args:
        attention: ``q_proj.weight`` [d_inner, D], ``k_proj.weight`` and ``v_proj.weight``
            [d_xb, D], ``o_proj.weight`` [D, d_inner].
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: channels of a head.
        d_state: state width; divides head_dim.
        generator: source of everything random.

    Returns:
        name behind ``mamba.`` -> tensor, float32.
    """
    d_inner, hidden = attention["q_proj.weight"].shape
    dt_rank = math.ceil(hidden / 16)
    order = slice_order(num_heads, num_kv_heads, head_dim, d_state)

    def uniform(shape: Sequence[int], bound: float) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * bound

    log_dt = torch.rand(d_inner, generator=generator) * math.log(DT_MAX / DT_MIN)
    dt = (log_dt.exp() * DT_MIN).clamp(min=DT_FLOOR)
    decay_rates = torch.arange(1, d_state + 1, dtype=torch.float32)
    return {
        "C_proj.weight": attention["q_proj.weight"][order],
        "B_proj.weight": attention["k_proj.weight"].clone(),
        "in_proj_x.weight": attention["v_proj.weight"].clone(),
        "out_proj.weight": attention["o_proj.weight"][:, order].contiguous(),
        "in_proj_z.weight": uniform((d_inner, hidden), hidden**-0.5),
        "conv1d.weight": uniform((d_inner, 1, D_CONV), D_CONV**-0.5),
        "conv1d.bias": uniform((d_inner,), D_CONV**-0.5),
        "dt_proj_down.weight": uniform((dt_rank, hidden), hidden**-0.5),
        "dt_proj.weight": uniform((d_inner, dt_rank), dt_rank**-0.5),
        "dt_proj.bias": dt + torch.log(-torch.expm1(-dt)),  # inverse of softplus
        "A_log": decay_rates.log().repeat(d_inner, 1),
        "D": torch.ones(d_inner),
    }


def mamba_config(
    config: dict[str, Any], attention_layers: Sequence[int], d_state: int
) -> dict[str, Any]:
    """The contents of mamba_config.json, with the published keys."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    ssm_cfg = {"expand": 1} | ({} if d_state == D_STATE else {"d_state": d_state})
    return {
        "d_model": config["hidden_size"],
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": config["rms_norm_eps"],
        "vocab_size": None,
        "d_inner": None if heads * head_dim == config["hidden_size"] else heads * head_dim,
        "d_xb": config["num_key_value_heads"] * head_dim,
        "intermediate_size": config["intermediate_size"],
        "hidden_act": config["hidden_act"],
        "n_layer": config["num_hidden_layers"],
        "attn_layers": list(attention_layers),
    }


def write_student(
    teacher: Path,
    folder: Path,
    *,
    attention_layers: Sequence[int] | None = None,
    d_state: int = D_STATE,
    seed: int = 0,
) -> None:
    """Writes the untrained student of a Llama folder.

    Args:
        teacher: a Llama folder with one or more safetensors files.
        folder: where to write; exists and is empty.
        attention_layers: layers that keep attention; default: every fourth.
        d_state: state width; divides the head width.
        seed: of the tensors that do not come from the teacher.

    Raises:
        ValueError: ``d_state`` does not divide the head width.
    """
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    if head_dim % d_state:
        raise ValueError(f"d_state={d_state} must divide the teacher's head width {head_dim}.")
    kept = every_nth_layer(num_layers) if attention_layers is None else list(attention_layers)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(teacher.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name).float() for name in opened.keys()})  # noqa: SIM118
    generator = torch.Generator().manual_seed(seed)
    for i in sorted(set(range(num_layers)) - set(kept)):
        prefix = f"model.layers.{i}.self_attn."
        attention = {
            name.removeprefix(prefix): tensors.pop(name)
            for name in [name for name in tensors if name.startswith(prefix)]
        }
        mixer = mixer_tensors(
            attention,
            num_heads=num_heads,
            num_kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            d_state=d_state,
            generator=generator,
        )
        tensors |= {f"model.layers.{i}.mamba.{name}": value for name, value in mixer.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(folder / "mamba_config.json", mamba_config(config, kept, d_state))
    for file in teacher.iterdir():
        if file.name not in _NOT_COPIED and not file.name.endswith(_NOT_COPIED_SUFFIXES):
            shutil.copyfile(file, folder / file.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
