"""What a selection method is worth under every condition, against the majority vote.

Values are expectations over all subsets of k (`lm_eval_tasks.estimators`), intervals are paired
bootstraps over problems. Random conditions are repeated and averaged per problem.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lm_eval_tasks.estimators import (
    Interval,
    best_of_n_at_k,
    bootstrap,
    majority_at_k,
    pass_at_k,
    weighted_bon_at_k,
)
from lm_eval_tasks.prm_study.degrade import (
    LEVELS,
    Floats,
    degrade,
    discrimination,
    is_random,
    log_odds_spread,
)

METHODS = ("bon", "weighted_bon")


@dataclass(frozen=True)
class Outcomes:
    """The judged samples of one problem, without scores."""

    classes: Sequence[int | None]
    is_correct: Sequence[bool]


@dataclass(frozen=True)
class Condition:
    """Where the scores come from and how much worse they are made."""

    family: str
    level: float = 0.0
    reward: str | None = None
    """Name of the reward; None for ``oracle``."""
    aggregation: str | None = None

    @property
    def label(self) -> str:
        """One name for tables."""
        source = f"{self.reward}, {self.aggregation}" if self.reward else ""
        if self.family == "clean":
            return source
        worse = f"{self.family} {self.level:g}"
        return f"{source}, {worse}" if source else worse


#: Scores of all solutions of a run: per problem, in the order of its samples.
ScoreTable = Sequence[Sequence[float | None]]


class Baselines(NamedTuple):
    """What needs no reward; (P, K) values, one row per problem."""

    majority: Floats
    coverage: Floats
    pass_at_1: Floats
    """(P, 1)."""


@dataclass(frozen=True)
class Study:
    """Settings of a study; the same for every run."""

    ks: tuple[int, ...]
    num_subsets: int
    """Random subsets per problem, k and repeat of weighted Best-of-N."""
    repeats: int
    """Of every random condition."""
    seed: int


def conditions(
    rewards: Sequence[str],
    aggregations: Sequence[str],
    main_aggregation: str,
    levels: Mapping[str, Sequence[float]],
) -> Iterator[Condition]:
    """Yield all conditions of a study in the order of its table.

    Args:
        rewards: names; comparing them is the swap.
        aggregations: compared on clean scores.
        main_aggregation: that of the degraded scores; it is among the clean ones too.
        levels: per family, without ``clean``.
    """
    for reward in rewards:
        for aggregation in dict.fromkeys([main_aggregation, *aggregations]):
            yield Condition("clean", 0.0, reward, aggregation)
    for family in LEVELS:
        if family == "oracle":
            continue
        for reward in rewards:
            for level in levels.get(family, ()):
                yield Condition(family, level, reward, main_aggregation)
    for level in levels.get("oracle", ()):
        yield Condition("oracle", level)


def baselines(problems: Sequence[Outcomes], ks: Sequence[int]) -> Baselines:
    """Return majority, coverage and pass@1 of every problem."""
    majority = [majority_at_k(one.classes, one.is_correct, ks).values for one in problems]
    counts = [(len(one.classes), sum(one.is_correct)) for one in problems]
    coverage = [[pass_at_k(n, c, k) for k in ks] for n, c in counts]
    first = [[pass_at_k(n, c, 1)] for n, c in counts]
    return Baselines(np.array(majority), np.array(coverage), np.array(first))


def evaluate(
    condition: Condition,
    problems: Sequence[Outcomes],
    tables: Mapping[tuple[str, str], ScoreTable],
    base: Baselines,
    study: Study,
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Return what the methods are worth under one condition.

    Args:
        condition: which.
        problems: of the run.
        tables: clean scores by reward and aggregation.
        base: from `baselines`, for the same problems and ks.
        study: settings.

    Returns:
        ``auroc`` (mean over the problems where it is defined), and per method and k the value, its
        difference to the majority vote with interval, the spread over repeats and the Monte Carlo
        error; and per method the (P, K) values of the problems, averaged over repeats.
    """
    table = _scores_of(condition, problems, tables)
    spread = log_odds_spread(table)
    repeats = study.repeats if is_random(condition.family, condition.level) else 1
    shape = (repeats, len(problems), len(study.ks))
    values = {method: np.zeros(shape) for method in METHODS}
    errors = np.zeros(shape)
    auroc = np.zeros((repeats, len(problems)))
    for repeat in range(repeats):
        for row, (one, clean) in enumerate(zip(problems, table, strict=True)):
            generator = _generator(study.seed, condition, repeat, row)
            scores = degrade(
                condition.family, condition.level, clean, one.is_correct, spread, generator
            )
            values["bon"][repeat, row] = best_of_n_at_k(
                one.classes, one.is_correct, scores, study.ks
            )
            weighted = weighted_bon_at_k(
                one.classes, one.is_correct, scores, study.ks, study.num_subsets, study.seed
            )
            values["weighted_bon"][repeat, row] = weighted.values
            errors[repeat, row] = weighted.errors
            auroc[repeat, row] = discrimination(scores, one.is_correct)
    # Which problems have an AUROC does not depend on the repeat.
    defined = ~np.isnan(auroc[0])
    result: dict[str, Any] = {
        "family": condition.family,
        "level": condition.level,
        "reward": condition.reward,
        "aggregation": condition.aggregation,
        "label": condition.label,
        "repeats": repeats,
        "auroc": float(auroc[:, defined].mean()) if defined.any() else None,
        "auroc_problems": int(defined.sum()),
    }
    for method in METHODS:
        result[method] = _summary(values[method], base.majority, study.ks)
    monte_carlo = np.sqrt((errors**2).sum(axis=(0, 1))) / (repeats * len(problems))
    for i, k in enumerate(study.ks):
        result["weighted_bon"][str(k)]["monte_carlo_error"] = float(monte_carlo[i])
    return result, {method: found.mean(axis=0) for method, found in values.items()}


