"""Prompts at the borders of what is allowed."""

from pathlib import Path

import pytest
import vllm
from packaging.version import Version

from tests.reference.published_models import reference_greedy
from tests.vllm_thinkfast.models.engines import EnginePool, greedy, random_prompts

pytestmark = pytest.mark.engine

MAX_MODEL_LEN = 512
UNKNOWN_ID = "100000 is out of vocabulary"
if Version(vllm.__version__) < Version("0.33"):  # whose own check this is since then
    UNKNOWN_ID += ": the model has ids 0 to"


def test_one_token(family_folder: Path, engines: EnginePool) -> None:
    llm = engines.get(family_folder)
    for token in (0, 3, 149):
        assert greedy(llm, [[token]], 8)[0] == reference_greedy(family_folder, [token], 8)


def test_longest_prompt(family_folder: Path, engines: EnginePool) -> None:
    """max_model_len - 1 tokens leave room for exactly one."""
    llm = engines.get(family_folder)
    prompt = random_prompts([MAX_MODEL_LEN - 1], 150, seed=9)[0]
    assert greedy(llm, [prompt], 8)[0] == reference_greedy(family_folder, prompt, 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "cannot be empty"),
        ([5, 100_000], UNKNOWN_ID),
        ([7] * (MAX_MODEL_LEN + 1), "maximum context length is 512 tokens"),
    ],
    ids=["empty", "unknown_id", "too_long"],
)
def test_refused(family_folder: Path, engines: EnginePool, prompt: list[int], message: str) -> None:
    """vLLM's own clear error, and the engine goes on."""
    llm = engines.get(family_folder)
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        greedy(llm, [prompt], 8)
    assert greedy(llm, [[3]], 8)[0] == reference_greedy(family_folder, [3], 8)
