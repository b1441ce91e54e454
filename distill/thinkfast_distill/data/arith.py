r"""``arith``: seeded multi-step arithmetic word problems with chain of thought and step labels.

A problem is a number that changes month by month; its solution has one equation per month and line
and ends in ``#### <number>``, as in GSM8K. The months are keys: a step is looked up by its month
and not by counting sentences, so that a model whose memory is a state of fixed size can learn the
task as well as one with attention. Problem ``index`` of a split is a function of (seed, split,
index).

Which split a problem belongs to is decided by a hash of its arithmetic (start, operations,
operands), not by chance: the text fixes the arithmetic, so no text, nor the same sums under other
names, can occur in two splits.

Every step has a label for training process reward models, for right solutions, for solutions with a
planted mistake (`with_mistake`) and for what a model wrote (`label_steps`). As in PRM800K, every
step after the first mistake counts as wrong.

Command: ``python -m thinkfast_distill.data.arith --split test --num 500``.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, TextIO

from thinkfast_distill.data.errors import DataError

Split = Literal["train", "validation", "test"]
Operator = Literal["+", "-", "*", "/"]
Mistake = Literal["slip", "operator", "operand", "stale", "skip"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MISTAKES: tuple[Mistake, ...] = ("slip", "operator", "operand", "stale", "skip")
NAMES = ("Anna", "Ben", "Cara", "Dan", "Emma", "Finn", "Gina", "Hugo")
ITEMS = ("apples", "books", "coins", "eggs", "pens", "rocks", "shells", "stamps")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
SENTENCES: dict[Operator, tuple[str, ...]] = {
    "+": ("In {month} {name} buys {n}.", "In {month} {name} finds {n}."),
    "-": ("In {month} {name} sells {n}.", "In {month} {name} loses {n}."),
    "*": ("In {month} {name} has {n} times as many.",),
    "/": ("In {month} {name} sells half.", "In {month} {name} loses half."),
}
#: Parts of a thousand of all problems that are kept for each split but train.
_HELD_OUT: dict[Split, range] = {"test": range(50), "validation": range(50, 100)}
#: One draw in twenty falls into a held-out split, so a thousand misses mean that it is empty.
_MAX_TRIES = 1000
_EQUATION = re.compile(
    r"\s*(?:([A-Z][a-z]+):)?\s*(\d{1,9})\s*([-+*/])\s*(\d{1,9})\s*=\s*(\d{1,9})\s*\.?\s*"
)
_ANSWER = re.compile(r"\s*####\s*(-?\d{1,9})\s*")


@dataclass(frozen=True)
class ArithSpec:
    """How hard the problems are."""

    min_steps: int = 4
    """Fewest operations of a problem; the number is uniform between the two."""

    max_steps: int = 8
    """Most operations of a problem; one per month, so at most 12."""

    max_value: int = 99
    """Largest value at any step. Up to 99 every number is one token of the ``arith`` tokenizer."""

    max_operand: int = 9
    """Largest number added or taken away; the smallest is 2."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps <= len(MONTHS):
            raise DataError(
                f"arith: min_steps={self.min_steps} and max_steps={self.max_steps} must satisfy "
                f"1 <= min_steps <= max_steps <= {len(MONTHS)}"
            )
        if self.max_operand < 2:
            raise DataError(f"arith: max_operand={self.max_operand} must be at least 2")
        if self.max_value < 10 or self.max_value < 2 * self.max_operand:
            raise DataError(
                f"arith: max_value={self.max_value} must be at least 10 and at least twice "
                f"max_operand={self.max_operand}"
            )


@dataclass(frozen=True)
class Problem:
    """A problem with its solution."""

    start: int
    """The number at the beginning."""

    operations: tuple[tuple[Operator, int], ...]
    """Operator and operand of each step."""

    question: str
    """The text."""

    @property
    def structure(self) -> str:
        """The arithmetic without the words; its hash decides the split."""
        return " ".join([str(self.start), *(f"{op}{n}" for op, n in self.operations)])

    @property
    def values(self) -> list[int]:
        """The number after each step."""
        found, value = [], self.start
        for operator, operand in self.operations:
            value = compute(value, operator, operand)
            found.append(value)
        return found

    @property
    def steps(self) -> list[str]:
        """The lines of the solution, the last being the answer."""
        lines, value = [], self.start
        for month, (operator, operand) in zip(MONTHS, self.operations, strict=False):
            result = compute(value, operator, operand)
            lines.append(_line(month, value, operator, operand, result))
            value = result
        return [*lines, f"#### {value}"]

    @property
    def solution(self) -> str:
        """The solution's text."""
        return "\n".join(self.steps)

    @property
    def answer(self) -> int:
        """The final number."""
        return self.values[-1]


