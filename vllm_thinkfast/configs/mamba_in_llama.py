"""MambaInLlama: a Llama in which most attention layers became Mamba-1 or Mamba-2 mixers.

Published folders (jxiw/MambaInLlama, jxiw/M1) hold two files: ``config.json`` is the base Llama's
and says ``LlamaForCausalLM``; ``mamba_config.json`` beside it says which layers stay attention and
how the mixers are built. Which of three layouts a folder has (MambaInLlama Mamba-1, MambaInLlama
Mamba-2, M1) shows only in the names of its weights; it also decides whether ``rope_scaling``
applies: M1's code never scales RoPE, although its config.json still carries the entry.

Names: head h of a mixer is a slice of ``ssm_state_size`` channels (the published ``num_C_head =
d_inner // d_state``); the published ``d_xb`` is ``mamba_n_groups * ssm_state_size``
(``num_kv_heads * head_dim`` of the teacher).
"""

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from vllm_thinkfast.configs.fields import (
    LARGEST_COUNT,
    LARGEST_DEPTH,
    PASSED_ON,
    accepted_by_transformers,
    check_choice,
    check_divides,
    check_flags,
    check_interval,
    check_known_keys,
    check_no_members,
    check_object,
    check_of_transformers,
    check_positive,
    check_positive_number,
    check_rope,
    check_spelling,
    in_published_words,
    shown,
)

_OWNER = "MambaInLlama config.json"

WeightLayout = Literal["thinkfast", "mambainllama_mamba1", "mambainllama_mamba2", "m1"]
"""How the tensors of a folder are named; "thinkfast" is what ``thinkfast convert`` writes."""

GATED_NORM_EPS = 1e-5
"""eps of the gated norm of Mamba-2 mixers; a literal in ``mamba2/hybrid_mamba_layer.py``."""

_MAMBA_CONFIG_KEYS = (
    "d_model",
    "ssm_cfg",
    "rms_norm_eps",
    "vocab_size",
    "d_inner",
    "d_xb",
    "intermediate_size",
    "hidden_act",
    "n_layer",
    "attn_layers",
    "attention_layers",
)
# Initialisation and kernel choices: accepted in ssm_cfg, without effect on a trained model.
_IGNORED_SSM_KEYS = (
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "use_fast_path",
    "use_mem_eff_path",
    "conv_init",
    "A_init_range",
)
_MAMBA1_SSM_KEYS = (
    "d_state",
    "d_conv",
    "expand",
    "dt_rank",
    "repeat_kv_before_conv",
    "conv_bias",
    "proj_x_bias",
    "proj_z_bias",
    "out_proj_bias",
)
_MAMBA2_SSM_KEYS = (
    "d_state",
    "ngroups",
    "d_conv",
    "expand",
    "headdim",
    "d_ssm",
    "repeat_kv_before_conv",
    "rmsnorm",
    "norm_before_gate",
    "chunk_size",
    "bias",
    "conv_bias",
    "D_has_hdim",
    "dt_limit",
)


