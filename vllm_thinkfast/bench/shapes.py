"""Models to compare when no trained ones are at hand: config.json files of equal parameter count.

A preset is the shape of a Llama. The other models of the preset have its width, depth, vocabulary
and tied head; the width of their MLPs is chosen so that the number of parameters comes closest to
the Llama's. State sizes are those of the published checkpoints: Llamba has heads of 64 channels
with N = 64 and a group per head (the 3B model 32 heads of 96); MambaInLlama has Mamba-1 layers with
N = 16 and as many x and B channels as its teacher has keys.

Two more models serve for the comparison with vLLM's own Mamba-2 at equal shapes: ``mamba2`` has as
many mixers as the Llamba, of the same sizes, but no MLPs (``Mamba2ForCausalLM`` knows none);
``llamba-bare`` is the Llamba with MLPs that are next to nothing.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers takes seconds to import; the command line needs only the names
    from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

MLP_MULTIPLE = 32
"""MLP widths are multiples of this, so that no kernel meets an odd size."""
BARE_MLP = 32
"""MLP width of ``llamba-bare``."""
_CONTEXT = 131072


@dataclass(frozen=True)
class Shape:
    """A Llama with a tied head, and where its hybrid keeps attention."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_ssm_heads: int
    """Heads, and groups, of the Llamba."""
    attention_layers: tuple[int, ...]
    """Of the hybrid."""


PRESETS: dict[str, Shape] = {
    "tiny": Shape(256, 64, 2, 128, 2, 1, 32, 2, (1,)),
    "30m": Shape(12288, 512, 8, 1408, 8, 4, 64, 8, (3, 7)),
    # SmolLM2-135M, Llama-3.2-1B and Llama-3.2-3B.
    "135m": Shape(49152, 576, 30, 1536, 9, 3, 64, 9, (4, 9, 14, 19, 24, 29)),
    "1b": Shape(128256, 2048, 16, 8192, 32, 8, 64, 32, (3, 7, 11, 15)),
    "3b": Shape(128256, 3072, 28, 8192, 24, 8, 128, 32, (3, 8, 13, 18, 23, 27)),
}


def _common_fields(shape: Shape) -> dict[str, Any]:
    """Fields that all models of a shape share."""
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "tie_word_embeddings": True,
    }


def _attention_fields(shape: Shape) -> dict[str, Any]:
    """Fields of the models that have attention."""
    return {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": _CONTEXT,
    }


def llama_config(shape: Shape) -> dict[str, Any]:
    """config.json of the Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": shape.intermediate_size,
        **_common_fields(shape),
        **_attention_fields(shape),
    }


def num_llama_parameters(shape: Shape) -> int:
    """Parameters of the Llama; the head shares the embedding's."""
    D = shape.hidden_size
    q = shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    layer = D * (2 * q + 2 * kv) + 3 * D * shape.intermediate_size + 2 * D
    return shape.vocab_size * D + shape.num_hidden_layers * layer + D


def llamba_config(shape: Shape) -> dict[str, Any]:
    """config.json of the Llamba."""
    from vllm_thinkfast.configs import LlambaConfig

    def with_mlp(width: int) -> LlambaConfig:
        return LlambaConfig(
            intermediate_size=width,
            num_heads=shape.num_ssm_heads,
            n_groups=shape.num_ssm_heads,
            ssm_state_size=64,
            max_position_embeddings=_CONTEXT,
            **_common_fields(shape),
        )

    return _fields(_matched(shape, with_mlp))


def bare_llamba_config(shape: Shape) -> dict[str, Any]:
    """config.json of the Llamba without MLPs worth the name."""
    return {**llamba_config(shape), "intermediate_size": BARE_MLP}


def mambainllama_config(shape: Shape) -> dict[str, Any]:
    """config.json of the hybrid with Mamba-1 layers."""
    from vllm_thinkfast.configs import MambaInLlamaConfig

    N = 16

    def with_mlp(width: int) -> MambaInLlamaConfig:
        return MambaInLlamaConfig(
            intermediate_size=width,
            attention_layers=shape.attention_layers,
            mamba_version="mamba1",
            mamba_num_heads=shape.num_attention_heads * shape.head_dim // N,
            mamba_n_groups=shape.num_key_value_heads * shape.head_dim // N,
            ssm_state_size=N,
            architectures=["MambaInLlamaForCausalLM"],
            **_common_fields(shape),
            **_attention_fields(shape),
        )

    return _fields(_matched(shape, with_mlp))


def mamba2_config(shape: Shape) -> dict[str, Any]:
    """config.json of vLLM's own Mamba-2, with the mixers' sizes of the Llamba."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_heads": shape.num_ssm_heads,
        "head_dim": shape.hidden_size // shape.num_ssm_heads,
        "n_groups": shape.num_ssm_heads,
        "state_size": 64,
        "expand": 1,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        **_common_fields(shape),
    }


FAMILIES: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "llama": llama_config,
    "llamba": llamba_config,
    "mambainllama": mambainllama_config,
    "mamba2": mamba2_config,
    "llamba-bare": bare_llamba_config,
}
"""Name in the tables -> config.json of a shape."""


def write_folder(folder: Path, family: str, preset: str) -> Path:
    """Writes a folder with nothing but config.json; returns it.

    Args:
        folder: is made; an older config.json is replaced.
        family: a key of `FAMILIES`.
        preset: a key of `PRESETS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = FAMILIES[family](PRESETS[preset])
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def num_parameters(config: "LlambaConfig | MambaInLlamaConfig") -> int:
    """Parameters of one of our models; a tied head counts once."""
    from vllm_thinkfast.checkpoints.reader import house_shapes

    shapes = house_shapes(config)
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return sum(math.prod(shape) for shape in shapes.values())


def _matched(shape: Shape, with_mlp: Callable[[int], Any]) -> Any:
    """The configuration whose parameter count is closest to the Llama's."""
    wanted = num_llama_parameters(shape)
    narrow = num_parameters(with_mlp(MLP_MULTIPLE))
    per_multiple = num_parameters(with_mlp(2 * MLP_MULTIPLE)) - narrow
    multiples = 1 + round((wanted - narrow) / per_multiple)
    return with_mlp(max(1, multiples) * MLP_MULTIPLE)


def _fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string())
    return fields
