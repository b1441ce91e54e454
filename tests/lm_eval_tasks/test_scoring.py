"""Counts per problem, their metrics, and what importing the scoring code costs."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

from lm_eval_tasks import task_path
from lm_eval_tasks.samples import SampledText
from lm_eval_tasks.scoring import ProblemScore, metric_names, problem_metrics, score_problem


def test_score_problem() -> None:
    asked: list[Sequence[str]] = []

    def grade(answers: Sequence[str]) -> list[bool]:
        asked.append(answers)
        return [answer == "5" for answer in answers]

    samples = ["\\boxed{5}", "\\boxed{5}", "the answer is 5", "\\boxed{6}", "no idea"]
    score = score_problem(samples, grade)
    assert score == ProblemScore(
        num_samples=5,
        num_correct=3,
        num_distinct=4,
        num_boxed=3,
        num_no_answer=1,
        num_truncated=None,
        num_tokens=None,
    )
    assert asked == [["5", "6"]], "graded once, every different answer once"
    metrics = problem_metrics(score)
    assert metrics["pass@1"] == pytest.approx(0.6)
    assert metrics["pass@2"] == pytest.approx(0.9)
    assert metrics["pass@4"] == metrics["pass@5"] == 1.0
    assert metrics["n_distinct"] == 0.8
    assert set(metrics) == set(metric_names(5)) - {"truncated", "gen_tokens"}


def test_score_problem_with_facts() -> None:
    samples = [SampledText("\\boxed{5}", 10, "stop"), SampledText("\\boxed{", 30, "length")]
    metrics = problem_metrics(score_problem(samples, lambda answers: [True] * len(answers)))
    assert metrics["truncated"] == 0.5
    assert metrics["gen_tokens"] == 20
    assert set(metrics) == set(metric_names(2))
    mixed = score_problem([samples[0], "plain"], lambda answers: [True] * len(answers))
    assert mixed.num_truncated is None
    assert mixed.num_tokens is None


def test_scoring_needs_neither_torch_nor_vllm_nor_lm_eval() -> None:
    script = (
        "import sys; import lm_eval_tasks.scoring, lm_eval_tasks.answers as a; "
        "assert a.equivalent('x+1', '1+x'); "
        "heavy = {'torch', 'vllm', 'lm_eval', 'numpy', 'sympy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_task_path_holds_the_definitions() -> None:
    names = sorted(path.name for path in task_path().glob("*/*.yaml"))
    assert names == ["arith_passk.yaml", "gsm8k_passk.yaml", "math500_passk.yaml"]
    assert all((path.parent / "README.md").is_file() for path in task_path().glob("*/*.yaml"))
