"""The models in ``thinkfast/``: complete, small, made by shipped recipes, as good as said."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from lm_eval_tasks.rewards.reward import get_reward
from lm_eval_tasks.rewards.spec import parse_spec
from lm_eval_tasks.tasks.arith.utils import TEST_FILE
from tests.distill.students.models import load_student, packed
from tests.vllm_thinkfast.models.engines import EnginePool, log_probabilities, random_prompts
from thinkfast_distill.data import arith

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "thinkfast"
ARCHITECTURES = {
    "llama-tiny": "LlamaForCausalLM",
    "llamba-tiny": "LlambaForCausalLM",
    "mambainllama-tiny": "MambaInLlamaForCausalLM",
    "prm-tiny": "LlamaForCausalLM",
}
# One greedy answer for each of the first 60 test problems; sampling at 0.7 solves about as many.
MIN_SOLVED = 33


def test_folders_are_small_and_complete() -> None:
    assert {path.name for path in MODELS.iterdir() if path.is_dir()} == set(ARCHITECTURES)
    files = [file for file in MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_card_names_the_recipe_and_the_commit(name: str) -> None:
    config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [ARCHITECTURES[name]]
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    (recipe,) = set(re.findall(r"distill/recipes/[\w.-]+\.yaml", card))
    assert (ROOT / recipe).is_file()
    (commit,) = re.findall(r"^\* commit: (.*)$", card, re.MULTILINE)
    assert re.fullmatch(r"[0-9a-f]{40}", commit), "trained from a checkout without changes"
    assert "/home" not in card
    assert "/tmp" not in card


@pytest.fixture(scope="module")
def engines() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()


def test_reward_model_finds_wrong_results() -> None:
    """Wrong results off by 1, 2 or 10 in problems that it was not trained on, against right ones.

    Through the protocol that `thinkfast-eval reward` uses for it without being told.
    """
    reward = get_reward(parse_spec(str(MODELS / "prm-tiny")))
    assert reward.spec.protocol == "rlhflow-deepseek"
    rng = Random(0)
    right, wrong, ends = [], [], []
    for index in range(60):
        problem = arith.problem("test", index)
        solution = arith.with_mistake(problem, rng, "slip")
        ends.append(solution.labels.index(False))
        right.append((problem.question, problem.steps))
        wrong.append((problem.question, solution.steps))
    good = [score for scores in reward.score_batch(right) for score in scores]
    pairs = zip(reward.score_batch(wrong), ends, strict=True)
    bad = [scores[end] for scores, end in pairs]
    kept = sum(score > 0.5 for score in good) / len(good)
    found = sum(score < 0.5 for score in bad) / len(bad)
    assert kept >= 0.93, kept
    assert found >= 0.75, found


@pytest.mark.engine
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"prm-tiny"}))
def test_models_solve_what_they_should(name: str, engines: EnginePool) -> None:
    from vllm import SamplingParams

    rows = [json.loads(line) for line in TEST_FILE.read_text(encoding="utf-8").splitlines()[:60]]
    llm = engines.get(MODELS / name, skip_tokenizer_init=False, max_num_seqs=64)
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=128), use_tqdm=False)
    solved = [
        output.outputs[0].text.rpartition("#### ")[2] == row["answer"].rpartition("#### ")[2]
        for output, row in zip(outputs, rows, strict=True)
    ]
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert sum(solved) >= MIN_SOLVED, f"{name}: {sum(solved)} of {len(solved)}"
    if name != "llama-tiny":  # that one is vLLM's own
        check_served_is_trained(MODELS / name, llm)


def check_served_is_trained(folder: Path, llm: Any) -> None:
    """Log-probabilities of the trainer's student against the engine's.

    `tests/contract` does the same with random students; these went through a whole run and the
    command `export`. In this test, because the engine is there.
    """
    student = load_student(folder)
    prompts = random_prompts([2, 33, 131], student.config.vocab_size, seed=5)
    with torch.no_grad():
        trained = student(packed([prompts]))[0].log_softmax(-1)
    served = log_probabilities(llm, prompts)
    for prompt, ours, found in zip(prompts, trained.split([2, 33, 131]), served, strict=True):
        error = (found.double() - ours[:-1]).abs().max()
        assert error <= 2e-3, f"{folder.name}, {len(prompt)} tokens: max error {error:.2e}"