class MambaInLlamaConfig(PretrainedConfig):
    """Shape of a MambaInLlama hybrid, merged from both published files."""

    model_type = "mambainllama"

    def __init__(
        self,
        /,
        *,
        vocab_size: int = 128256,
        hidden_size: int = 3072,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 24,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        mamba_rms_norm_eps: float | None = None,
        max_position_embeddings: int = 131072,
        rope_parameters: dict[str, Any] | None = None,
        sliding_window: int | None = None,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        mamba_mlp_bias: bool | None = None,
        tie_word_embeddings: bool = False,
        attention_layers: Sequence[int] = (),
        mamba_version: Literal["mamba1", "mamba2"] = "mamba1",
        mamba_num_heads: int = 192,
        mamba_n_groups: int = 64,
        ssm_state_size: int = 16,
        conv_kernel: int = 4,
        use_conv_bias: bool = True,
        repeat_kv_before_conv: bool | None = None,
        time_step_rank: int | None = None,
        proj_x_bias: bool = False,
        proj_z_bias: bool = False,
        out_proj_bias: bool = False,
        use_bias: bool = False,
        use_gated_norm: bool = True,
        norm_before_gate: bool = False,
        d_has_head_dim: bool = False,
        time_step_limit: Sequence[float] | None = None,
        chunk_size: int = 256,
        weight_layout: WeightLayout = "thinkfast",
        **kwargs: Any,
    ) -> None:
        """Builds the merged configuration.

        Args:
            vocab_size: rows of the embedding.
            hidden_size: width of the residual stream.
            intermediate_size: width of the MLP.
            num_hidden_layers: number of blocks, attention and mamba together.
            num_attention_heads: query heads of the attention layers.
            num_key_value_heads: key/value heads; default: as many as query heads.
            head_dim: width of an attention head; default ``hidden_size / num_attention_heads``.
            hidden_act: activation of the MLP, only SiLU.
            rms_norm_eps: eps of attention blocks' norms and of the final norm.
            mamba_rms_norm_eps: eps of mamba blocks' norms; default ``rms_norm_eps``.
            max_position_embeddings: context of the attention layers in tokens.
            rope_parameters: ``rope_theta``, ``rope_type`` and its numbers.
            sliding_window: window of the attention layers in tokens (Mistral bases).
            attention_bias: whether q, k, v and o projections have a bias.
            mlp_bias: whether the MLPs of attention blocks have biases.
            mamba_mlp_bias: whether the MLPs of mamba blocks have biases; default ``mlp_bias``.
            tie_word_embeddings: whether head and embedding share weights.
            attention_layers: indices of layers that keep attention; all others are mixers.
            mamba_version: which recurrence the mixers compute.
            mamba_num_heads: heads H; the mixer is ``H * ssm_state_size`` wide.
            mamba_n_groups: groups G of x and B; each serves ``H / G`` consecutive heads.
            ssm_state_size: state width N (16 in Mamba-1 checkpoints, head_dim in Mamba-2).
            conv_kernel: taps K of the short convolution.
            use_conv_bias: whether the convolution has a bias.
            repeat_kv_before_conv: whether x (Mamba-2: and B) is repeated to H heads before the
                convolution; default true for Mamba-1, false for Mamba-2.
            time_step_rank: rank R of the step-size projection (Mamba-1); default
                ``ceil(hidden_size / 16)``.
            proj_x_bias: Mamba-1: whether the x projection has a bias.
            proj_z_bias: Mamba-1: whether the z projection has a bias.
            out_proj_bias: Mamba-1: whether the output projection has a bias.
            use_bias: Mamba-2: whether in_proj and out_proj have a bias.
            use_gated_norm: Mamba-2: RMS norm per head around the gate; otherwise gate only.
            norm_before_gate: Mamba-2: norm first, gate after. Published models gate first.
            d_has_head_dim: Mamba-2: D per channel instead of per head.
            time_step_limit: Mamba-2: (low, high) clamp of the step size after softplus.
            chunk_size: tokens per chunk of the published kernel; no effect on the result.
            weight_layout: how the tensors in the folder are named.
            **kwargs: fields of ``PretrainedConfig``.

        Raises:
            ValueError: an impossible or unknown value; the message names it.
        """
        check_no_members(_OWNER, MambaInLlamaConfig, kwargs)
        check_spelling(_OWNER, kwargs, _HOUSE_FIELDS | PASSED_ON)
        check_of_transformers(_OWNER, **kwargs)
        if kwargs.pop("partial_rotary_factor", None) not in (None, 1):
            raise ValueError(
                f"{_OWNER}: partial_rotary_factor is not supported: these models rotate whole "
                "heads. Remove it."
            )
        for name in ("rope_theta", "rope_scaling"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{_OWNER}: {name}={shown(kwargs[name])} beside rope_parameters; put it there."
                )
        check_positive(_OWNER, hidden_size=hidden_size, num_attention_heads=num_attention_heads)
        if num_key_value_heads is None:
            num_key_value_heads = num_attention_heads
        if head_dim is None:
            head_dim = hidden_size // num_attention_heads
        if repeat_kv_before_conv is None:
            repeat_kv_before_conv = mamba_version == "mamba1"
        if mamba_rms_norm_eps is None:
            mamba_rms_norm_eps = rms_norm_eps
        if time_step_rank is None:
            time_step_rank = math.ceil(hidden_size / 16)
        if mamba_mlp_bias is None:
            mamba_mlp_bias = mlp_bias
        if rope_parameters is None:
            rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        check_object(_OWNER, rope_parameters=rope_parameters)
        # Earlier releases of `thinkfast convert` copied what the base model had, nulls too, and
        # transformers 5 keeps the share of a head that is rotated here: all of it.
        rope_parameters = {
            name: value
            for name, value in rope_parameters.items()
            if value is not None and (name, value) != ("partial_rotary_factor", 1)
        }
        check_choice(_OWNER, "mamba_version", mamba_version, ("mamba1", "mamba2"))
        check_choice(_OWNER, "weight_layout", weight_layout, get_args(WeightLayout))
        check_choice(_OWNER, "hidden_act", hidden_act, ("silu", "swish"))
        check_positive(
            _OWNER,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            mamba_num_heads=mamba_num_heads,
            mamba_n_groups=mamba_n_groups,
            ssm_state_size=ssm_state_size,
            conv_kernel=conv_kernel,
            time_step_rank=time_step_rank,
            chunk_size=chunk_size,
        )
        check_positive(_OWNER, largest=LARGEST_DEPTH, num_hidden_layers=num_hidden_layers)
        check_positive_number(
            _OWNER, rms_norm_eps=rms_norm_eps, mamba_rms_norm_eps=mamba_rms_norm_eps
        )
        check_divides(
            _OWNER,
            num_attention_heads=(num_attention_heads, "num_key_value_heads", num_key_value_heads),
            mamba_num_heads=(mamba_num_heads, "mamba_n_groups", mamba_n_groups),
        )
        check_flags(
            _OWNER,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            mamba_mlp_bias=mamba_mlp_bias,
            tie_word_embeddings=tie_word_embeddings,
            use_conv_bias=use_conv_bias,
            repeat_kv_before_conv=repeat_kv_before_conv,
            proj_x_bias=proj_x_bias,
            proj_z_bias=proj_z_bias,
            out_proj_bias=out_proj_bias,
            use_bias=use_bias,
            use_gated_norm=use_gated_norm,
            norm_before_gate=norm_before_gate,
            d_has_head_dim=d_has_head_dim,
        )
        check_rope(_OWNER, rope_parameters)
        if sliding_window is not None:
            check_positive(_OWNER, sliding_window=sliding_window)
        if time_step_limit is not None:
            check_interval(_OWNER, time_step_limit=time_step_limit)
        if head_dim % 2:
            raise ValueError(f"{_OWNER}: head_dim={head_dim} must be even, for RoPE.")
        if conv_kernel < 2:
            raise ValueError(f"{_OWNER}: conv_kernel={conv_kernel} must be at least 2.")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = "silu"
        self.rms_norm_eps = rms_norm_eps
        self.mamba_rms_norm_eps = mamba_rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters
        self.sliding_window = sliding_window
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.mamba_mlp_bias = mamba_mlp_bias
        self.attention_layers = _checked_layers(attention_layers, num_hidden_layers)
        self.mamba_version = mamba_version
        self.mamba_num_heads = mamba_num_heads
        self.mamba_n_groups = mamba_n_groups
        self.ssm_state_size = ssm_state_size
        self.conv_kernel = conv_kernel
        self.use_conv_bias = use_conv_bias
        self.repeat_kv_before_conv = repeat_kv_before_conv
        self.time_step_rank = time_step_rank
        self.proj_x_bias = proj_x_bias
        self.proj_z_bias = proj_z_bias
        self.out_proj_bias = out_proj_bias
        self.use_bias = use_bias
        self.use_gated_norm = use_gated_norm
        self.norm_before_gate = norm_before_gate
        self.d_has_head_dim = d_has_head_dim
        self.time_step_limit = None if time_step_limit is None else list(time_step_limit)
        self.chunk_size = chunk_size
        self.weight_layout = weight_layout
        if not kwargs.get("architectures"):
            kwargs["architectures"] = ["MambaInLlamaForCausalLM"]
        with accepted_by_transformers(_OWNER):
            super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def mixer_size(self) -> int:
        """Width of z, C and y in a mixer (published: ``d_inner``)."""
        return int(self.mamba_num_heads * self.ssm_state_size)

    @property
    def xb_size(self) -> int:
        """Width of x and of B before they are repeated (published: ``d_xb``)."""
        return int(self.mamba_n_groups * self.ssm_state_size)

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: Mamba-1: x; Mamba-2: x, B and C."""
        xb_size = self.mixer_size if self.repeat_kv_before_conv else self.xb_size
        return xb_size if self.mamba_version == "mamba1" else 2 * xb_size + self.mixer_size

    @property
    def layers_block_type(self) -> list[str]:
        """vLLM's word for what each layer is."""
        kept = set(self.attention_layers)
        return ["attention" if i in kept else "mamba" for i in range(self.num_hidden_layers)]

    @classmethod
    def from_published(
        cls,
        config: Mapping[str, Any],
        mamba_config: Mapping[str, Any],
        weight_layout: WeightLayout,
    ) -> "MambaInLlamaConfig":
        """Merges the two published files.

        Args:
            config: ``config.json``, a Llama's or Mistral's.
            mamba_config: ``mamba_config.json``.
            weight_layout: which layout the weights have, see ``checkpoints.layout``.

        Returns:
            the configuration. As in the published code: mixers' blocks have no MLP biases; only
            Mistral's attention has a window; M1 drops RoPE scaling, the window and MLP biases.

        Raises:
            ValueError: the files contradict each other or hold an unknown option.
        """
        base = dict(config)
        check_spelling("config.json", base, _BASE_FIELDS | PASSED_ON)
        mixed = sorted((_HOUSE_FIELDS - _BASE_FIELDS).intersection(base))
        if mixed:
            raise ValueError(
                f"config.json: {', '.join(mixed)} beside mamba_config.json; fields of the mixers "
                "belong there. If `thinkfast convert` wrote this file, remove mamba_config.json."
            )
        is_mistral = base.pop("model_type", None) == "mistral"
        base.pop("architectures", None)
        if weight_layout == "m1":
            base.pop("mlp_bias", None)
        if weight_layout == "m1" or not is_mistral:
            base.pop("sliding_window", None)
        # vocab_size is not compared: the published code never reads it, and fine-tuning resizes.
        check_known_keys("mamba_config.json", mamba_config, _MAMBA_CONFIG_KEYS)
        for key, base_key in (
            ("d_model", "hidden_size"),
            ("intermediate_size", "intermediate_size"),
            ("n_layer", "num_hidden_layers"),
            ("hidden_act", "hidden_act"),
        ):
            stated = mamba_config.get(key)
            found = base.get(base_key)
            if stated is not None and (type(stated) is not type(found) or stated != found):
                raise ValueError(
                    f"mamba_config.json: {key}={shown(stated)} contradicts config.json: "
                    f"{base_key}={shown(found)}; both must describe the same model."
                )
        rope = _read_rope(base, is_scaled=weight_layout != "m1")
        mixer = _read_mixer(base, mamba_config, weight_layout)
        try:
            return cls(
                **base,
                **mixer,
                rope_parameters=rope,
                mamba_mlp_bias=False,
                mamba_rms_norm_eps=_stated(mamba_config, "rms_norm_eps", 1e-5),
                weight_layout=weight_layout,
            )
        except ValueError as error:
            raise in_published_words(error, _PUBLISHED_NAMES) from error


