"""Counts per problem, their metrics, and what importing the scoring code costs."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

from lm_eval_tasks import task_path
from lm_eval_tasks.answers import EXTRACTION, extract_answer
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.programs.checks import Checks
from lm_eval_tasks.programs.extract import EXTRACTION as PROGRAM_EXTRACTION
from lm_eval_tasks.samples import SampledText
from lm_eval_tasks.scoring import (
    METHODS,
    NUMBER,
    PROGRAM,
    ProblemScore,
    grading_of,
    judge,
    metric_names,
    problem_metrics,
    score_problem,
)


def test_score_problem() -> None:
    samples = [
        "\\boxed{5}",
        "\\boxed{5}",
        "the answer is 5.0",
        "\\boxed{6}",
        "no idea",
        "\\boxed{$}",
    ]
    score = score_problem(samples, "5", NUMBER)
    assert score == ProblemScore(
        classes=[0, 0, 0, 1, None, None],
        is_correct=[True, True, True, False, False, False],
        num_distinct=5,
        num_boxed=3,
    )
    assert (score.num_samples, score.num_correct, score.num_no_answer) == (6, 3, 2)
    metrics = problem_metrics(score, ("pass", "maj"))
    assert metrics["pass@1"] == metrics["maj@1"] == pytest.approx(0.5)
    assert metrics["pass@2"] == pytest.approx(1 - 3 / 15)
    assert metrics["maj@6"] == metrics["pass@6"] == 1.0
    assert metrics["n_distinct"] == pytest.approx(5 / 6)
    assert metrics["no_answer"] == pytest.approx(2 / 6)
    assert set(metrics) == set(metric_names(6, ("pass", "maj"))) - {"truncated", "gen_tokens"}


def test_judge_asks_once_per_answer() -> None:
    asked: list[Sequence[str]] = []

    def grade(answers: Sequence[str]) -> list[bool]:
        asked.append(answers)
        return [answer == "5" for answer in answers]

    judged = judge(["\\boxed{5}", "so 5", "\\boxed{6}", "?"], extract_answer, grade)
    assert asked == [["5", "6"]]
    assert [item.correct for item in judged] == [True, True, False, False]
    assert [item.source for item in judged] == ["boxed", "number", "boxed", None]


def test_problem_metrics_with_rewards() -> None:
    samples = ["\\boxed{5}", "\\boxed{6}", "\\boxed{6}"]
    score = score_problem(samples, "5", NUMBER, [0.9, 0.2, 0.3])
    metrics = problem_metrics(score, METHODS)
    assert metrics["maj@3"] == 0.0
    assert metrics["bon@3"] == metrics["weighted_bon@3"] == 1.0
    assert metrics["bon@2"] == pytest.approx(2 / 3)


def test_grading_of_every_task() -> None:
    for path in task_path().glob("*/*_passk.yaml"):
        grading = grading_of(path.stem.removesuffix("_passk"))
        gold = Checks("assert f() == 5").to_gold() if grading is PROGRAM else "5"
        assert grading.check_gold(gold) is None
        assert grading.check_gold(" ") == "the gold answer is empty"
        assert grading.version_of("1.0") == f"1.0+{grading.name}"
    assert grading_of("gsm8k").check_gold("many") == "the gold answer 'many' is no number"
    with pytest.raises(InputError, match="task 'gsm9k' is unknown; accepted are arith, gsm8k"):
        grading_of("gsm9k")


def test_extraction_is_part_of_the_task_version() -> None:
    """Changing a rule means a new number here and new versions in the YAML files."""
    for path in task_path().glob("*/*_passk.yaml"):
        if "include:" not in path.read_text():
            is_program = grading_of(path.stem.removesuffix("_passk")) is PROGRAM
            extraction = PROGRAM_EXTRACTION if is_program else EXTRACTION
            assert "  version: " in path.read_text()
            assert f"  extraction: {extraction}\n" in path.read_text()
    assert EXTRACTION == "boxed-hash-phrase-number/2"
    assert PROGRAM_EXTRACTION == "fence-body-code/2"


def test_score_problem_with_facts() -> None:
    samples = [SampledText("\\boxed{5}", 10, "stop"), SampledText("\\boxed{", 30, "length")]
    metrics = problem_metrics(score_problem(samples, "5", NUMBER))
    assert metrics["truncated"] == 0.5
    assert metrics["gen_tokens"] == 20
    assert set(metrics) == set(metric_names(2))
    mixed = score_problem([samples[0], "plain"], "5", NUMBER)
    assert mixed.num_truncated is None
    assert mixed.num_tokens is None


def test_scoring_needs_neither_torch_nor_vllm_nor_lm_eval() -> None:
    script = (
        "import sys; import lm_eval_tasks.scoring, lm_eval_tasks.answers as a; "
        "assert a.equivalent('x+1', '1+x'); "
        "heavy = {'torch', 'vllm', 'lm_eval', 'sympy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_task_path_holds_the_definitions() -> None:
    names = {path.stem for path in task_path().glob("*/*.yaml")}
    benchmarks = ("arith", "gsm8k", "gsm8k_500", "math500")
    tasks = {f"{name}_{kind}" for name in benchmarks for kind in ("passk", "maj", "bon", "wbon")}
    programs = ("humaneval", "humaneval_base", "mbpp", "programs")
    tasks |= {f"{name}_{kind}" for name in programs for kind in ("passk", "maj")}
    assert names == tasks | {"thinkfast"}
    assert all((path.parent / "README.md").is_file() for path in task_path().glob("*/*.yaml"))
