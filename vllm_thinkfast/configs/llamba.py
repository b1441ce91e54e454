"""Llamba: a Llama whose attention is replaced by discrete Mamba-2 mixers.

Source of the published fields: cartesia-ai/edge
``cartesia_pytorch/Llamba/configuration_llamba.py`` (paper: arXiv 2502.14458). Easy to miss: the
norms of the blocks have eps 1e-5 whatever ``norm_epsilon`` says, and the constructor pads the
vocabulary.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from vllm_thinkfast.configs.fields import (
    LARGEST_DEPTH,
    PASSED_ON,
    accepted_by_transformers,
    check_choice,
    check_divides,
    check_flags,
    check_known_keys,
    check_no_members,
    check_object,
    check_of_transformers,
    check_positive,
    check_positive_number,
    check_spelling,
    in_published_words,
)

_OWNER = "Llamba config.json"

WeightLayout = Literal["thinkfast", "llamba"]
"""How the tensors of a folder are named; "thinkfast" is what ``thinkfast convert`` writes."""

BLOCK_NORM_EPS = 1e-5
"""eps of both norms of every block; a literal in the published ``llamba.py``."""

_SSM_CFG_DEFAULTS: dict[str, Any] = {
    "d_state": 64,
    "n_v_heads": 32,
    "n_qk_heads": 32,
    "expand": 1,
    "chunk_size": 128,
    "activation": "identity",
    "bias": False,
    "d_conv": 4,
    "conv_bias": True,
}
_MLP_CFG_DEFAULTS: dict[str, Any] = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}
_SILU_NAMES = ("silu", "swish")


class LlambaConfig(PretrainedConfig):
    """Shape of a Llamba model; reads published files and files written by ``thinkfast convert``."""

    model_type = "llamba"

    def __init__(
        self,
        /,
        *,
        vocab_size: int | None = None,
        hidden_size: int = 2048,
        num_hidden_layers: int = 32,
        intermediate_size: int = 14336,
        hidden_act: str = "silu",
        mlp_bias: bool = False,
        num_heads: int = 32,
        n_groups: int = 32,
        ssm_state_size: int = 64,
        expand: int = 1,
        conv_kernel: int = 4,
        use_conv_bias: bool = True,
        use_bias: bool = False,
        mixer_activation: str = "identity",
        chunk_size: int = 128,
        final_norm_eps: float = 1e-5,
        rms_norm_eps: float = BLOCK_NORM_EPS,
        lm_head_bias: bool = False,
        tie_word_embeddings: bool = False,
        max_position_embeddings: int = 131072,
        weight_layout: WeightLayout = "thinkfast",
        **kwargs: Any,
    ) -> None:
        """Builds the configuration from house fields or from the published keys.

        Args:
            vocab_size: rows of the embedding, default 128256. Published files must state it, and
                state it before padding.
            hidden_size: width of the residual stream (published: ``d_model``).
            num_hidden_layers: number of blocks (published: ``n_layer``).
            intermediate_size: width of the MLP (published: ``mlp_cfg.intermediate_size``).
            hidden_act: activation of the MLP, only SiLU (published: ``mlp_cfg.act_fn``).
            mlp_bias: whether the MLP's projections have a bias.
            num_heads: SSM heads H (published: ``ssm_cfg.n_v_heads``).
            n_groups: groups G sharing B and C (published: ``ssm_cfg.n_qk_heads``).
            ssm_state_size: state width N per head (published: ``ssm_cfg.d_state``).
            expand: mixer width divided by ``hidden_size``.
            conv_kernel: taps K of the short convolution (published: ``ssm_cfg.d_conv``).
            use_conv_bias: whether the convolution has a bias.
            use_bias: whether in_proj and out_proj have one; then there is no ``z_bias``.
            mixer_activation: applied after the convolution: "identity" or "silu".
            chunk_size: tokens per scan chunk of the published kernel; no effect on the result.
            final_norm_eps: eps of the last norm (published: ``norm_epsilon``).
            rms_norm_eps: eps of the blocks' norms, 1e-5 in every published model.
            lm_head_bias: whether an untied head has a bias.
            tie_word_embeddings: whether head and embedding share weights
                (published: ``tie_embeddings``).
            max_position_embeddings: default of vLLM's ``max_model_len``. The model has no
                positional encoding; 131072 tokens is the context of its Llama-3 teachers.
            weight_layout: how the tensors in the folder are named.
            **kwargs: fields of ``PretrainedConfig``, or the published keys.

        Raises:
            ValueError: an impossible or unknown value; the message names it.
        """
        given = {name: value for name, value in locals().items() if name in _HOUSE_DEFAULTS}
        if "d_model" in kwargs or "ssm_cfg" in kwargs:
            _check_not_mixed(given)
            # These three have the same name in both vocabularies.
            kwargs["vocab_size"] = vocab_size
            kwargs["lm_head_bias"] = lm_head_bias
            kwargs["max_position_embeddings"] = max_position_embeddings
            try:
                self.__init__(**_read_published(kwargs))  # type: ignore[misc]
            except ValueError as error:
                raise in_published_words(error, _PUBLISHED_NAMES) from error
            return
        check_no_members(_OWNER, LlambaConfig, kwargs)
        check_spelling(_OWNER, kwargs, _HOUSE_FIELDS | PASSED_ON)
        check_of_transformers(_OWNER, **kwargs)
        vocab_size = 128256 if vocab_size is None else vocab_size
        check_positive(
            _OWNER,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=num_heads,
            n_groups=n_groups,
            ssm_state_size=ssm_state_size,
            expand=expand,
            conv_kernel=conv_kernel,
            chunk_size=chunk_size,
            max_position_embeddings=max_position_embeddings,
        )
        check_positive(_OWNER, largest=LARGEST_DEPTH, num_hidden_layers=num_hidden_layers)
        check_positive_number(_OWNER, final_norm_eps=final_norm_eps, rms_norm_eps=rms_norm_eps)
        check_choice(_OWNER, "mixer_activation", mixer_activation, ("identity", "silu"))
        check_choice(_OWNER, "hidden_act", hidden_act, _SILU_NAMES)
        check_choice(_OWNER, "weight_layout", weight_layout, get_args(WeightLayout))
        check_divides(
            _OWNER,
            mixer_width=(expand * hidden_size, "num_heads", num_heads),
            num_heads=(num_heads, "n_groups", n_groups),
        )
        check_flags(
            _OWNER,
            mlp_bias=mlp_bias,
            use_conv_bias=use_conv_bias,
            use_bias=use_bias,
            lm_head_bias=lm_head_bias,
            tie_word_embeddings=tie_word_embeddings,
        )
        if conv_kernel < 2:
            raise ValueError(f"{_OWNER}: conv_kernel={conv_kernel} must be at least 2.")
        if lm_head_bias and tie_word_embeddings:
            # The published class builds a head only when untied: the flag has no effect otherwise.
            lm_head_bias = False
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.hidden_act = "silu"
        self.mlp_bias = mlp_bias
        self.num_heads = num_heads
        self.n_groups = n_groups
        self.ssm_state_size = ssm_state_size
        self.expand = expand
        self.conv_kernel = conv_kernel
        self.use_conv_bias = use_conv_bias
        self.use_bias = use_bias
        self.mixer_activation = mixer_activation
        self.chunk_size = chunk_size
        self.final_norm_eps = final_norm_eps
        self.rms_norm_eps = rms_norm_eps
        self.lm_head_bias = lm_head_bias
        self.max_position_embeddings = max_position_embeddings
        self.weight_layout = weight_layout
        # Published files may carry no `architectures`; vLLM needs one.
        if not kwargs.get("architectures"):
            kwargs["architectures"] = ["LlambaForCausalLM"]
        with accepted_by_transformers(_OWNER):
            super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def mixer_size(self) -> int:
        """Width of x, z and y in the mixer, ``expand * hidden_size``."""
        return int(self.expand * self.hidden_size)

    @property
    def head_dim(self) -> int:
        """Width P of one SSM head."""
        return self.mixer_size // int(self.num_heads)

    @property
    def bc_size(self) -> int:
        """Width of B and of C, ``n_groups * ssm_state_size``."""
        return int(self.n_groups * self.ssm_state_size)

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.mixer_size + 2 * self.bc_size

    @property
    def layers_block_type(self) -> list[str]:
        """vLLM's word for what each layer is."""
        return ["mamba"] * int(self.num_hidden_layers)


