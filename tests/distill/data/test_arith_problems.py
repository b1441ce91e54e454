import json
from random import Random

import pytest

from thinkfast_distill.data.arith import (
    MISTAKES,
    MONTHS,
    SPLITS,
    ArithSpec,
    label_steps,
    main,
    problem,
    problems,
    right_solution,
    split_of,
    with_mistake,
)
from thinkfast_distill.data.errors import DataError

SMALL = ArithSpec(min_steps=1, max_steps=2, max_value=20, max_operand=3)


def _arithmetic(question):
    """The numbers and operations of a text, without the words."""
    parts = question.split(". ")
    found = [parts[0].split(" has ")[1].split()[0]]
    for part in parts[1:-1]:
        assert part.startswith(f"In {MONTHS[len(found) - 1]} ")
        number = next((word for word in part.split() if word.isdigit()), "2")
        if "half" in part:
            found.append("/2")
        elif "times" in part:
            found.append(f"*{number}")
        else:
            is_more = any(verb in part for verb in ("buys", "finds"))
            found.append(("+" if is_more else "-") + number)
    return " ".join(found)


def _sides(line):
    """The sum and the result of a line, as texts."""
    left, right = line.split(": ")[1].split("=")
    return left, right


def test_problem_is_a_function_of_seed_split_and_index():
    assert problem("train", 5, 1) == problem("train", 5, 1)
    different = {problem(s, i, seed).question for s in SPLITS for i in (0, 1) for seed in (0, 1)}
    assert len(different) == 12


def test_problem_never_changes():
    """The shipped test set and the trained models depend on it."""
    one = problem("test", 0)
    assert one.structure == "5 +3 -4 /2 +8"
    assert one.question == (
        "Anna has 5 books. In January Anna buys 3. In February Anna loses 4. In March Anna sells "
        "half. In April Anna buys 8. How many books does Anna have now?"
    )
    assert one.solution == "January: 5+3=8\nFebruary: 8-4=4\nMarch: 4/2=2\nApril: 2+8=10\n#### 10"


def test_the_text_fixes_the_split():
    """No text, nor its arithmetic under other names, occurs in two splits, whatever the seed."""
    texts = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in (0, 1):
            for i in range(400):
                question = problem(split, i, seed, SMALL).question
                assert split_of(_arithmetic(question)) == split
                texts[split].add(_arithmetic(question))
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["test"] & texts["validation"]
    assert min(len(found) for found in texts.values()) > 20, "enough to have met by chance"


def test_splits_have_their_sizes():
    found = [split_of(problem("train", i).structure) for i in range(10)]
    assert found == ["train"] * 10
    shares = [split_of(f"{i} +2 -3") for i in range(20_000)]
    assert shares.count("test") == pytest.approx(1000, abs=150)
    assert shares.count("validation") == pytest.approx(1000, abs=150)


@pytest.mark.parametrize("spec", [ArithSpec(), SMALL, ArithSpec(6, 10, 60, 12)])
def test_problems_keep_to_their_difficulty(spec):
    lengths = set()
    for one in problems("train", 60, 3, spec):
        lengths.add(len(one.operations))
        assert all(0 < value <= spec.max_value for value in [one.start, *one.values])
        assert all(n <= spec.max_operand for op, n in one.operations if op in "+-")
        assert one.structure == _arithmetic(one.question)
    assert lengths <= set(range(spec.min_steps, spec.max_steps + 1))
    assert {spec.min_steps, spec.max_steps} <= lengths


def test_problems_are_different_and_say_when_there_are_no_more():
    found = [one.structure for one in problems("test", 300)]
    assert len(set(found)) == 300
    with pytest.raises(DataError, match=r"only \d+ different test problems"):
        list(problems("test", 1000, 0, SMALL))
    tiny = ArithSpec(min_steps=1, max_steps=1, max_value=10, max_operand=2)
    with pytest.raises(DataError, match=r"no (test|validation) problem found for"):
        [problem(split, 0, 0, tiny) for split in ("test", "validation")]


def test_steps_follow_from_each_other():
    for i in range(100):
        one = problem("train", i)
        value = one.start
        for month, line in zip(MONTHS, one.steps[:-1], strict=False):
            assert line.startswith(f"{month}: ")
            left, right = _sides(line)
            assert int(left.replace("*", " ").replace("/", " ").replace("+", " ")
                       .replace("-", " ").split()[0]) == value  # fmt: skip
            assert eval(left.replace("/", "//")) == int(right)
            value = int(right)
        assert one.steps[-1] == f"#### {value}"
        assert one.answer == value


