"""Engine features by model: fixtures, and the marker that docs/compatibility.md is made from.

``@pytest.mark.feature(NAME)`` says which row of the table a test is for; its parameter ``family``
is the column. A test that shows that a feature is refused adds ``refused=REASON``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from scripts import compatibility
from tests.reference.random_checkpoints import write_checkpoint
from tests.vllm_thinkfast.models.engines import (
    EnginePool,
    greedy,
    log_probabilities,
    random_prompts,
)

FAMILIES = tuple(compatibility.MODELS)
PROMPTS = random_prompts([5, 30, 64, 100], 150, seed=1)
"""Of mixed lengths, longer than a chunk of CHUNKED."""
NUM_TOKENS = 24
REPETITIVE = [*PROMPTS, [7, 8, 9, 10] * 10, [5, 6] * 20, [3] * 9, [7, 8]]
"""Drafts from the text so far are right for some of these, and wrong for others."""
NUM_REPETITIVE_TOKENS = 40


@pytest.fixture(scope="session")
def engines() -> Iterator[EnginePool]:
    """One engine at a time for the whole session."""
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each model in turn."""
    return request.param


@pytest.fixture(scope="session")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the family with a tokenizer."""
    return folder_of(family, tmp_path_factory.getbasetemp())


def folder_of(family: str, parent: Path, seed: int = 11) -> Path:
    """The family's random checkpoint with this seed, written once."""
    folder = parent / f"{family}-{seed}"
    if not folder.exists():
        write_checkpoint(folder, family, seed=seed, has_tokenizer=True)
    return folder


class Plain(NamedTuple):
    """Results of an engine without any feature: what most tests compare with."""

    tokens: list[list[int]]
    """Greedy continuations of PROMPTS, NUM_TOKENS long."""
    log_probabilities: list[Tensor]
    """Of PROMPTS, [L - 1, V] each."""
    repetitive: list[list[int]]
    """Greedy continuations of REPETITIVE, NUM_REPETITIVE_TOKENS long."""


@pytest.fixture(scope="session")
def plain(folder: Path, engines: EnginePool) -> Plain:
    """Everything from one engine, so that a test has to start its own only."""
    llm = engines.get(folder, **PLAIN)
    tokens = greedy(llm, PROMPTS, NUM_TOKENS)
    assert len({tuple(t) for t in tokens}) == len(PROMPTS), "equal continuations prove nothing"
    repetitive = greedy(llm, REPETITIVE, NUM_REPETITIVE_TOKENS)
    return Plain(tokens, log_probabilities(llm, PROMPTS), repetitive)


PLAIN: dict[str, Any] = {"skip_tokenizer_init": False, "max_num_seqs": 8}
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