_HOUSE_DEFAULTS = {
    name: parameter.default
    for name, parameter in signature(LlambaConfig.__init__).parameters.items()
    if name not in ("self", "kwargs")
}
_HOUSE_FIELDS = frozenset(_HOUSE_DEFAULTS)
_SHARED_FIELDS = frozenset({"vocab_size", "lm_head_bias", "max_position_embeddings"})
"""Fields with the same name in published files and in ours."""
_IGNORED_FIELDS = frozenset({"tie_word_embeddings"})
"""Fields of ours that mean nothing in published files: the published class decides by
``tie_embeddings``, and transformers 4 adds ``tie_word_embeddings: true`` to whatever it saves."""
_PUBLISHED_FIELDS = _SHARED_FIELDS | {
    "d_model",
    "n_layer",
    "pad_vocab_size_multiple",
    "tie_embeddings",
    "resid_dropout",
    "norm_epsilon",
    "mlp_cfg",
    "ssm_cfg",
}


_PUBLISHED_NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "final_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
    "intermediate_size": "mlp_cfg.intermediate_size",
    "hidden_act": "mlp_cfg.act_fn",
    "mlp_bias": "mlp_cfg.bias",
    "num_heads": "ssm_cfg.n_v_heads",
    "n_groups": "ssm_cfg.n_qk_heads",
    "ssm_state_size": "ssm_cfg.d_state",
    "expand": "ssm_cfg.expand",
    "conv_kernel": "ssm_cfg.d_conv",
    "use_conv_bias": "ssm_cfg.conv_bias",
    "use_bias": "ssm_cfg.bias",
    "mixer_activation": "ssm_cfg.activation",
    "chunk_size": "ssm_cfg.chunk_size",
}