def _scores_of(
    condition: Condition,
    problems: Sequence[Outcomes],
    tables: Mapping[tuple[str, str], ScoreTable],
) -> ScoreTable:
    if condition.reward is None:
        return [[None] * len(one.classes) for one in problems]
    assert condition.aggregation is not None
    return tables[condition.reward, condition.aggregation]


def _summary(values: Floats, majority: Floats, ks: Sequence[int]) -> dict[str, Any]:
    """Return the numbers of one method; ``values`` is (repeats, P, K), ``majority`` (P, K)."""
    mean = values.mean(axis=0)
    between = values.mean(axis=1).std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(ks))
    levels = bootstrap(mean)
    gains = bootstrap(mean - majority)
    return {
        str(k): as_dict(levels[i])
        | {"minus_majority": as_dict(gains[i]), "repeat_deviation": float(between[i])}
        for i, k in enumerate(ks)
    }


def as_dict(interval: Interval) -> dict[str, float]:
    """Return an interval as JSON."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _generator(seed: int, condition: Condition, repeat: int, row: int) -> np.random.Generator:
    """Return the randomness of one problem, which does not depend on the other conditions.

    Levels of a family share it: a sample flipped at a share of 0.1 is flipped at 0.25 too.
    """
    key = f"{seed}/{condition.family}/{condition.reward}/{repeat}/{row}"
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def study_run(
    problems: Mapping[str, Outcomes],
    tables: Mapping[tuple[str, str], ScoreTable],
    chosen: Sequence[Condition],
    study: Study,
    report: Callable[[], None],
) -> dict[str, Any]:
    """Return the study of one run.

    Args:
        problems: by name; each with at least ``max(study.ks)`` samples.
        tables: clean scores by reward and aggregation, in the order of ``problems``.
        chosen: the conditions.
        study: settings.
        report: called after every condition.
    """
    outcomes = list(problems.values())
    base = baselines(outcomes, study.ks)
    results, values = [], []
    for condition in chosen:
        result, of_problems = evaluate(condition, outcomes, tables, base, study)
        results.append(result)
        values.append(of_problems)
        report()
    _add_losses(results, values, study.ks)
    counts = [len(one.classes) for one in outcomes]
    return {
        "num_problems": len(outcomes),
        "num_samples": [min(counts), max(counts)],
        "ks": list(study.ks),
        "majority": _curve(base.majority, study.ks),
        "coverage": _curve(base.coverage, study.ks),
        "pass@1": as_dict(bootstrap(base.pass_at_1)[0]),
        "conditions": results,
    }


def _curve(values: Floats, ks: Sequence[int]) -> dict[str, Any]:
    found = bootstrap(values)
    return {str(k): as_dict(found[i]) for i, k in enumerate(ks)}


def _add_losses(
    results: Sequence[dict[str, Any]], values: Sequence[Mapping[str, Floats]], ks: Sequence[int]
) -> None:
    """Add what each condition loses, problem by problem, with intervals.

    ``loss_to_reference``, of every condition but the reference: against the clean scores of the
    first reward under the main aggregation. For another reward this is the loss of the swap.
    ``loss_to_own_clean``, of degraded conditions: against the clean scores of the same reward.

    Args:
        results: of `evaluate`; the reference is the first one with clean scores.
        values: of `evaluate`, in the same order.
        ks: subset sizes.
    """
    clean: dict[tuple[str, str], Mapping[str, Floats]] = {}
    for one, own in zip(results, values, strict=True):
        if one["family"] == "clean":
            clean[one["reward"], one["aggregation"]] = own
    reference = next(iter(clean.values()), None)
    for one, own in zip(results, values, strict=True):
        compared = {}
        if reference is not None and own is not reference:
            compared["loss_to_reference"] = reference
        if one["family"] != "clean" and (one["reward"], one["aggregation"]) in clean:
            compared["loss_to_own_clean"] = clean[one["reward"], one["aggregation"]]
        for name, before in compared.items():
            for method in METHODS:
                losses = bootstrap(before[method] - own[method])  # the same draws for both
                for k, loss in zip(ks, losses, strict=True):
                    one[method][str(k)][name] = as_dict(loss)
