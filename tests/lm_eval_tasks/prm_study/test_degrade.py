"""Degraded scores: what each family promises."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_tasks.prm_study.degrade import (
    LEVELS,
    degrade,
    discrimination,
    is_random,
    log_odds_spread,
)

SCORES = [0.9, 0.2, None, 0.7, 0.2, 0.05]
CORRECT = [True, False, True, True, False, False]


def worse(family: str, level: float, seed: int = 0, scores: list[float | None] = SCORES) -> list:
    spread = log_odds_spread([scores])
    return degrade(family, level, scores, CORRECT, spread, np.random.default_rng(seed))


@pytest.mark.parametrize("family", ["clean", "noise", "flip", "label", "shuffle"])
def test_level_0_changes_nothing(family: str) -> None:
    assert worse(family, 0.0) == [s if s is None else pytest.approx(s) for s in SCORES]
    assert not is_random(family, 0.0)


@given(st.integers(0, 1000), st.sampled_from(["noise", "flip", "label", "shuffle"]))
def test_samples_without_a_score_stay_without(seed: int, family: str) -> None:
    for level in LEVELS[family]:
        found = worse(family, level, seed)
        assert [score is None for score in found] == [score is None for score in SCORES]
        assert all(0 <= score <= 1 for score in found if score is not None)


@pytest.mark.parametrize("ends", [[], [0.0, 1.0]])
def test_noise_keeps_small_scores_apart(ends: list[float]) -> None:
    """The product of many steps is small; of two such solutions the better one stays the better."""
    scores = sorted([0.17**12, 0.34**12, 1e-300, 3e-7, 0.5, 1 - 3e-7, 1 - 1e-9, *ends])
    spread = log_odds_spread([scores])
    for level, tolerance in ((0.0, 1e-12), (1e-5, 0.1)):
        found = degrade(
            "noise", level, scores, [True] * len(scores), spread, np.random.default_rng(0)
        )
        assert found == sorted(found)
        assert len(set(found)) == len(found)
        inner = [(a, b) for a, b in zip(scores, found, strict=True) if 0 < a < 1]
        for before, after in inner:
            assert after == pytest.approx(before, rel=tolerance)
    assert min(found) >= 0
    assert max(found) <= 1


def test_flip_mirrors_ranks() -> None:
    found = worse("flip", 1.0)
    assert found[0] == 0.05
    assert found[3] == 0.2
    assert found[5] == 0.9
    assert sorted((found[1], found[4])) == [0.2, 0.7]
    assert not is_random("flip", 1.0) or sorted(filter(None, found)) == sorted(filter(None, SCORES))


def test_label_flips_probabilities() -> None:
    assert worse("label", 1.0) == [
        None if score is None else pytest.approx(1 - score) for score in SCORES
    ]
    few, many = worse("label", 0.3, seed=5), worse("label", 0.6, seed=5)
    changed = [a != b for a, b in zip(few, SCORES, strict=True)]
    assert all(a == b for a, b, c in zip(few, many, changed, strict=True) if c), "nested levels"


@given(st.integers(0, 1000), st.floats(0, 1))
def test_shuffle_keeps_the_scores(seed: int, level: float) -> None:
    found = [score for score in worse("shuffle", level, seed) if score is not None]
    assert sorted(found) == sorted(score for score in SCORES if score is not None)


def test_shuffled_scores_know_nothing() -> None:
    found = [discrimination(worse("shuffle", 1.0, seed), CORRECT) for seed in range(600)]
    assert discrimination(SCORES, CORRECT) == 1.0
    # The standard deviation of one value is below 0.3, so this is five standard errors.
    assert np.mean(found) == pytest.approx(0.5, abs=0.07)


def test_noise_is_as_wide_as_asked_for() -> None:
    scores: list[float | None] = [0.5] * 6
    draws = [
        degrade("noise", 2.0, scores, CORRECT, 1.5, np.random.default_rng(seed))
        for seed in range(500)
    ]
    log_odds = [math.log(s / (1 - s)) for found in draws for s in found if s is not None]
    assert np.std(log_odds) == pytest.approx(3.0, rel=0.06)
    assert np.mean(log_odds) == pytest.approx(0.0, abs=0.3)


def test_oracle() -> None:
    assert worse("oracle", 0.0) == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert worse("oracle", 1.0) == [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    wrong = [
        sum(a != float(b) for a, b in zip(worse("oracle", 0.2, seed), CORRECT, strict=True))
        for seed in range(500)
    ]
    assert np.mean(wrong) == pytest.approx(6 * 0.2, abs=0.2)


def test_discrimination() -> None:
    assert discrimination([0.5, 0.5, 0.1], [True, False, False]) == 0.75
    assert discrimination([0.1, 0.9], [True, False]) == 0.0
    assert math.isnan(discrimination([0.1, 0.9], [True, True]))
    assert math.isnan(discrimination([0.1, None], [True, False])), "only scored ones count"


@pytest.mark.parametrize(
    ("family", "level"), [("flip", 1.5), ("noise", -1.0), ("noise", math.nan), ("gauss", 0.1)]
)
def test_bad_input(family: str, level: float) -> None:
    with pytest.raises(ValueError, match=family):
        worse(family, level)
