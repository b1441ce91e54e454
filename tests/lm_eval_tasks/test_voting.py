"""Grouping of answers, and votes over groups."""

import itertools
import random
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_tasks import answers
from lm_eval_tasks.answers import signatures
from lm_eval_tasks.scoring import MATH, NUMBER
from lm_eval_tasks.voting import (
    WEIGHT_SCALE,
    comparable,
    group_answers,
    read_percentage,
    vote,
    weight_scale,
    whole_weight,
)
from lm_eval_tasks.workers import WorkerPool


@pytest.fixture(scope="module", autouse=True)
def _started_workers() -> Iterator[None]:
    answers._verifier.pool = WorkerPool(size=2, deadline_s=20.0)
    yield
    answers._verifier.pool.close()
    answers._verifier.pool = None


#: Each inner list is one class; no two of them may merge.
GROUPS = [
    ["x^2+1", "1+x^2"],
    [r"2\sqrt{2}", r"\sqrt8", r"2 \sqrt 2"],
    ["50", r"50\%", "50.0", r"\frac{100}{2}"],
    ["0.5", r"\frac12", "1/2", r"\dfrac{1}{2}"],
    [r"\{1,2\}", r"\{2,1\}"],
    [r"\text{Evelyn}", "Evelyn", "evelyn"],
    [r"\text{(C)}", "C"],
    ["3", "x=3", r"\sqrt{9}"],
    [r"\frac{\pi}{3}", r"\pi/3"],
    ["1024", "2^{10}"],
    [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    [r"\frac{x-1}{2}", "0.5x-0.5"],
    ["5", r"5 \text{ cm}"],
    ["{" * 600],
    ["\\frac{1}{"],
]


def test_group_answers_in_any_order() -> None:
    members = [(number, answer) for number, group in enumerate(GROUPS) for answer in group]
    for seed in range(3):
        random.Random(seed).shuffle(members)
        found = group_answers([answer for _, answer in members])
        pairs = {(number, label) for (number, _), label in zip(members, found, strict=True)}
        assert len(pairs) == len(GROUPS), sorted(pairs)
        assert len({label for _, label in pairs}) == len(GROUPS), sorted(pairs)


def test_group_answers_numbers_classes_by_first_appearance() -> None:
    given_answers = ["7", None, "3", "7.0", "", "$", "3"]
    assert group_answers(given_answers) == [0, None, 1, 0, None, None, 1]
    assert group_answers([]) == []
    assert group_answers([None]) == [None]


def test_an_answer_equal_to_two_numbers_does_not_merge_them() -> None:
    """math-verify calls 50% equal to 0.5 and, beside a gold answer of 50, to 50."""
    assert group_answers(["50", r"50\%", "0.5"]) == [0, 0, 1]


def test_grouping_of_number_tasks_reads_units() -> None:
    spellings = ["18", "$18.00", "18 dollars", "x = 18", "19 dollars", "eighteen", "2*9"]
    found = NUMBER.group("18", spellings)
    assert found == [0, 0, 0, 0, 1, 2, 0]
    assert MATH.group("18", ["18", "18 hours"])[0] == 0


def test_numerals_of_different_bases_stay_apart() -> None:
    assert group_answers(["52_8", "52", "(52)_8", r"52_{\text{eight}}", "53_8"]) == [0, 0, 0, 0, 1]
    assert group_answers(["52_8", "52", "52_9", "52_{9}", "7_8", "7"]) == [0, 1, 2, 2, 3, 3]


def test_several_quantities_are_not_their_first() -> None:
    spellings = [
        "18",
        r"18\text{ dollars and }50\text{ cents}",
        r"18\text{ dollars, }50\text{ cents}",
    ]
    spellings += [r"18\text{ dollars and }60\text{ cents}", r"18\text{ dollars}"]
    for grading in (NUMBER, MATH):
        assert grading.group("18", spellings) == [0, 1, 1, 2, 0]


def test_lists_and_degrees() -> None:
    assert group_answers(["100, 200", "100200", "200, 100", "100,200"]) == [0, 1, 0, 1]
    assert MATH.group("90", ["90", "90\u00b0", r"90^\circ", r"90\degree", "90"]) == [0] * 5


def test_hostile_answers_stay_alone() -> None:
    answers._verifier.pool.deadline_s = 2.0  # type: ignore[union-attr]
    try:
        found = group_answers(["100000000!", "5", "9^{9^{9^{9}}}", "4+1"])
    finally:
        answers._verifier.pool.deadline_s = 20.0  # type: ignore[union-attr]
    assert found == [0, 1, 2, 1]


def test_signatures() -> None:
    found = signatures(["1/2", "0.5", r"\frac{x}{2}", "0.5x", r"\{1,2\}", r"\text{even}", "", "-0"])
    assert found[0] == found[1] == "value:5.00000e-01,0.00000e+00"
    assert found[2] == found[3] != found[0]
    assert found[4:6] == ["points", "text"]
    assert found[6] is None
    assert found[7] == "value:0.00000e+00,0.00000e+00"
    assert signatures(["9" * 600]) == [None]


@pytest.mark.parametrize(
    ("answer", "number"),
    [("50%", 50), (r"50\%", 50), ("0.5 %", Fraction(1, 2)), ("7", 7), ("x", None), ("%", None)],
)
def test_read_percentage(answer: str, number: Fraction | int | None) -> None:
    assert read_percentage(answer) == number


def test_vote_counts_classes() -> None:
    assert vote([0, 0, 1], [True, True, False]) == 1.0
    assert vote([0, 1, 1], [True, False, False]) == 0.0
    assert vote([0, 1], [True, False]) == 0.5, "a tie is split evenly"
    assert vote([0, 1, 2, None, None, None], [True, False, False] + [False] * 3) == pytest.approx(
        1 / 3
    ), "samples without an answer do not vote"
    assert vote([None, None], [False, False]) == 0.0
    assert vote([], []) == 0.0
    assert vote([0, 0, 0, 1], [True, False, False, False]) == pytest.approx(1 / 3), (
        "a class of right and wrong spellings is worth its share of right ones"
    )


def test_vote_with_weights() -> None:
    classes, right = [0, 1, 1], [True, False, False]
    assert vote(classes, right, [0.9, 0.4, 0.4]) == 1.0
    assert vote(classes, right, [0.8, 0.4, 0.4]) == 0.5
    assert vote(classes, right, [0.3, 0.1, 0.2]) == 0.5, "exact, although 0.1 + 0.2 > 0.3 in floats"
    assert vote(classes, right, [0.7, None, 0.6]) == 1.0, "without a weight: no vote"
    assert vote(classes, right, [0.0, 0.0, 0.0]) == 0.5, "all weights zero: all classes tied"
    assert vote(classes, right, [None, None, None]) == 0.0
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number, 0 or more"):
            vote([0], [True], [weight])


CLASSES = st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=8)