@pytest.mark.parametrize("kind", MISTAKES)
def test_with_mistake_plants_one(kind):
    rng = Random(0)
    places = set()
    for i in range(200):
        one = problem("train", i)
        wrong = with_mistake(one, rng, kind)
        assert wrong.mistake == kind
        assert len(wrong.labels) == len(wrong.steps)
        first = wrong.labels.index(False)
        assert not any(wrong.labels[first:]), "all lines after the first mistake count as wrong"
        assert list(wrong.steps[:first]) == one.steps[:first]
        assert wrong.steps[first] != one.steps[first]
        assert wrong.labels == tuple(label_steps(one.solution, "\n".join(wrong.steps)))
        places.add(first)
        # What follows is consistent: the mistake is the only one.
        for line in wrong.steps[first + 1 : -1]:
            left, right = _sides(line)
            assert eval(left.replace("/", "//")) == int(right)
        if kind != "skip":
            left, right = _sides(wrong.steps[first])
            assert (eval(left.replace("/", "//")) == int(right)) == (kind != "slip")
        if kind == "skip":
            assert len(wrong.steps) == len(one.steps) - 1
    assert len(places) > 4


def test_with_mistake_uses_all_kinds_and_refuses_the_impossible():
    rng = Random(0)
    kinds = {with_mistake(problem("train", i), rng).mistake for i in range(200)}
    assert kinds == set(MISTAKES)
    for i in range(300):  # also where only a slip is possible, as in 4/2
        assert with_mistake(problem("train", i, 0, ArithSpec(1, 1)), rng).mistake in MISTAKES
    one_step = problem("train", 0, 0, ArithSpec(1, 1))
    for kind in ("skip", "stale"):
        with pytest.raises(DataError, match=f"no mistake of kind {kind} fits"):
            with_mistake(one_step, rng, kind)


SOLUTION = "January: 17+7=24\nFebruary: 24-4=20\n#### 20"


@pytest.mark.parametrize(
    ("sampled", "labels"),
    [
        (SOLUTION, [True, True, True]),
        ("17+7=24\nFebruary: 24-4=20\n#### 20", [True, True, True]),
        ("January: 17+7=24\nMarch: 24-4=20\n#### 20", [True, False, False]),
        ("####: 17+7=24\n24-4=20", [False, False]),
        ("7+17=24\n\n 24 - 4 = 20\n####20\n", [True, True, True]),
        ("17+7=25\n25-5=20\n#### 20", [False, False, False]),
        ("17+7=24\n24-5=20\n#### 20", [True, False, False]),
        ("17+7=24\n10+10=20\n#### 20", [True, True, True]),
        ("17+7=24\n24-4=20\n#### 21", [True, True, False]),
        ("17+7=24\n#### 24", [True, False]),
        ("17+7=24\n24-4=20\n#### 20\n20+1=21", [True, True, True, False]),
        ("#### 20", [False]),
        ("24\n20\n#### 20", [False, False, False]),
        ("17+7=24\n24-4=20\n20", [True, True, False]),
        ("48/2=24\n24-4=20\n#### 20", [True, True, True]),
        ("49/2=24\n24-4=20\n#### 20", [False, False, False]),
        ("24/0=24", [False]),
        ("", []),
    ],
)
def test_label_steps(sampled, labels):
    assert label_steps(SOLUTION, sampled) == labels


def test_label_steps_refuses_other_solutions():
    with pytest.raises(DataError, match="not a solution of this generator"):
        label_steps("She has 17 + 7 apples.\n#### 24", SOLUTION)


def test_right_solution_is_right():
    one = problem("validation", 3)
    found = right_solution(one)
    assert all(found.labels)
    assert found.mistake is None
    assert label_steps(one.solution, one.solution) == list(found.labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_steps": 0}, "min_steps=0"),
        ({"min_steps": 9}, "1 <= min_steps <= max_steps"),
        ({"max_steps": 13}, "max_steps=13 must satisfy 1 <= min_steps <= max_steps <= 12"),
        ({"max_operand": 1}, "max_operand=1 must be at least 2"),
        ({"max_value": 12}, "at least twice max_operand=9"),
    ],
)
def test_impossible_difficulties_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        ArithSpec(**arguments)


def test_command_writes_problems_and_labels(tmp_path, capsys):
    assert main(["--split", "validation", "--num", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == [f"arith-validation-0000{i}" for i in range(3)]
    out = tmp_path / "new" / "labels.jsonl"
    arguments = ["--split", "train", "--num", "3", "--step-labels", "--out", str(out)]
    assert main(arguments) == 0
    first = out.read_bytes()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["mistake"] is None for row in rows] == [True, False] * 3
    assert all(len(row["steps"]) == len(row["labels"]) for row in rows)
    assert main(arguments) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "--num 0: need a number of at least 1"),
        (["--min-steps", "9"], "min_steps=9 and max_steps=8"),
        (["--split", "test", "--num", "9999", "--max-steps", "1", "--min-steps", "1"], "only "),
    ],
)
def test_command_reports_mistakes_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
