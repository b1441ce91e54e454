"""Key map of Llamba folders.

Published names: cartesia-ai/edge ``cartesia_pytorch/Llamba/llamba.py`` (``backbone.*``). The same
tensors under ``model.*`` (``model.embedding``, ``model.final_layernorm``) are read too. There is no
A_log, dt_bias or gated norm: files that hold them are of another architecture and are refused as
surplus.
"""

from vllm_thinkfast.checkpoints.key_map import Rule, Shape, rename
from vllm_thinkfast.configs import LlambaConfig


def house_shapes(config: LlambaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, under the house's names."""
    hidden, mixer, conv = config.hidden_size, config.mixer_size, config.conv_dim
    vocab, mlp, heads = config.vocab_size, config.intermediate_size, config.num_heads
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}"
        shapes[f"{p}.input_layernorm.weight"] = (hidden,)
        # Rows of in_proj: [x B C (convolved) | z | dt_logits], published as [xBC | z | A_log].
        shapes[f"{p}.mixer.in_proj.weight"] = (conv + mixer + heads, hidden)
        if config.use_bias:
            shapes[f"{p}.mixer.in_proj.bias"] = (conv + mixer + heads,)
            shapes[f"{p}.mixer.out_proj.bias"] = (hidden,)
        else:
            shapes[f"{p}.mixer.z_bias"] = (mixer,)
        shapes[f"{p}.mixer.conv1d.weight"] = (conv, 1, config.conv_kernel)
        if config.use_conv_bias:
            shapes[f"{p}.mixer.conv1d.bias"] = (conv,)
        shapes[f"{p}.mixer.D"] = (heads,)
        shapes[f"{p}.mixer.out_proj.weight"] = (hidden, mixer)
        shapes[f"{p}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{p}.mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[f"{p}.mlp.up_proj.weight"] = (mlp, hidden)
        shapes[f"{p}.mlp.down_proj.weight"] = (hidden, mlp)
        if config.mlp_bias:
            shapes[f"{p}.mlp.gate_proj.bias"] = (mlp,)
            shapes[f"{p}.mlp.up_proj.bias"] = (mlp,)
            shapes[f"{p}.mlp.down_proj.bias"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    if config.lm_head_bias:
        shapes["lm_head.bias"] = (vocab,)
    return shapes


def canonical_name(name: str) -> str:
    """The published ``backbone.*`` name of a tensor in any of the layouts that were seen.

    Args:
        name: ``backbone.*``, ``model.*`` (with ``embedding`` or ``embed_tokens`` and
            ``final_layernorm`` or ``norm``), or a head inside or outside the backbone.
    """
    prefix, _, tail = name.partition(".")
    if prefix not in ("backbone", "model"):
        return name
    part, _, rest = tail.partition(".")
    if part == "lm_head":
        return tail
    part = {"embed_tokens": "embedding", "norm": "final_layernorm"}.get(part, part)
    return f"backbone.{part}.{rest}"


def rules(config: LlambaConfig) -> list[Rule]:
    """The key map of ``config.weight_layout``, for names that went through ``canonical_name``."""
    shapes = house_shapes(config)
    if config.weight_layout == "thinkfast":
        return [rename(name, name) for name in shapes]
    return [rename(name, canonical_name(name)) for name in shapes]
