"""Score the N samples of one problem, and turn counts into metrics.

No lm-eval, torch or vllm is needed here: texts and a gold answer go in, numbers come out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lm_eval_tasks.answers import extract_answer
from lm_eval_tasks.estimators import pass_at_k, reported_ks
from lm_eval_tasks.samples import SampledText

#: Decides for each extracted answer of one problem whether it is correct.
Grader = Callable[[Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class ProblemScore:
    """What the samples of one problem amount to."""

    num_samples: int
    """N, samples drawn."""
    num_correct: int
    """Samples whose answer equals the gold answer."""
    num_distinct: int
    """Different texts among them; 1 with N > 1 means that the samples are copies."""
    num_boxed: int
    r"""Samples whose answer stood in a \\boxed{}."""
    num_no_answer: int
    """Samples in which no answer was found; they count as wrong."""
    num_truncated: int | None
    """Samples cut at the token limit; None when the model class does not tell."""
    num_tokens: int | None
    """Generated tokens of all samples together; None when the model class does not tell."""


def score_problem(samples: Sequence[str], grade: Grader) -> ProblemScore:
    """Extract and grade the answers of one problem.

    Args:
        samples: the N sampled texts; `SampledText` objects also say how they ended.
        grade: called once, with every different answer found.
    """
    extracted = [extract_answer(sample) for sample in samples]
    answers = list(dict.fromkeys(item.answer for item in extracted if item.answer is not None))
    verdicts = dict(zip(answers, grade(answers), strict=True))
    known = [sample for sample in samples if isinstance(sample, SampledText)]
    is_known = len(known) == len(samples)
    return ProblemScore(
        num_samples=len(samples),
        num_correct=sum(item.answer is not None and verdicts[item.answer] for item in extracted),
        num_distinct=len(set(map(str, samples))),
        num_boxed=sum(item.source == "boxed" for item in extracted),
        num_no_answer=sum(item.answer is None for item in extracted),
        num_truncated=sum(sample.is_truncated for sample in known) if is_known else None,
        num_tokens=sum(sample.num_tokens for sample in known) if is_known else None,
    )


#: Metrics beside pass@k, with lm-eval's "higher is better" flag.
RATES: dict[str, bool] = {
    "n_distinct": True,
    "boxed": True,
    "no_answer": False,
    "truncated": False,
    "gen_tokens": False,
}


def metric_names(num_samples: int) -> dict[str, bool]:
    """Return the metric names for N samples and whether higher is better."""
    return {f"pass@{k}": True for k in reported_ks(num_samples)} | RATES


def problem_metrics(score: ProblemScore) -> dict[str, float]:
    """Return one problem's metrics; the benchmark's value is their mean over problems.

    ``truncated`` and ``gen_tokens`` are left out when they are unknown.
    """
    n = score.num_samples
    metrics = {f"pass@{k}": pass_at_k(n, score.num_correct, k) for k in reported_ks(n)}
    metrics["n_distinct"] = score.num_distinct / n
    metrics["boxed"] = score.num_boxed / n
    metrics["no_answer"] = score.num_no_answer / n
    if score.num_truncated is not None:
        metrics["truncated"] = score.num_truncated / n
    if score.num_tokens is not None:
        metrics["gen_tokens"] = score.num_tokens / n
    return metrics
