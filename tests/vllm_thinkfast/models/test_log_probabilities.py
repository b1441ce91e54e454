"""vLLM's prompt log-probabilities against the published code and the suite's own oracle."""

from pathlib import Path

import pytest
import torch

from tests.reference.published_models import reference_logits
from tests.reference.random_checkpoints import VARIANTS, write_checkpoint
from tests.vllm_thinkfast.models.conftest import Golden
from tests.vllm_thinkfast.models.engines import EnginePool, log_probabilities, random_prompts

pytestmark = pytest.mark.engine

TOLERANCE = 2e-3
"""Largest allowed difference of a float32 log-probability; measured: below 3e-5."""

CHUNKED = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}


def assert_log_probabilities(found: torch.Tensor, logits: torch.Tensor, what: str) -> None:
    """Compares [L - 1, V] with logits [L, V] of the same sequence."""
    expected = logits[:-1].double().log_softmax(-1)
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    worst = divmod(int(error.argmax()), error.shape[1])
    assert error.max() <= TOLERANCE, (
        f"{what}: max error {error.max():.2e} at (position, token) {worst}, mean {error.mean():.2e}"
    )


@pytest.mark.parametrize("options", [{}, CHUNKED], ids=["whole", "chunked"])
def test_golden(golden: Golden, engines: EnginePool, options: dict[str, object]) -> None:
    llm = engines.get(golden.folder, **options)
    inputs = [(ids, logits) for ids, logits in golden.inputs if len(ids) > 1]
    assert inputs
    for (ids, logits), found in zip(
        inputs, log_probabilities(llm, [ids for ids, _ in inputs]), strict=True
    ):
        assert_log_probabilities(found, logits, f"{golden.name}, {len(ids)} tokens")


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant(name: str, engines: EnginePool, tmp_path: Path) -> None:
    """Every option, container and weight dtype of every published format, in chunks of a batch."""
    fmt, options = VARIANTS[name]
    folder = write_checkpoint(tmp_path / "ckpt", fmt, seed=3, **options)
    llm = engines.get(folder, max_num_batched_tokens=48, enable_chunked_prefill=True)
    prompts = random_prompts([2, 33, 131], 150, seed=5)
    for prompt, found in zip(prompts, log_probabilities(llm, prompts), strict=True):
        assert_log_probabilities(
            found, reference_logits(folder, prompt), f"{name}, {len(prompt)} tokens"
        )
