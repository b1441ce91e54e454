"""From a recipe to sizes: the teacher's configuration, and the student's derived from it.

The student keeps the teacher's width, depth, MLP, vocabulary, norms and head; only the mixers'
sizes are free. Nothing here loads weights, so ``--dry-run`` needs no more than a config.json, or,
where the teacher is gated or far away, the sizes written in the recipe.
"""

import importlib.util
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from thinkfast_distill.config import (
    LlamaLayout,
    LlambaLayout,
    MambaInLlamaLayout,
    RunConfig,
    TeacherConfig,
)
from thinkfast_distill.recipe import RecipeError
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig
from vllm_thinkfast.configs.fields import accepted_by_transformers

ModelConfig: TypeAlias = LlambaConfig | MambaInLlamaConfig | LlamaConfig

_PACKAGE = "package:"
_COMPARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


def resolve_folder(model: str, where: str, *, revision: str | None = None) -> Path:
    """The local folder of a model: a path, a package's folder, or a snapshot from the hub.

    Args:
        model: folder, ``package:NAME`` or hub name.
        where: recipe key, for messages.
        revision: hub revision.

    Raises:
        RecipeError: nothing is there.
    """
    if model.startswith(_PACKAGE):
        name = model.removeprefix(_PACKAGE)
        # find_spec does not import the package, which may need others that are not installed.
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(
                f"{where}: package {name!r} is not installed; install it with: pip install "
                f"{name.replace('_', '-')}"
            )
        return Path(next(iter(spec.submodule_search_locations)))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise RecipeError(f"{where}: {model}: no such folder, and not a hub name (owner/model).")
    return _snapshot(model, where, revision)


def _snapshot(model: str, where: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.gguf"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"{where}: {model}: no such folder, and the hub does not give it: {first_line} "
            "Log in with 'hf auth login' if it is gated, or give a local folder."
        ) from error


def teacher_config(teacher: TeacherConfig, *, allow_sizes: bool = False) -> PretrainedConfig:
    """The teacher's Hugging Face configuration.

    Args:
        teacher: the recipe's section.
        allow_sizes: take ``teacher.sizes`` if the recipe has them, without looking for the model.

    Raises:
        RecipeError: the teacher is not there, or its sizes are not those the recipe states.
    """
    if allow_sizes and teacher.sizes is not None:
        try:
            with accepted_by_transformers("LlamaConfig"):
                return LlamaConfig(**teacher.sizes)
        except ValueError as error:
            raise RecipeError(f"teacher.sizes: {error}") from error
    folder = resolve_folder(teacher.model, "teacher.model", revision=teacher.revision)
    try:
        extra = {} if teacher.gguf_file is None else {"gguf_file": teacher.gguf_file}
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, **extra)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise RecipeError(f"teacher.model: {folder}: {first_line}") from error
    except Exception as error:  # divisions by zero, classes of huggingface_hub's own
        text = " ".join(str(error).split())
        raise RecipeError(
            f"teacher.model: {folder}: transformers does not accept its config.json: {text}"
        ) from error
    for key, stated in (teacher.sizes or {}).items():
        found = getattr(config, key, None)
        if key in _COMPARED and found is not None and found != stated:
            raise RecipeError(
                f"teacher.sizes.{key}: the recipe says {stated!r}, {folder} has {found!r}; use "
                "the teacher the recipe is made for, or correct the recipe."
            )
    return config


def head_dim_of(teacher: PretrainedConfig) -> int:
    """Width of one attention head; some configurations leave it to the quotient."""
    stated = getattr(teacher, "head_dim", None)
    return int(stated or teacher.hidden_size // teacher.num_attention_heads)


def student_config(
    config: RunConfig,
    teacher: PretrainedConfig | None,
    *,
    stage: int | None = None,
    tokenizer_size: int | None = None,
) -> ModelConfig:
    """The student's configuration.

    Args:
        config: the run.
        teacher: the teacher's configuration; None for a Llama from scratch.
        stage: index of the stage whose ``attention_layers`` count; None: the final layout.
        tokenizer_size: number of tokens, for a Llama whose ``vocab_size`` is null.

    Raises:
        RecipeError: sizes that do not fit the teacher.
    """
    layout = config.student.layout
    try:
        if isinstance(layout, LlamaLayout):
            return _llama(layout, tokenizer_size)
        assert teacher is not None, "RunConfig checks that students have a teacher"
        if isinstance(layout, LlambaLayout):
            return _llamba(layout, teacher)
        override = None if stage is None else config.stages[stage].attention_layers
        kept = layout.attention_layers if override is None else override
        return _mamba_in_llama(layout, teacher, kept)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"student.layout: {error}") from error


def _llamba(layout: LlambaLayout, teacher: PretrainedConfig) -> LlambaConfig:
    heads = layout.num_heads or teacher.num_attention_heads
    return LlambaConfig(
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        num_hidden_layers=teacher.num_hidden_layers,
        intermediate_size=teacher.intermediate_size,
        mlp_bias=bool(getattr(teacher, "mlp_bias", False)),
        num_heads=heads,
        n_groups=layout.n_groups or heads,
        ssm_state_size=layout.ssm_state_size or head_dim_of(teacher),
        expand=layout.expand,
        conv_kernel=layout.conv_kernel,
        use_bias=_use_bias(layout, teacher),
        mixer_activation=layout.mixer_activation,
        chunk_size=layout.chunk_size,
        final_norm_eps=teacher.rms_norm_eps,
        rms_norm_eps=teacher.rms_norm_eps,
        tie_word_embeddings=bool(teacher.tie_word_embeddings),
        max_position_embeddings=teacher.max_position_embeddings,
    )


