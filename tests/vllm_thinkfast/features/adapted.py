"""Test checkpoints changed in ways that a feature has to reproduce: adapters and int8 weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA = 4, 8


def linear_names(tensors: dict[str, Tensor]) -> list[str]:
    """Weights of linear layers inside of the blocks; convolutions have three dimensions."""
    return sorted(
        name
        for name, tensor in tensors.items()
        if ".layers." in name and name.endswith(".weight") and tensor.dim() == 2
    )


def write_adapter(folder: Path, adapter: Path, merged: Path, seed: int) -> None:
    """A LoRA adapter on every linear layer, as PEFT writes it, and the checkpoint with it merged.

    Args:
        folder: the base model.
        adapter: written: adapter_config.json and adapter_model.safetensors.
        merged: written: a copy of the base model with W + alpha / r * B A.
        seed: of A and B.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    names = linear_names(tensors)
    low_rank: dict[str, Tensor] = {}
    for name in names:
        rows, columns = tensors[name].shape
        A = torch.randn(RANK, columns, generator=generator) / columns**0.5
        B = 0.3 * torch.randn(rows, RANK, generator=generator) / RANK**0.5
        module = f"base_model.model.{name.removesuffix('.weight')}"
        low_rank[f"{module}.lora_A.weight"], low_rank[f"{module}.lora_B.weight"] = A, B
        tensors[name] = tensors[name] + ALPHA / RANK * (B @ A)
    adapter.mkdir()
    save_file(low_rank, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name in names}),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    _copy(folder, merged, tensors)


def write_int8(
    folder: Path, quantised: Path, rounded: Path, *, is_per_tensor: bool = False
) -> None:
    """The checkpoint with int8 weights, in the format of compressed-tensors, and its twin.

    Args:
        folder: a folder written by ``thinkfast convert``.
        quantised: written: int8 weights with scales; activations are rounded while it runs.
        rounded: written: the same rounded weights as floats, unquantised.
        is_per_tensor: one scale for each weight instead of one for each of its rows.
    """
    tensors = load_file(folder / "model.safetensors")
    packed, floats = dict(tensors), dict(tensors)
    for name in linear_names(tensors):
        largest = tensors[name].abs().amax(dim=1, keepdim=True)
        scale = (largest.max().reshape(1) if is_per_tensor else largest) / 127
        packed[name] = (tensors[name] / scale).round().to(torch.int8)
        packed[f"{name}_scale"] = scale
        floats[name] = packed[name] * scale
    strategy = "tensor" if is_per_tensor else "channel"
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": strategy, "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    _copy(folder, rounded, floats)
    _copy(folder, quantised, packed, lambda config: config | {"quantization_config": settings})


def write_process_reward_model(folder: Path, scored: Path, tokens: tuple[int, int]) -> None:
    """The checkpoint with a linear head of two labels: the rows of two tokens in the LM head."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors.get("lm_head.weight")
    if head is None:
        head = next(t for name, t in tensors.items() if "embed" in name)
    tensors["score.weight"] = head[list(tokens)].clone()
    _copy(folder, scored, tensors)


def _copy(
    folder: Path,
    copy: Path,
    tensors: dict[str, Tensor],
    change: Callable[[dict[str, object]], dict[str, object]] = lambda config: config,
) -> None:
    shutil.copytree(folder, copy)
    save_file({k: v.contiguous() for k, v in tensors.items()}, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(change(config)))
