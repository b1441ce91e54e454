"""Step splitting and aggregation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_tasks.rewards.aggregation import AGGREGATIONS, aggregate
from lm_eval_tasks.rewards.steps import SPLITS, split_steps

TEXT = "\n\nFirst line\nstill first\n\n\n second \n\nanswer: 7\n\n"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("paragraph", ["First line\nstill first", "second", "answer: 7"]),
        ("line", ["First line", "still first", "second", "answer: 7"]),
        ("newline", ["First line", "still first", "", "", " second ", "", "answer: 7"]),
        ("step_tag", [TEXT.strip()]),
    ],
)
def test_split_steps(split: str, expected: list[str]) -> None:
    assert split_steps(TEXT, split) == expected  # type: ignore[arg-type]


def test_split_steps_at_the_tag() -> None:
    text = "Step 1: a ки\nStep 2: b\nmore ки\nStep 3: c"
    assert split_steps(text, "step_tag") == ["Step 1: a", "Step 2: b\nmore", "Step 3: c"]


@given(st.text(alphabet="ab \n\tки", max_size=40), st.sampled_from(SPLITS))
def test_split_steps_loses_no_text(text: str, split: str) -> None:
    steps = split_steps(text, split)  # type: ignore[arg-type]
    assert bool(steps) == bool(text.strip())
    if split != "step_tag":
        assert "".join("".join(steps).split()) == "".join(text.split())
    if split != "newline":
        assert all(step.strip() for step in steps)


def test_aggregate() -> None:
    scores = [0.5, 0.25, 0.75]
    expected = {"min": 0.25, "prod": 0.09375, "last": 0.75, "mean": 0.5}
    assert {how: aggregate(scores, how) for how in AGGREGATIONS} == expected
    assert {aggregate([], how) for how in AGGREGATIONS} == {None}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_aggregates_are_probabilities(scores: list[float]) -> None:
    found = {how: aggregate(scores, how) for how in AGGREGATIONS}
    assert all(value is not None and 0 <= value <= 1 for value in found.values())
    assert found["prod"] <= found["min"] <= found["mean"] + 1e-12  # type: ignore[operator]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="accepted: paragraph, line, newline, step_tag"):
        split_steps("a", "sentence")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accepted: min, prod, last, mean"):
        aggregate([0.5], "max")
