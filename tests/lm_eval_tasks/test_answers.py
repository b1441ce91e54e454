"""Extraction and equality of answers: a table of cases, hostile input with time limits."""

import json
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_tasks import answers
from lm_eval_tasks.answers import (
    MAX_TEXT_CHARS,
    equivalent,
    equivalent_many,
    extract_answer,
    normalise,
    number_in_words,
    parse_number,
    same_number_many,
)
from lm_eval_tasks.voting import group_answers
from lm_eval_tasks.workers import WorkerPool

#: Groups of cases, each with the source that the group stands for.
GROUPS = json.loads(Path(__file__).with_name("answer_cases.json").read_text())
CASES = [case for group in GROUPS for case in group["cases"]]


def _text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    return str(answer["repeat"] * answer["times"] + answer.get("then", ""))


@pytest.fixture(scope="module", autouse=True)
def _started_workers() -> Iterator[None]:
    """Use a short deadline, and start a worker before anything is timed."""
    answers._verifier.pool = WorkerPool(size=2, deadline_s=3.0)
    assert equivalent("x+1", "1+x")
    yield
    answers._verifier.pool.close()
    answers._verifier.pool = None


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{c['why']}" for i, c in enumerate(CASES)])
def test_equivalent(case: dict[str, Any]) -> None:
    start = time.monotonic()
    assert equivalent(case["gold"], _text(case["answer"])) is case["equal"]
    assert time.monotonic() - start < case.get("max_s", 30)


def test_the_table_has_200_cases_with_sources() -> None:
    assert len(CASES) >= 200
    assert all(group["source"] and group["cases"] for group in GROUPS)
    assert 60 < sum(case["equal"] for case in CASES) < len(CASES) - 60, "both verdicts"


def test_equivalent_many_keeps_order_and_survives_a_killed_worker() -> None:
    verdicts = equivalent_many("7", ["2^{200000000000}", "6+1", "7", "6+1", "8-2"])
    assert verdicts == [False, True, True, True, False]