_HOUSE_FIELDS = frozenset(signature(MambaInLlamaConfig).parameters) - {"self", "kwargs"}
_BASE_FIELDS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    }
)
"""Fields of a Llama's or Mistral's config.json that matter here."""


_PUBLISHED_NAMES = {
    ours: f"{theirs} of mamba_config.json"
    for ours, theirs in {
        "attention_layers": "attn_layers",
        "mamba_rms_norm_eps": "rms_norm_eps",
        "mamba_num_heads": "d_inner / d_state",
        "mamba_n_groups": "d_xb / d_state",
        "ssm_state_size": "ssm_cfg.d_state",
        "conv_kernel": "ssm_cfg.d_conv",
        "use_conv_bias": "ssm_cfg.conv_bias",
        "repeat_kv_before_conv": "ssm_cfg.repeat_kv_before_conv",
        "time_step_rank": "ssm_cfg.dt_rank",
        "proj_x_bias": "ssm_cfg.proj_x_bias",
        "proj_z_bias": "ssm_cfg.proj_z_bias",
        "out_proj_bias": "ssm_cfg.out_proj_bias",
        "use_bias": "ssm_cfg.bias",
        "use_gated_norm": "ssm_cfg.rmsnorm",
        "norm_before_gate": "ssm_cfg.norm_before_gate",
        "d_has_head_dim": "ssm_cfg.D_has_hdim",
        "time_step_limit": "ssm_cfg.dt_limit",
        "chunk_size": "ssm_cfg.chunk_size",
    }.items()
}


