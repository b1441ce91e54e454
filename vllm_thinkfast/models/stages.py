"""Which layers a pipeline stage must have."""

from collections.abc import Sequence

from vllm.distributed.utils import get_pp_indices


def check_stages(kinds: Sequence[str], num_stages: int) -> None:
    """Raises ValueError for a stage without layers, or without one of a hybrid's kinds.

    vLLM 0.32 wants equal cache layouts of all stages, and where a stage of a hybrid has no mamba
    layer it fails at the first request with a KeyError.

    Args:
        kinds: "attention" or "mamba" for each layer.
        num_stages: ``pipeline_parallel_size``.
    """
    for stage in range(num_stages):
        start, end = get_pp_indices(len(kinds), stage, num_stages)
        if start == end:
            raise ValueError(
                f"pipeline_parallel_size={num_stages}: stage {stage} would have no layer of the "
                f"{len(kinds)}; use fewer stages, or other borders (VLLM_PP_LAYER_PARTITION)."
            )
        absent = sorted(set(kinds) - set(kinds[start:end]))
        if absent:
            raise ValueError(
                f"pipeline_parallel_size={num_stages}: stage {stage} would have the layers {start} "
                f"to {end - 1} and no {absent[0]} layer; every stage of a hybrid needs one. Use "
                "fewer stages, or other borders (VLLM_PP_LAYER_PARTITION)."
            )