def _mamba_in_llama(
    layout: MambaInLlamaLayout, teacher: PretrainedConfig, attention_layers: list[int]
) -> MambaInLlamaConfig:
    head_dim = head_dim_of(teacher)
    is_mamba2 = layout.mamba_version == "mamba2"
    state = layout.ssm_state_size or (head_dim if is_mamba2 else 16)
    q_size = teacher.num_attention_heads * head_dim
    kv_size = teacher.num_key_value_heads * head_dim
    if kv_size % state or q_size % state:
        raise RecipeError(
            f"student.layout.ssm_state_size: {state} must divide the teacher's key/value width "
            f"{kv_size} and query width {q_size}."
        )
    if layout.use_bias and not is_mamba2:
        raise RecipeError(
            "student.layout.use_bias: Mamba-1 projections have no such biases; leave it out, or "
            "set mamba_version: mamba2."
        )
    model_type = str(teacher.model_type)
    return MambaInLlamaConfig(
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        intermediate_size=teacher.intermediate_size,
        num_hidden_layers=teacher.num_hidden_layers,
        num_attention_heads=teacher.num_attention_heads,
        num_key_value_heads=teacher.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=teacher.rms_norm_eps,
        max_position_embeddings=teacher.max_position_embeddings,
        rope_parameters=dict(teacher.rope_parameters),
        # Qwen2 always has biases on q, k and v and no configuration field for it.
        attention_bias=bool(getattr(teacher, "attention_bias", model_type == "qwen2")),
        mlp_bias=bool(getattr(teacher, "mlp_bias", False)),
        tie_word_embeddings=bool(teacher.tie_word_embeddings),
        attention_layers=attention_layers,
        sliding_window=_shared_window(teacher, attention_layers),
        mamba_version=layout.mamba_version,
        mamba_num_heads=q_size // state,
        mamba_n_groups=kv_size // state,
        ssm_state_size=state,
        conv_kernel=layout.conv_kernel,
        repeat_kv_before_conv=layout.repeat_kv_before_conv,
        time_step_rank=layout.time_step_rank,
        use_bias=is_mamba2 and _use_bias(layout, teacher),
        use_gated_norm=layout.use_gated_norm,
        chunk_size=layout.chunk_size,
    )


def _use_bias(layout: LlambaLayout | MambaInLlamaLayout, teacher: PretrainedConfig) -> bool:
    """Whether the mixers' projections have biases: as set, else where the teacher's o_proj has."""
    if layout.use_bias is not None:
        return layout.use_bias
    # Qwen2 and Mistral have none on o_proj, whatever their configuration says.
    return teacher.model_type == "llama" and bool(getattr(teacher, "attention_bias", False))


def attention_window(teacher: PretrainedConfig, i: int) -> int | None:
    """Tokens that a query of layer i sees, itself included; None: all before it."""
    size = getattr(teacher, "sliding_window", None)
    kinds = getattr(teacher, "layer_types", None)
    if size is None or (kinds is not None and kinds[i] != "sliding_attention"):
        return None
    return int(size)


def _shared_window(teacher: PretrainedConfig, attention_layers: list[int]) -> int | None:
    """The one window of all layers that keep attention (Mistral, some Qwen2)."""
    kept = [i for i in attention_layers if 0 <= i < teacher.num_hidden_layers]
    windows = {i: attention_window(teacher, i) for i in kept}
    if len(set(windows.values())) > 1:
        listed = ", ".join(f"{i}: {window or 'all tokens'}" for i, window in windows.items())
        raise RecipeError(
            f"attention_layers: the teacher's layers have different windows ({listed}), which a "
            "student cannot have; keep layers with the same window."
        )
    return next(iter(windows.values()), None)


def _llama(layout: LlamaLayout, tokenizer_size: int | None) -> LlamaConfig:
    vocab_size = layout.vocab_size or tokenizer_size
    assert vocab_size is not None, "the caller has the tokenizer"
    if tokenizer_size is not None and vocab_size < tokenizer_size:
        raise RecipeError(
            f"student.layout.vocab_size: {vocab_size} is less than the tokenizer's "
            f"{tokenizer_size} tokens."
        )
    sizes: dict[str, Any] = {
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "num_hidden_layers": layout.num_hidden_layers,
        "num_attention_heads": layout.num_attention_heads,
        "num_key_value_heads": layout.num_key_value_heads,
        "max_position_embeddings": layout.max_position_embeddings,
        "rms_norm_eps": layout.rms_norm_eps,
        "tie_word_embeddings": layout.tie_word_embeddings,
    }
    if layout.num_attention_heads % layout.num_key_value_heads:
        raise RecipeError(
            f"student.layout.num_key_value_heads: {layout.num_key_value_heads} must divide "
            f"num_attention_heads={layout.num_attention_heads}."
        )
    with accepted_by_transformers("LlamaConfig"):
        return LlamaConfig(
            vocab_size=vocab_size,
            head_dim=layout.head_dim or layout.hidden_size // layout.num_attention_heads,
            rope_parameters={"rope_type": "default", "rope_theta": layout.rope_theta},
            architectures=["LlamaForCausalLM"],
            **sizes,
        )