def _check_not_mixed(given: Mapping[str, Any]) -> None:
    """Raises ValueError if fields of ours have values of their own in a published file."""
    mixed = sorted(
        name
        for name, default in _HOUSE_DEFAULTS.items()
        if name not in _SHARED_FIELDS | _IGNORED_FIELDS
        and (type(given[name]) is not type(default) or given[name] != default)
    )
    if mixed:
        raise ValueError(
            f"{_OWNER}: {', '.join(mixed)} beside d_model or ssm_cfg; a file has either the "
            "published field names or those that `thinkfast convert` writes. Remove one kind."
        )


def _read_published(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the keys of a published config.json to the house's.

    Args:
        raw: what config.json holds, with ``d_model``, ``ssm_cfg`` and so on.

    Returns:
        keyword arguments of ``LlambaConfig``.
    """
    fields = dict(raw)
    check_spelling(_OWNER, fields, _PUBLISHED_FIELDS | PASSED_ON)
    for required in ("vocab_size", "d_model"):
        if fields.get(required) is None:
            raise ValueError(f"{_OWNER}: {required} is missing; the published class requires it.")
    ssm_cfg, mlp_cfg = (fields.pop(name, None) for name in ("ssm_cfg", "mlp_cfg"))
    ssm_cfg = {} if ssm_cfg is None else ssm_cfg
    mlp_cfg = {} if mlp_cfg is None else mlp_cfg
    check_object(_OWNER, ssm_cfg=ssm_cfg, mlp_cfg=mlp_cfg)
    check_known_keys(f"{_OWNER}: ssm_cfg", ssm_cfg, _SSM_CFG_DEFAULTS)
    check_known_keys(f"{_OWNER}: mlp_cfg", mlp_cfg, _MLP_CFG_DEFAULTS)
    ssm = {**_SSM_CFG_DEFAULTS, **ssm_cfg}
    mlp = {**_MLP_CFG_DEFAULTS, **mlp_cfg}
    check_choice(f"{_OWNER}: ssm_cfg", "activation", ssm["activation"], ("identity", *_SILU_NAMES))
    multiple = fields.pop("pad_vocab_size_multiple", 8)
    check_positive(_OWNER, pad_vocab_size_multiple=multiple, vocab_size=fields["vocab_size"])
    fields["vocab_size"] = -(-fields["vocab_size"] // multiple) * multiple
    fields.pop("resid_dropout", None)  # training only
    house = {
        "architectures": fields.pop("architectures", None) or ["LlambaLMHeadModel"],
        "hidden_size": fields.pop("d_model"),
        "num_hidden_layers": fields.pop("n_layer", 32),
        "intermediate_size": mlp["intermediate_size"],
        "hidden_act": mlp["act_fn"],
        "mlp_bias": mlp["bias"],
        "num_heads": ssm["n_v_heads"],
        "n_groups": ssm["n_qk_heads"],
        "ssm_state_size": ssm["d_state"],
        "expand": ssm["expand"],
        "conv_kernel": ssm["d_conv"],
        "use_conv_bias": ssm["conv_bias"],
        "use_bias": ssm["bias"],
        "mixer_activation": "identity" if ssm["activation"] == "identity" else "silu",
        "chunk_size": ssm["chunk_size"],
        "final_norm_eps": fields.pop("norm_epsilon", 1e-5),
        "tie_word_embeddings": fields.pop("tie_embeddings", False),
        "weight_layout": "llamba",
    }
    return {**fields, **house}