@given(CLASSES, st.randoms(use_true_random=False), st.floats(0.01, 1))
def test_vote_properties(classes: list[int | None], chance: random.Random, weight: float) -> None:
    right = [number == 0 for number in classes]
    value = vote(classes, right)
    assert 0 <= value <= 1
    assert vote(classes, right, [weight] * len(classes)) == value, "equal weights: the majority"
    order = list(range(len(classes)))
    chance.shuffle(order)
    assert vote([classes[i] for i in order], [right[i] for i in order]) == value
    relabelled = [None if number is None else 9 - number for number in classes]
    assert vote(relabelled, right) == value
    assert value <= float(any(right))


def test_small_weights_count() -> None:
    """Products of many step scores are all small; none may round to 0."""
    assert vote([0, 1], [True, False], [4e-10, 6e-17]) == 1.0
    assert vote([0, 1, 1], [True, False, False], [3e-13, 1e-13, 2e-13]) == 0.5, "still exact"
    assert vote([0, 1], [True, False], [5e-324, 0.0]) == 0.5, "no float times a power of ten"
    assert weight_scale([0.3, None, 1.0]) == weight_scale([]) == weight_scale([0.0]) == WEIGHT_SCALE
    assert whole_weight(0.05, weight_scale([0.05])) == 5 * 10**8
    assert comparable(0.1 + 0.2) == 0.3
    assert comparable(4e-10) > comparable(6e-17)


def test_whole_weight_keeps_ties_of_equal_sums() -> None:
    parts = [0.1, 0.2, 0.3, 0.7]
    for order in itertools.permutations(parts):
        assert sum(map(whole_weight, order)) == sum(map(whole_weight, parts))
