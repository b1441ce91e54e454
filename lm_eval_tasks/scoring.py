"""Grade the N samples of one problem, and turn verdicts into metrics.

No lm-eval, torch or vllm is needed here: texts and a gold answer go in, numbers come out. The
lm-eval tasks and ``thinkfast-eval score`` both grade with `grading_of` and both compute with
`problem_metrics`, so the same samples give the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lm_eval_tasks.answers import (
    EXTRACTION,
    Extracted,
    equivalent_many,
    extract_answer,
    normalise,
    number_in_words,
    parse_number,
    same_number_many,
)
from lm_eval_tasks.errors import stop
from lm_eval_tasks.estimators import (
    best_of_n_at_k,
    majority_at_k,
    pass_at_k,
    reported_ks,
    weighted_bon_at_k,
)
from lm_eval_tasks.programs.extract import EXTRACTION as PROGRAM_EXTRACTION
from lm_eval_tasks.programs.extract import extract_program
from lm_eval_tasks.programs.grading import grade_programs, group_programs
from lm_eval_tasks.samples import SampledText
from lm_eval_tasks.voting import group_answers

#: Decides for each extracted answer of one problem whether it is correct.
Grader = Callable[[Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class Grading:
    """How the samples of a task are judged."""

    name: str
    """Name and version; part of the version under which verdicts are stored."""
    extract: Callable[[str], Extracted]
    """Finds the answer in a sampled text."""
    grade: Callable[[str, Sequence[str]], Sequence[bool]]
    """Compares answers with the gold answer, which comes first."""
    group: Callable[[str, Sequence[str | None]], list[int | None]]
    """Groups the answers of the samples of one problem for voting. The gold answer comes first, for
    the inputs that programs are compared on; what it expects takes no part."""

    def version_of(self, task_version: str) -> str:
        """Return the version under which verdicts are stored."""
        return f"{task_version}+{self.name}"

    def check_gold(self, gold: str) -> str | None:
        """Return what is wrong with a gold answer, or None."""
        if not gold.strip():
            return "the gold answer is empty"
        try:
            self.grade(gold, [])
        except ValueError as error:
            return str(error)
        return None


def _extract(text: str) -> Extracted:
    """Extract an answer; one of nothing but delimiters, such as an empty formula, is none."""
    found = extract_answer(text)
    return found if found.answer and normalise(found.answer) else Extracted(None, None)


def _grade_number(gold: str, answers: Sequence[str]) -> list[bool]:
    value = parse_number(gold)
    if value is None:
        raise ValueError(f"the gold answer {gold[:40]!r} is no number")
    return same_number_many(value, answers)


def _read_number(answer: str) -> Fraction | None:
    number = parse_number(answer)
    return number_in_words(answer) if number is None else number


def _group_numbers(gold: str, answers: Sequence[str | None]) -> list[int | None]:
    return group_answers(answers, _read_number)


def _group_formulas(gold: str, answers: Sequence[str | None]) -> list[int | None]:
    return group_answers(answers)


#: Answers are numbers, in any spelling and with units around them.
NUMBER = Grading(f"number/3/{EXTRACTION}", _extract, _grade_number, _group_numbers)
#: Answers are LaTeX; math-verify decides where strings and numbers do not.
MATH = Grading(f"math/2/{EXTRACTION}", _extract, equivalent_many, _group_formulas)
#: Answers are Python programs, gold answers are tests; both run in a sandbox.
PROGRAM = Grading(
    f"program/2/{PROGRAM_EXTRACTION}", extract_program, grade_programs, group_programs
)

_GRADINGS = {
    "arith": NUMBER,
    "gsm8k": NUMBER,
    "gsm8k_500": NUMBER,
    "humaneval": PROGRAM,
    "humaneval_base": PROGRAM,
    "math500": MATH,
    "mbpp": PROGRAM,
    "programs": PROGRAM,
}


def grading_of(task: str) -> Grading:
    """Return how a task's samples are judged.

    Args:
        task: name without the metric's suffix, as ``thinkfast-eval sample --task`` takes it.

    Raises:
        InputError: no such task.
    """
    if task not in _GRADINGS:
        stop(f"task {task!r} is unknown; accepted are {', '.join(sorted(_GRADINGS))}")
    return _GRADINGS[task]


@dataclass(frozen=True)
class Judged:
    """What is known about one sample once it is judged."""

    answer: str | None
    source: str | None
    correct: bool


def judge(texts: Sequence[str], extract: Callable[[str], Extracted], grade: Grader) -> list[Judged]:
    """Extract and grade the answers of one problem.

    Args:
        texts: the sampled texts.
        extract: finds the answer in a text.
        grade: called once, with every different answer found.
    """
    extracted = [extract(str(text)) for text in texts]
    answers = list(dict.fromkeys(item.answer for item in extracted if item.answer is not None))
    verdicts = dict(zip(answers, grade(answers), strict=True))
    return [
        Judged(item.answer, item.source, item.answer is not None and bool(verdicts[item.answer]))
        for item in extracted
    ]


@dataclass(frozen=True)
class ProblemScore:
    """The judged samples of one problem; every list has one entry per sample."""

    classes: list[int | None]
    """Answer class; None: no answer, which is an outcome of its own, counts as wrong and does not
    vote."""
    is_correct: list[bool]
    scores: list[float | None] | None = None
    """Rewards, None in it for a solution without one; None when no reward was asked for."""
    num_distinct: int | None = None
    """Different texts among them; 1 with N > 1 means that the samples are copies."""
    num_boxed: int | None = None
    r"""Samples whose answer stood in a \\boxed{}."""
    num_truncated: int | None = None
    """Samples cut at the token limit; None when the model class does not tell."""
    num_tokens: int | None = None
    """Generated tokens of all samples together; None when the model class does not tell."""

    @property
    def num_samples(self) -> int:
        """N, samples drawn."""
        return len(self.classes)

    @property
    def num_correct(self) -> int:
        """Samples whose answer equals the gold answer."""
        return sum(self.is_correct)

    @property
    def num_no_answer(self) -> int:
        """Samples in which no answer was found; they count as wrong."""
        return sum(number is None for number in self.classes)


def score_problem(
    samples: Sequence[str],
    gold: str,
    grading: Grading,
    scores: Sequence[float | None] | None = None,
) -> ProblemScore:
    """Judge the samples of one problem and group their answers.

    Args:
        samples: the N sampled texts; `SampledText` objects also say how they ended.
        gold: the gold answer.
        grading: how the task judges.
        scores: reward of each sample, where votes are weighted by one.
    """
    judged = judge(samples, grading.extract, lambda answers: grading.grade(gold, answers))
    known = [sample for sample in samples if isinstance(sample, SampledText)]
    is_known = len(known) == len(samples)
    return ProblemScore(
        classes=grading.group(gold, [item.answer for item in judged]),
        is_correct=[item.correct for item in judged],
        scores=None if scores is None else list(scores),
        num_distinct=len(set(map(str, samples))),
        num_boxed=sum(item.source == "boxed" for item in judged),
        num_truncated=sum(sample.is_truncated for sample in known) if is_known else None,
        num_tokens=sum(sample.num_tokens for sample in known) if is_known else None,
    )


#: Methods in the order in which tables show them, by the prefix of their metric keys.
METHODS = ("pass", "maj", "bon", "weighted_bon")
#: Metrics beside them, with lm-eval's "higher is better" flag.
RATES: dict[str, bool] = {
    "n_distinct": True,
    "boxed": True,
    "no_answer": False,
    "truncated": False,
    "gen_tokens": False,
}


def metric_names(num_samples: int, methods: Sequence[str] = ("pass",)) -> dict[str, bool]:
    """Return the metric names for N samples and whether higher is better."""
    ks = reported_ks(num_samples)
    return {f"{method}@{k}": True for method in methods for k in ks} | RATES


def method_values(score: ProblemScore, method: str, ks: Sequence[int]) -> list[tuple[float, float]]:
    """Return the expectation of a method over all subsets of k samples of one problem.

    Args:
        score: the judged samples; ``bon`` and ``weighted_bon`` need their rewards.
        method: one of `METHODS`.
        ks: subset sizes.

    Returns:
        For each k the value, NaN above N, and the standard error of its Monte Carlo, 0 where it is
        exact.
    """
    if method == "pass":
        return [(pass_at_k(score.num_samples, score.num_correct, k), 0.0) for k in ks]
    if method == "maj":
        found = majority_at_k(score.classes, score.is_correct, ks)
        return list(zip(found.values.tolist(), found.errors.tolist(), strict=True))
    assert score.scores is not None, f"{method} needs rewards"
    if method == "bon":
        values = best_of_n_at_k(score.classes, score.is_correct, score.scores, ks)
        return [(value, 0.0) for value in values.tolist()]
    assert method == "weighted_bon", method
    found = weighted_bon_at_k(score.classes, score.is_correct, score.scores, ks)
    return list(zip(found.values.tolist(), found.errors.tolist(), strict=True))


def problem_metrics(score: ProblemScore, methods: Sequence[str] = ("pass",)) -> dict[str, float]:
    """Return one problem's metrics; the benchmark's value is their mean over problems.

    Metrics whose facts are unknown are left out.
    """
    n = score.num_samples
    ks = reported_ks(n)
    metrics = {
        f"{method}@{k}": value
        for method in methods
        for k, (value, _) in zip(ks, method_values(score, method, ks), strict=True)
    }
    counts = {
        "n_distinct": score.num_distinct,
        "boxed": score.num_boxed,
        "no_answer": score.num_no_answer,
        "truncated": score.num_truncated,
        "gen_tokens": score.num_tokens,
    }
    return metrics | {name: count / n for name, count in counts.items() if count is not None}
