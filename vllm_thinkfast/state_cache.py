"""State of one sequence: shapes, dtypes, copy functions and bytes, for both architectures.

One source for three users: the model classes (vLLM sizes its cache pages before any layer exists),
the mixers (vLLM binds the pages to them), and ``thinkfast state-size``.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_thinkfast import envs
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

Config = LlambaConfig | MambaInLlamaConfig
StateShapes = tuple[tuple[int, ...], ...]
SCALE_DTYPE = torch.float32
"""Of the scales of 8-bit states, one for each row of N."""


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


def state_shapes(
    config: Config, tp_size: int = 1, ssm_dtype: torch.dtype = torch.float32
) -> StateShapes:
    """Shapes of the states of one sequence in one layer, on one tensor-parallel rank.

    Args:
        config: the model.
        tp_size: tensor-parallel ranks.
        ssm_dtype: of the recurrent state; int8 has scales beside it.

    Returns:
        (conv, ssm): conv ``[K - 1, channels]`` or transposed, as VLLM_SSM_CONV_STATE_LAYOUT says;
        ssm ``[H, P, N]``, for Mamba-1 ``[E, N]``. With int8 (conv, ssm, scales), scales ``[H, P]``,
        for Mamba-1 ``[E]``.

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
    rows: tuple[int, ...]
    if isinstance(config, MambaInLlamaConfig) and config.mamba_version == "mamba1":
        rows = (config.mixer_size // tp_size,)
    elif isinstance(config, LlambaConfig):
        rows = (config.num_heads // tp_size, config.head_dim)
    else:
        rows = (config.mamba_num_heads // tp_size, config.ssm_state_size)
    ssm = (*rows, config.ssm_state_size)
    return (conv, ssm, rows) if ssm_dtype == torch.int8 else (conv, ssm)


def state_dtypes(vllm_config: Any) -> tuple[torch.dtype, ...]:
    """(conv, ssm) dtypes: ``--mamba-cache-dtype`` and ``--mamba-ssm-cache-dtype``.

    The SSM state is float32 unless the user says otherwise: it accumulates over the whole sequence
    and the published numbers were obtained from float32 scans. With VLLM_THINKFAST_SSM_STATE=int8
    it is int8, and the third dtype is that of its scales.

    Raises:
        ValueError: the environment variable and the option contradict each other, or the
            variable's value is unknown.
    """
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator

    cache_config = vllm_config.cache_config
    ssm_dtype = cache_config.mamba_ssm_cache_dtype
    conv, ssm = MambaStateDtypeCalculator.mamba1_state_dtype(
        vllm_config.model_config.dtype,
        cache_config.mamba_cache_dtype,
        "float32" if ssm_dtype == "auto" else ssm_dtype,
    )
    if not envs.is_ssm_state_int8():
        return conv, ssm
    if ssm != torch.float32:
        raise ValueError(
            f"{envs.SSM_STATE}=int8 and --mamba-ssm-cache-dtype {ssm_dtype} contradict each other; "
            "accepted beside it: auto and float32. Leave one of the two out."
        )
    return conv, torch.int8, SCALE_DTYPE


def check_alignment(shapes: StateShapes, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError if a state would begin between two multiples of its element size.

    vLLM packs the states of a page one behind the other.
    """
    offset = 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        if offset % dtype.itemsize:
            raise ValueError(
                f"{envs.SSM_STATE}=int8: scales of {dtype.itemsize} bytes cannot begin at byte "
                f"{offset}, behind states of {shapes[:-1]} elements; unset it for this model."
            )
        offset += math.prod(shape) * dtype.itemsize


def lack_of_memory(
    needed: int, available: int, max_model_len: int, *, is_copied: bool, num_drafts: int
) -> str:
    """The message for cache memory that does not hold one sequence.

    Args:
        needed: bytes of one sequence, as vLLM allocates it.
        available: bytes.
        max_model_len: tokens of that sequence.
        is_copied: vLLM keeps two states of a sequence, one of them for the prefix cache.
        num_drafts: tokens that are drafted per step, each of which has a state.
    """
    states, fix = "its state", ""
    if is_copied:
        states = "its state and a copy for the prefix cache"
        fix = "--no-enable-prefix-caching halves the states, and "
    elif num_drafts:
        states = f"its state and those after {num_drafts} drafted tokens"
        fix = "fewer num_speculative_tokens need fewer states, and "
    return (
        f"one sequence of max_model_len={max_model_len} tokens needs {needed / 2**20:.3f} MiB of "
        f"cache ({states}, and keys and values of attention layers), and "
        f"{available / 2**20:.3f} MiB are available. Give more with --kv-cache-memory-bytes or "
        "--gpu-memory-utilization (on a CPU: VLLM_CPU_KVCACHE_SPACE); "
        f"{fix}`thinkfast state-size` shows their sizes."
    )


def state_copy_funcs() -> Any:
    """How vLLM copies (conv, ssm) and scales between cache blocks, for prefix caching."""
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator

    conv, ssm = MambaStateCopyFuncCalculator.mamba1_state_copy_func()
    return (conv, ssm, ssm) if envs.is_ssm_state_int8() else (conv, ssm)


@dataclass(frozen=True)
class BytesPerSequence:
    """Cache that one sequence needs, in bytes."""

    conv_bytes: int
    """All layers' convolution states; does not grow with the sequence."""
    ssm_bytes: int
    """All layers' recurrent states and their scales; does not grow with the sequence."""
    kv_bytes_per_token: int
    """Keys and values of the attention layers, for each token of the sequence."""

    def total(self, num_tokens: int) -> int:
        """Bytes of a sequence of ``num_tokens`` tokens."""
        return self.conv_bytes + self.ssm_bytes + num_tokens * self.kv_bytes_per_token

    def max_sequences(self, memory_bytes: int, num_tokens: int) -> int:
        """Sequences that ``memory_bytes`` of cache let decode at once.

        For models without attention what vLLM reaches; for hybrids, whose states it pads to the
        page of an attention block, an upper bound.

        Args:
            memory_bytes: of the cache.
            num_tokens: of each sequence.
        """
        # vLLM keeps one block for itself. Another is the second state of the sequence that ends
        # its prompt: the prefix cache keeps the first.
        spare = 2 * (self.conv_bytes + self.ssm_bytes)
        return max(0, (memory_bytes - spare) // self.total(num_tokens))


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
        ssm_dtype: of the recurrent state; with int8, its scales are counted too.
        tp_size: tensor-parallel ranks.

    Raises:
        ValueError: the heads do not split into ``tp_size`` parts.
    """
    check_tensor_parallel(config, tp_size)
    num_mixers = config.layers_block_type.count("mamba")
    conv = (config.conv_kernel - 1) * config.conv_dim // tp_size
    scale_bytes = SCALE_DTYPE.itemsize if ssm_dtype == torch.int8 else 0
    row_bytes = config.ssm_state_size * ssm_dtype.itemsize + scale_bytes
    ssm_bytes = config.mixer_size * row_bytes // tp_size
    kv = 0
    if isinstance(config, MambaInLlamaConfig):
        kv_heads = max(1, config.num_key_value_heads // tp_size)
        kv = 2 * len(config.attention_layers) * kv_heads * config.head_dim
    return BytesPerSequence(
        conv_bytes=num_mixers * conv * (conv_dtype or dtype).itemsize,
        ssm_bytes=num_mixers * ssm_bytes,
        kv_bytes_per_token=kv * dtype.itemsize,
    )