@dataclass(frozen=True)
class LabelledSolution:
    """A solution with a label per line, for training a process reward model."""

    steps: tuple[str, ...]
    """The lines, the last being the answer."""

    labels: tuple[bool, ...]
    """Per line: neither it nor a line before it is wrong."""

    mistake: Mistake | None
    """What was planted, or None in a right solution."""


def compute(value: int, operator: Operator, operand: int) -> int:
    """The result of one step; division rounds down."""
    if operator == "+":
        return value + operand
    if operator == "-":
        return value - operand
    if operator == "*":
        return value * operand
    return value // operand


def _line(month: str, value: int, operator: Operator, operand: int, result: int) -> str:
    return f"{month}: {value}{operator}{operand}={result}"


def split_of(structure: str) -> Split:
    """The one split to which a problem with this arithmetic belongs."""
    digest = hashlib.blake2b(structure.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 1000
    for split, buckets in _HELD_OUT.items():
        if bucket in buckets:
            return split
    return "train"


def problem(split: Split, index: int, seed: int = 0, spec: ArithSpec | None = None) -> Problem:
    """Returns problem number ``index`` of a split.

    Args:
        split: ``train``, ``validation`` or ``test``.
        index: any number from 0; different indices may, rarely, give the same problem.
        seed: another seed, other problems of the same split.
        spec: difficulty; None for the default.

    Raises:
        DataError: no such split, or the difficulty is so narrow that it has no problem in it.
    """
    if split not in SPLITS:
        raise DataError(f"arith: split {split!r} is not accepted; accepted: {', '.join(SPLITS)}")
    spec = spec or ArithSpec()
    key = hashlib.blake2b(f"arith/{seed}/{split}/{index}".encode(), digest_size=16).digest()
    rng = Random(int.from_bytes(key, "big"))
    for _ in range(_MAX_TRIES):
        candidate = _draw(rng, spec)
        if split_of(candidate.structure) == split:
            return candidate
    raise DataError(
        f"arith: no {split} problem found for {spec}; raise max_steps, max_value or max_operand"
    )


def problems(
    split: Split, num: int, seed: int = 0, spec: ArithSpec | None = None
) -> Iterator[Problem]:
    """The first ``num`` problems of a split with pairwise different arithmetic.

    Raises:
        DataError: the difficulty has too few different problems.
    """
    seen: set[str] = set()
    index = last_new = 0
    while len(seen) < num:
        one = problem(split, index, seed, spec)
        index += 1
        if one.structure not in seen:
            seen.add(one.structure)
            last_new = index
            yield one
        elif index - last_new > _MAX_TRIES:
            raise DataError(
                f"arith: only {len(seen)} different {split} problems found for {spec or 'default'}"
                f", {num} were asked for; ask for fewer or raise max_steps or max_operand"
            )


def _draw(rng: Random, spec: ArithSpec) -> Problem:
    num_steps = rng.randrange(spec.min_steps, spec.max_steps + 1)
    start = value = rng.randrange(2, min(30, spec.max_value) + 1)
    operations: list[tuple[Operator, int]] = []
    for _ in range(num_steps):
        operator, operand = _draw_operation(rng, spec, value, operations)
        value = compute(value, operator, operand)
        operations.append((operator, operand))
    name, item = NAMES[rng.randrange(len(NAMES))], ITEMS[rng.randrange(len(ITEMS))]
    sentences = [f"{name} has {start} {item}."]
    for month, (operator, operand) in zip(MONTHS, operations, strict=False):
        sentence = SENTENCES[operator][rng.randrange(len(SENTENCES[operator]))]
        sentences.append(sentence.format(month=month, name=name, n=operand))
    sentences.append(f"How many {item} does {name} have now?")
    return Problem(start, tuple(operations), " ".join(sentences))


def _draw_operation(
    rng: Random, spec: ArithSpec, value: int, before: Sequence[tuple[Operator, int]]
) -> tuple[Operator, int]:
    """An operation that keeps the value between 2 and ``max_value``."""
    while True:
        draw = rng.randrange(10)
        if draw < 4:
            operator: Operator = "+"
        elif draw < 8:
            operator = "-"
        else:
            operator = "*" if draw == 8 else "/"
            if before and before[-1][0] in "*/":  # else values would jump to the ends and stay
                continue
        if operator in "+-":
            operand = rng.randrange(2, spec.max_operand + 1)
        else:
            operand = rng.randrange(2, 5) if operator == "*" else 2
        if operator == "/" and value % 2:
            continue
        if 2 <= compute(value, operator, operand) <= spec.max_value:
            return operator, operand


# -- step labels ----------------------------------------------------------------------------------


def label_steps(solution: str, sampled: str) -> list[bool]:
    """Labels what a model wrote, line by line.

    A line is right when its equation holds, its result is that of the same line of the solution,
    the month it names, if any, is that of this line, and all lines before it are right; the answer
    line, when it is at its place with the right number. ``7+17=24`` for ``17+7=24`` is right.

    Args:
        solution: the true solution, `Problem.solution`.
        sampled: the model's text; empty lines do not count.

    Returns:
        one label per line that is not empty.

    Raises:
        DataError: the solution is not one of this generator.
    """
    gold = [_result_of(line) for line in solution.strip().split("\n")]
    if any(result is None for result in gold):
        raise DataError(f"arith: not a solution of this generator: {solution[:80]!r}")
    labels: list[bool] = []
    is_right = True
    for i, line in enumerate(line for line in sampled.split("\n") if line.strip()):
        is_right = is_right and i < len(gold) and _agrees(_result_of(line), gold[i])
        labels.append(is_right)
    return labels


def _result_of(line: str) -> tuple[str | None, int] | None:
    """(what the line is about, its number), or None if it is no line or its equation is false.

    The first is the month, None without one, and ``####`` for the answer.
    """
    answer = _ANSWER.fullmatch(line)
    if answer:
        return "####", int(answer[1])
    match = _EQUATION.fullmatch(line)
    if match is None:
        return None
    left, right, result = int(match[2]), int(match[4]), int(match[5])
    if match[3] == "/":
        holds = right != 0 and left == result * right
    elif match[3] == "*":
        holds = left * right == result
    else:
        holds = (left + right if match[3] == "+" else left - right) == result
    return (match[1], result) if holds else None


def _agrees(found: tuple[str | None, int] | None, gold: tuple[str | None, int] | None) -> bool:
    """Whether a line says what the solution says; the name of the month may be missing."""
    if found is None or gold is None or found[1] != gold[1]:
        return False
    return found[0] == gold[0] or (found[0] is None and gold[0] != "####")


def right_solution(one: Problem) -> LabelledSolution:
    """The solution, all lines right."""
    steps = tuple(one.steps)
    return LabelledSolution(steps, (True,) * len(steps), None)


def with_mistake(one: Problem, rng: Random, mistake: Mistake | None = None) -> LabelledSolution:
    """A solution with one planted mistake of a kind that language models make.

    ``slip``: a wrong result (by 1, 2 or 10); ``operator``: another operation; ``operand``: another
    number; ``stale``: an earlier value instead of the current one; ``skip``: a step left out. The
    lines after it follow from the wrong value; half of an odd number is rounded down.

    Args:
        one: the problem.
        rng: decides the place, the kind and the numbers.
        mistake: the kind; None for any that is possible.

    Raises:
        DataError: this kind does not fit this problem; ``stale`` and ``skip`` need two steps.
    """
    kinds = list(MISTAKES) if mistake is None else [mistake]
    places = list(range(len(one.operations)))
    tries = [(kind, place) for kind in kinds for place in places]
    while tries:
        kind = kinds[rng.randrange(len(kinds))]
        of_kind = [entry for entry in tries if entry[0] == kind]
        if not of_kind:
            kinds.remove(kind)
            continue
        entry = of_kind[rng.randrange(len(of_kind))]
        tries.remove(entry)
        lines = _wrong_lines(one, rng, kind, entry[1])
        if lines is not None:
            labels = label_steps(one.solution, "\n".join(lines))
            if not all(labels):
                return LabelledSolution(tuple(lines), tuple(labels), kind)
    raise DataError(f"arith: no mistake of kind {mistake or 'any'} fits {one.structure!r}")


def _wrong_lines(one: Problem, rng: Random, kind: Mistake, place: int) -> list[str] | None:
    """The lines of a solution with this mistake, or None if the draw did not make one."""
    operations = list(one.operations)
    before = [one.start, *one.values]
    value = before[place]
    operator, operand = operations[place]
    rest = list(zip(MONTHS, operations, strict=False))[place + 1 :]
    lines = one.steps[:place]
    if kind == "skip":
        if not rest:
            return None
    else:
        used, result = value, None
        if kind == "slip":
            right = compute(value, operator, operand)
            near = [right + by for by in (-10, -2, -1, 1, 2, 10) if right + by >= 0]
            result = near[rng.randrange(len(near))]
        elif kind == "operator":
            others = [other for other in ("+", "-", "*") if other != operator]
            operator = others[rng.randrange(len(others))]  # type: ignore[assignment]
        elif kind == "operand":
            shown = sorted({n for _, n in operations if n != operand} | {operand + 1})
            operand = shown[rng.randrange(len(shown))]
        else:
            earlier = sorted({old for old in before[:place] if old != value})
            if not earlier:
                return None
            used = earlier[rng.randrange(len(earlier))]
        if operator == "/" and used % operand:
            return None
        result = compute(used, operator, operand) if result is None else result
        if result < 0:
            return None
        lines.append(_line(MONTHS[place], used, operator, operand, result))
        value = result
    for month, (operator, operand) in rest:
        result = compute(value, operator, operand)
        if result < 0:
            return None  # a model would not go on like this, but it does halve odd numbers
        lines.append(_line(month, value, operator, operand, result))
        value = result
    return [*lines, f"#### {value}"]


def wrong_result(line: str, rng: Random, farthest: int, max_value: int) -> str:
    """A line of a solution with another result, from 1 to ``farthest`` away.

    Distances are drawn uniformly by order of magnitude. What is far off is found before what is off
    by one: a small model that saw only near misses learnt nothing from 40,000 of them.

    Args:
        line: ``month: a+b=c``.
        rng: decides the number.
        farthest: largest distance.
        max_value: largest result.
    """
    left, right = line.split("=")
    by = max(1, round(farthest ** rng.random()))
    sign = 1 if rng.random() < 0.5 else -1
    results = [int(right) + sign * by, int(right) - sign * by, int(right) + 1, int(right) - 1]
    return f"{left}={next(n for n in results if 0 <= n <= max_value)}"


# -- command --------------------------------------------------------------------------------------


def row(one: Problem, name: str) -> dict[str, Any]:
    """The fields of a problem in a JSON lines file: GSM8K's, and an identifier."""
    return {"id": name, "question": one.question, "answer": one.solution}


def step_row(one: Problem, name: str, solution: LabelledSolution) -> dict[str, Any]:
    """The fields of a labelled solution in a JSON lines file."""
    return {"id": name, "question": one.question, **asdict(solution)}


def write_rows(
    out: TextIO, split: Split, num: int, seed: int, spec: ArithSpec, *, step_labels: bool
) -> None:
    """Writes problems, or for each a right and a wrong labelled solution, as JSON lines."""
    rng = Random(f"arith/{seed}/{split}/mistakes")
    for i, one in enumerate(problems(split, num, seed, spec)):
        name = f"arith-{split}-{i:05d}"
        if step_labels:
            rows = [step_row(one, name, s) for s in (right_solution(one), with_mistake(one, rng))]
        else:
            rows = [row(one, name)]
        for fields in rows:
            out.write(json.dumps(fields) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    defaults = ArithSpec()
    parser = argparse.ArgumentParser(
        prog="python -m thinkfast_distill.data.arith",
        description="Writes arithmetic word problems as JSON lines, or their tokenizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="which problems")
    parser.add_argument("--num", type=int, default=500, help="number of problems")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other problems")
    parser.add_argument("--out", type=Path, help="file to write; standard output without it")
    parser.add_argument("--min-steps", type=int, default=defaults.min_steps, help="operations")
    parser.add_argument("--max-steps", type=int, default=defaults.max_steps, help="operations")
    parser.add_argument("--max-value", type=int, default=defaults.max_value, help="largest value")
    parser.add_argument("--max-operand", type=int, default=defaults.max_operand, help="largest")
    parser.add_argument(
        "--step-labels", action="store_true", help="right and wrong solutions with a label per step"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="write the tokenizer to this folder instead of problems"
    )
    options = parser.parse_args(arguments)
    try:
        if options.num < 1:
            raise DataError(f"--num {options.num}: need a number of at least 1")
        if options.tokenizer is not None:
            from thinkfast_distill.data.arith_tokenizer import write_tokenizer

            write_tokenizer(options.tokenizer)
            return 0
        spec = ArithSpec(
            options.min_steps, options.max_steps, options.max_value, options.max_operand
        )
        chosen = (options.split, options.num, options.seed, spec)
        if options.out is None:
            write_rows(sys.stdout, *chosen, step_labels=options.step_labels)
        else:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("w", encoding="utf-8", newline="\n") as out:
                write_rows(out, *chosen, step_labels=options.step_labels)
    except (DataError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
