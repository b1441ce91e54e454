"""The demo's own word problems: valid for the task, and their arithmetic is right."""

import ast
import json
import operator
import re
from fractions import Fraction

import pytest

from demo.run import check_data
from demo.settings import PROBLEMS

ROWS = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    assert isinstance(node, ast.Constant)
    return Fraction(node.value)


def test_problems_are_accepted() -> None:
    assert check_data(PROBLEMS) == len(ROWS)
    assert 24 <= len(ROWS) <= 40
    assert len({row["question"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_problem(row: dict[str, str]) -> None:
    """Every <<calculation=result>> is recomputed; the last result is the answer."""
    assert set(row) == {"question", "answer"}
    assert row["question"].endswith("?")
    solution, _, gold = row["answer"].rpartition("\n#### ")
    steps = re.findall(r"<<([^=<>]+)=([^<>]+)>>(\S*)", solution)
    assert steps
    for calculation, result, shown in steps:
        assert _value(ast.parse(calculation, mode="eval").body) == Fraction(result)
        assert re.match(r"\d+", shown)[0] == result
    assert steps[-1][1] == gold
    # every number that the solution starts from is in the question, a result, or a plain word's
    known = set(re.findall(r"\d+", row["question"])) | {result for _, result, _ in steps}
    implied = {"2", "3", "4", "5", "100"}  # twice, half, three times, quarter, Friday, per cent
    for calculation, _, _ in steps:
        assert set(re.findall(r"\d+", calculation)) <= known | implied, calculation