def _stated(given: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field of a published file; null means that it was left out."""
    value = given.get(name)
    return default if value is None else value


def _read_rope(base: dict[str, Any], *, is_scaled: bool) -> dict[str, Any]:
    """Takes the RoPE fields out of ``base``, old and new form; returns ``rope_parameters``."""
    theta = base.pop("rope_theta", None)
    forms = {name: base.pop(name, None) for name in ("rope_parameters", "rope_scaling")}
    given = {name: value for name, value in forms.items() if value is not None}
    check_object("config.json", **given)
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise ValueError(
            f"config.json: rope_parameters={shown(given['rope_parameters'])} contradicts "
            f"rope_scaling={shown(given['rope_scaling'])}; remove one."
        )
    rope: dict[str, Any] = {}
    for value in given.values():
        rope = {name: number for name, number in value.items() if number is not None}
    types = [rope.pop(name) for name in ("rope_type", "type") if name in rope]
    if len(types) == 2 and types[0] != types[1]:
        raise ValueError(
            f"config.json: rope_type={shown(types[0])} contradicts type={shown(types[1])}; "
            "remove one."
        )
    thetas = [value for value in (theta, rope.pop("rope_theta", None)) if value is not None]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        raise ValueError(
            f"config.json: rope_theta={shown(thetas[0])} contradicts the one beside rope_type, "
            f"{shown(thetas[1])}; remove one."
        )
    scaling = {**rope, "rope_type": types[0] if types else "default"} if is_scaled else {}
    return {"rope_type": "default", **scaling, "rope_theta": thetas[0] if thetas else 10000.0}


def _checked_layers(layers: Sequence[int], num_hidden_layers: int) -> list[int]:
    if not isinstance(layers, (list, tuple)):
        raise ValueError(f"{_OWNER}: attention_layers={shown(layers)} must be a list of indices.")
    indices = list(layers)
    wrong = [i for i in indices if type(i) is not int or not 0 <= i < num_hidden_layers]
    if wrong or len(set(indices)) != len(indices):
        raise ValueError(
            f"{_OWNER}: attention_layers={shown(indices)} must be distinct indices from 0 to "
            f"{num_hidden_layers - 1}; offending: {shown(wrong) if wrong else 'duplicates'}."
        )
    return sorted(indices)


def _read_mixer(
    base: Mapping[str, Any], mamba_config: Mapping[str, Any], weight_layout: WeightLayout
) -> dict[str, Any]:
    """Reads the mixers' options: ``mamba_config.json`` -> keyword arguments of the config class."""
    is_mamba2 = weight_layout == "mambainllama_mamba2"
    ssm_cfg = _stated(mamba_config, "ssm_cfg", {})
    check_object("mamba_config.json", ssm_cfg=ssm_cfg)
    ssm_cfg = dict(ssm_cfg)
    owner = "mamba_config.json: ssm_cfg"
    known = _MAMBA2_SSM_KEYS if is_mamba2 else _MAMBA1_SSM_KEYS
    check_known_keys(owner, ssm_cfg, (*known, *_IGNORED_SSM_KEYS))
    hidden_size = base["hidden_size"]
    expand = ssm_cfg.get("expand", 2)
    check_positive_number(owner, expand=expand)
    if expand > LARGEST_COUNT:
        raise ValueError(f"{owner}: expand={shown(expand)} is above {LARGEST_COUNT}.")
    d_inner = mamba_config.get("d_inner")
    d_inner = int(expand * hidden_size) if d_inner is None else d_inner
    d_xb = mamba_config.get("d_xb", 2560)
    d_state = ssm_cfg.get("d_state", 128 if is_mamba2 else 16)
    check_positive(owner, d_inner=d_inner, d_xb=d_xb, d_state=d_state)
    check_divides(
        "mamba_config.json", d_inner=(d_inner, "d_state", d_state), d_xb=(d_xb, "d_state", d_state)
    )
    names = ("attn_layers", "attention_layers")
    layers = [mamba_config[name] for name in names if mamba_config.get(name) is not None]
    if len(layers) == 2 and layers[0] != layers[1]:
        raise ValueError(
            f"mamba_config.json: attn_layers={shown(layers[0])} contradicts "
            f"attention_layers={shown(layers[1])}; remove one."
        )
    fields: dict[str, Any] = {
        "attention_layers": layers[0] if layers else [],
        "mamba_num_heads": d_inner // d_state,
        "mamba_n_groups": d_xb // d_state,
        "ssm_state_size": d_state,
        "conv_kernel": ssm_cfg.get("d_conv", 4),
        "use_conv_bias": ssm_cfg.get("conv_bias", True),
        "repeat_kv_before_conv": ssm_cfg.get("repeat_kv_before_conv", not is_mamba2),
    }
    if not is_mamba2:
        dt_rank = ssm_cfg.get("dt_rank", "auto")
        return {
            **fields,
            "mamba_version": "mamba1",
            "time_step_rank": math.ceil(hidden_size / 16) if dt_rank == "auto" else dt_rank,
            "proj_x_bias": ssm_cfg.get("proj_x_bias", False),
            "proj_z_bias": ssm_cfg.get("proj_z_bias", False),
            "out_proj_bias": ssm_cfg.get("out_proj_bias", False),
        }
    ngroups = ssm_cfg.get("ngroups", 1)
    check_positive(owner, ngroups=ngroups)
    if ngroups * d_state != d_inner:
        raise ValueError(
            f"{owner}: ngroups={ngroups} times d_state={d_state} must equal d_inner={d_inner}."
        )
    if ssm_cfg.get("d_ssm") not in (None, d_inner):
        raise ValueError(f"{owner}: d_ssm={shown(ssm_cfg['d_ssm'])} must equal d_inner={d_inner}.")
    limit = ssm_cfg.get("dt_limit")
    return {
        **fields,
        "mamba_version": "mamba2",
        "use_bias": ssm_cfg.get("bias", False),
        "use_gated_norm": ssm_cfg.get("rmsnorm", True),
        "norm_before_gate": ssm_cfg.get("norm_before_gate", False),
        "d_has_head_dim": ssm_cfg.get("D_has_hdim", False),
        "time_step_limit": limit,
        "chunk_size": ssm_cfg.get("chunk_size", 256),
    }
