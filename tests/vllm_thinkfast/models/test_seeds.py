"""Seeded samples: the same whether the prompt is prefilled at once or in parts."""

from pathlib import Path

import pytest

from tests.vllm_thinkfast.models.engines import EnginePool, random_prompts, token_prompts

pytestmark = pytest.mark.engine


def test_seeded_and_chunked(family_folder: Path, engines: EnginePool) -> None:
    """vLLM 0.32 on CPU dies at the first part of a seeded prompt; see compat.py."""
    from vllm import SamplingParams

    prompts = token_prompts(random_prompts([40, 3, 65, 17], 150, seed=3))
    params = [
        SamplingParams(seed=s, temperature=1.0, max_tokens=12, ignore_eos=True, detokenize=False)
        for s in (1, 2, 3, 4)
    ]
    found = []
    for options in ({}, {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}):
        llm = engines.get(family_folder, **options)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) == len(prompts)
