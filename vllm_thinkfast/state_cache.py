"""State of one sequence: shapes, dtypes, copy functions and bytes, for both architectures.

One source for three users: the model classes (vLLM sizes its cache pages before any layer exists),
the mixers (vLLM binds the pages to them), and ``thinkfast state-size``.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

Config = LlambaConfig | MambaInLlamaConfig
StateShapes = tuple[tuple[int, ...], tuple[int, ...]]


def check_tensor_parallel(config: Config, tp_size: int) -> None:
    """Raises ValueError if a mixer cannot be split into ``tp_size`` equal parts.

    Heads and groups are the units that must stay whole; the MLP's and attention's splits are
    checked by vLLM's own layers.
    """
    if isinstance(config, LlambaConfig):
        units = {"num_heads": config.num_heads, "n_groups": config.n_groups}
    else:
        units = {
            "mamba_num_heads": config.mamba_num_heads,
            "mamba_n_groups": config.mamba_n_groups,
        }
    wrong = [f"{name}={value}" for name, value in units.items() if value % tp_size]
    if wrong:
        fitting = [n for n in range(1, tp_size) if all(v % n == 0 for v in units.values())]
        raise ValueError(
            f"tensor_parallel_size={tp_size} does not divide {' and '.join(wrong)} of this model; "
            f"accepted below it: {', '.join(map(str, fitting))}."
        )


def state_shapes(config: Config, tp_size: int = 1) -> StateShapes:
    """Shapes of the two states of one sequence in one layer, on one tensor-parallel rank.

    Args:
        config: the model.
        tp_size: tensor-parallel ranks.

    Returns:
        (conv, ssm): conv ``[K - 1, channels]`` or transposed, as VLLM_SSM_CONV_STATE_LAYOUT says;
        ssm ``[H, P, N]``, for Mamba-1 ``[E, N]``.

    Raises:
        ValueError: the heads do not split into ``tp_size`` parts.
    """
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes

    check_tensor_parallel(config, tp_size)
    # The calculator's Mamba-1 form is exactly (channels of the convolution) and (width, N).
    conv, _ = Shapes.mamba1_state_shape(
        tp_world_size=tp_size,
        intermediate_size=config.conv_dim,
        state_size=1,
        conv_kernel=config.conv_kernel,
    )
    if isinstance(config, MambaInLlamaConfig) and config.mamba_version == "mamba1":
        return conv, (config.mixer_size // tp_size, config.ssm_state_size)
    if isinstance(config, LlambaConfig):
        num_heads, head_dim = config.num_heads, config.head_dim
    else:
        num_heads, head_dim = config.mamba_num_heads, config.ssm_state_size
    return conv, (num_heads // tp_size, head_dim, config.ssm_state_size)


def state_dtypes(vllm_config: Any) -> tuple[torch.dtype, torch.dtype]:
    """(conv, ssm) dtypes: ``--mamba-cache-dtype`` and ``--mamba-ssm-cache-dtype``.

    The SSM state is float32 unless the user says otherwise: it accumulates over the whole sequence
    and the published numbers were obtained from float32 scans.
    """
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator

    cache_config = vllm_config.cache_config
    ssm_dtype = cache_config.mamba_ssm_cache_dtype
    conv, ssm = MambaStateDtypeCalculator.mamba1_state_dtype(
        vllm_config.model_config.dtype,
        cache_config.mamba_cache_dtype,
        "float32" if ssm_dtype == "auto" else ssm_dtype,
    )
    return conv, ssm


def state_copy_funcs() -> Any:
    """How vLLM copies (conv, ssm) between cache blocks, for prefix caching."""
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator

    return MambaStateCopyFuncCalculator.mamba1_state_copy_func()


@dataclass(frozen=True)
class BytesPerSequence:
    """Cache that one sequence needs, in bytes."""

    conv_bytes: int
    """All layers' convolution states; does not grow with the sequence."""
    ssm_bytes: int
    """All layers' recurrent states; does not grow with the sequence."""
    kv_bytes_per_token: int
    """Keys and values of the attention layers, for each token of the sequence."""

    def total(self, num_tokens: int) -> int:
        """Bytes of a sequence of ``num_tokens`` tokens."""
        return self.conv_bytes + self.ssm_bytes + num_tokens * self.kv_bytes_per_token


def bytes_per_sequence(
    config: Config,
    *,
    dtype: torch.dtype = torch.bfloat16,
    conv_dtype: torch.dtype | None = None,
    ssm_dtype: torch.dtype = torch.float32,
    tp_size: int = 1,
) -> BytesPerSequence:
    """Memory of one sequence on one tensor-parallel rank, before vLLM's paging.

    vLLM pads the states of a hybrid to the page of an attention block, so its own figure is larger.

    Args:
        config: the model.
        dtype: of activations, keys and values.
        conv_dtype: of the convolution state; default: ``dtype``.
        ssm_dtype: of the recurrent state.
        tp_size: tensor-parallel ranks.

    Raises:
        ValueError: the heads do not split into ``tp_size`` parts.
    """
    check_tensor_parallel(config, tp_size)
    num_mixers = config.layers_block_type.count("mamba")
    conv = (config.conv_kernel - 1) * config.conv_dim // tp_size
    ssm = config.mixer_size * config.ssm_state_size // tp_size
    kv = 0
    if isinstance(config, MambaInLlamaConfig):
        kv_heads = max(1, config.num_key_value_heads // tp_size)
        kv = 2 * len(config.attention_layers) * kv_heads * config.head_dim
    return BytesPerSequence(
        conv_bytes=num_mixers * conv * (conv_dtype or dtype).itemsize,
        ssm_bytes=num_mixers * ssm * ssm_dtype.itemsize,
        kv_bytes_per_token=kv * dtype.itemsize,
    )