def test_equivalent_from_a_thread() -> None:
    """math-verify itself refuses to work outside the main thread."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(equivalent("a+b", "b+a")))
    thread.start()
    thread.join(60)
    assert found == [True]


def test_equivalent_asks_once_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    original = WorkerPool.compare

    def compare(self: WorkerPool, pairs: list[tuple[str, str]]) -> list[Any]:
        asked.extend(pairs)
        return list(original(self, pairs))

    monkeypatch.setattr(WorkerPool, "compare", compare)
    for _ in range(3):
        assert equivalent_many("3y+3", ["3(y+1)", " 3(y + 1) ", "3(y+1)"]) == [True] * 3
    assert asked == [("3y+3", "3(y+1)")]


@pytest.mark.parametrize(
    ("text", "answer", "source"),
    [
        (r"First \boxed{1}, then \boxed{\{2, 3\}} and so on 4.", r"\{2, 3\}", "boxed"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\boxed{5}}", "5", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        (r"\boxed {7}", "7", "boxed"),
        (r"an open { before \boxed{8}", "8", "boxed"),
        (r"\boxed{9} and then cut off \boxed{\frac{1}{", "9", "boxed"),
        (r"\boxed{} so 5", "5", "number"),
        ("Step 1\n#### 1,234\n", "1,234", "hash"),
        ("#### 18\nthe answer is 3", "18", "hash"),
        ("#### $18.", "$18", "hash"),
        ("#### 2. Second step\nwe get 30", "30", "number"),
        ("The final answer is: $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}", "phrase"),
        ("Answer: **42**", "42", "phrase"),
        ("The answer is\n\n$x^2$", "x^2", "phrase"),
        ("The answer is 18 dollars, as 3*6=18 and 5<6.", "18", "phrase"),
        ("So the answer is \\(x^2\\).", "x^2", "phrase"),
        ("The answer is Evelyn. She ran 5 miles.", "Evelyn", "phrase"),
        ("the answer is 3 or 5", "3 or 5", "phrase"),
        ("It makes 18.\n\nThe final answer is:\n\\[\n18\n\\]", "18", "phrase"),
        ("The final answer is:\n\n$$\n18\n$$\n", "18", "phrase"),
        ("The answer is:\n```\n18\n```", "18", "phrase"),
        ("The answer is:\n```text\n18\n```", "18", "phrase"),
        ("The answer is:\n\\begin{align*}\nx &= 3*6 \\\\\n&= 18\n\\end{align*}", "18", "phrase"),
        ("Answer:\n\\[\n\\begin{aligned}\nx &= 18\n\\end{aligned}\n\\]", "18", "phrase"),
        ("Answer: \\[\n\\binom{1}\n{2}\n\\]", "\\binom{1}\n{2}", "phrase"),
        ("Answer:\n\\[\n18", "18", "phrase"),
        ("I get 18.\nThe answer is:\n\\[\n\\]\n", "18", "number"),
        ("I get 18.\nThe answer is:\n---\n", "18", "number"),
        ("I wonder what the answer is.\n\nIt may be 18 cows", "18", "number"),
        ("\\boxed{18}.\n\nA farmer has 12 cows. Answer within \\boxed{}.", "18", "boxed"),
        ("\\boxed{18} and \\boxed{ \n} or \\boxed{\\boxed{}}", "18", "boxed"),
        ("\\boxed{3} and \\boxed{\\{\\}}", "\\{\\}", "boxed"),
        ("She pays $5.50.", "$5.50", "number"),
        ("It is 1/2 of 4, so -3", "-3", "number"),
        ("10-4 leaves 6", "6", "number"),
        ("no digits here", None, None),
        ("", None, None),
    ],
)
def test_extract_answer(text: str, answer: str | None, source: str | None) -> None:
    assert extract_answer(text) == (answer, source)


@pytest.mark.parametrize(
    "unit",
    [
        *("{", "}", "\\boxed{", "\\boxed{}", "\\{", "\\", "$", "$1", "1,234", "9", "1/", "1 ", "-"),
        *(" ", "\n", ".", "a.", "answer", "answer is ", "answer is $", "#### 1\n", "#### 1 x\n"),
    ],
)
def test_extract_answer_is_bounded_on_a_megabyte(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    extracted = extract_answer(text)
    normalise(text)
    assert time.process_time() - start < 5
    assert len(extracted.answer or "") <= MAX_TEXT_CHARS


@pytest.mark.parametrize(
    ("begin", "filler", "end"),
    [
        ("#### 1", " ", "x"), ("#### 1%.", "\t", "x"), ("#### ", "1", "x"), ("#### $", "\n", "x"),
        ("#### 1", ",111", "x"), ("", "#", "x"), ("1", " ", "x"), ("1/", " ", "x"), ("$", " ", "x"),
        ("a", "1", ""), ("answer", " ", "x"), ("answer is", " ", "x"), ("\\boxed", " ", "x"),
        ("\\boxed{", "a ", "1}"), ("\\boxed{", "\\text{}", "}"), ("\\boxed{(", "a\u00a0 ", "1}"),
        ("\\boxed{1", ",111", "1}"), ("\\boxed{\\text{", "a", "}"), ("\\boxed{", " !", "}"),
    ],
)  # fmt: skip
def test_an_almost_matching_text_takes_no_longer(begin: str, filler: str, end: str) -> None:
    """Repeats that overlap are tried in all their divisions: many seconds at this length."""
    length = MAX_TEXT_CHARS - len(begin) - len(end)
    text = begin + (filler * length)[:length] + end
    start = time.process_time()
    answer = extract_answer(text).answer or text
    normalise(answer)
    number_in_words(answer)
    group_answers([answer])
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("#### 7", "7"), ("#### 7 %", "7"), ("#### 7 %. ", "7"), ("#### 7 . ", "7"),
        ("####7\t.", "7"), ("#### 7 . .", None), ("#### 7 .%", None), ("#### 7 %%", None),
        ("#### 7 x", None),
    ],
)  # fmt: skip
def test_the_end_of_a_hash_line(line: str, answer: str | None) -> None:
    found = extract_answer(f"so\n{line}\nend")
    assert (found.answer if found.source == "hash" else None) == answer


@given(st.text(alphabet="{}\\boxed 123$#answeri:.\n", max_size=300))
def test_extract_answer_of_any_text(text: str) -> None:
    """Never fails, and never finds an answer that is not in the text."""
    answer, source = extract_answer(text)
    assert (answer is None) == (source is None)
    assert answer is None or (answer in text and answer.strip())


@given(st.text(alphabet="{}()\\frac text,.0123456789+-$%=x ", max_size=80))
def test_normalise_is_idempotent(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@settings(max_examples=200)
@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_parse_number_reads_every_spelling_of_an_integer(value: int, zeros: int) -> None:
    suffix = "." + "0" * zeros if zeros else ""
    for spelling in (f"{value}{suffix}", f"{value:,}{suffix}", f"$ {value} $", f"{value}/1"):
        assert parse_number(spelling) == value


@given(st.fractions(max_denominator=10**6))
def test_parse_number_reads_fractions(value: Fraction) -> None:
    assert parse_number(f"{value.numerator}/{value.denominator}") == value
    assert parse_number(f"\\frac{{{value.numerator}}}{{{value.denominator}}}") == value


@pytest.mark.parametrize("text", ["1e9", "1,23", "1 2", "x", "", "1/0", "--1", "1.2.3", "(1)"])
def test_parse_number_refuses(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("answer", "equal"),
    [
        ("18", True),
        ("$18.00", True),
        ("18 dollars", True),
        ("18\\text{ dollars per day}", True),
        ("x = 18", True),
        ("9 \\cdot 2 = 18", True),
        ("18 km/h", True),
        ("18%", True),
        ("\\text{18 dollars}", True),
        ("x = \\textbf{18}", True),
        ("\\text{It is } \\$18\\text{ in all}", True),
        ("-\\text{ 18 dollars}", False),
        ("\\text{18 or 19}", False),
        ("\\text{18} - \\text{3}", False),
        ("\\text{1}\\text{8}", False),
        ("\\text{dollars}", False),
        ("\\frac{36}{2}", True),
        ("2 \\cdot 9", True),
        ("3^2 + 9", True),
        ("-18", False),
        ("18.5", False),
        ("1,8", False),
        ("3 hours 18 minutes", False),
        ("18\\text{ hours and }30\\text{ minutes}", False),
        ("18\\text{ boys}, 3\\text{ girls}", False),
        ("18\u00b0", True),
        ("18\\degree", True),
        ("18^{\\circ}\\text{C}", True),
        ("18, 000", False),
        ("18 or 19", False),
        ("18-19", False),
        ("eighteen", False),
        ("", False),
        ("9" * 600, False),
    ],
)
def test_same_number(answer: str, equal: bool) -> None:
    assert same_number_many(Fraction(18), [answer]) == [equal]


def test_same_number_with_separators() -> None:
    spellings = ["70,000", "70000", "$70,000.00", "70000.", "70,000 dollars", "7,000"]
    assert same_number_many(Fraction(70000), spellings) == [True] * 5 + [False]


def test_equivalent_when_math_verify_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers._verifier, "pool", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "math-verify\[antlr4_13_2\]"'):
        equivalent("y+2", "2+y")
    assert equivalent("2", "2.0"), "plain numbers need no math-verify"
