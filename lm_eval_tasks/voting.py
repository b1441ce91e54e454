r"""Group the answers of a problem into classes of equal ones, and let the samples vote.

Grouping never sees the gold answer. Two answers are in one class when

1. both are numbers and have the same value: a number, or a number of percent, in any spelling of
   `lm_eval_tasks.answers.parse_number`; numbers of different value are never in one class;
2. else, their normalised texts are equal; words count the same with and without ``\text{}``;
3. else, math-verify calls them equal in one of the two orders, in a worker that can be killed.
   Equality is not transitive there, so its transitive closure counts. An answer that joins two
   numbers of different value goes to the smaller one. Numerals that name their base are one class
   with the bare digits, unless the answers name two bases for them.

The classes depend on the set of different answers, not on their order or number. math-verify is
asked only about pairs of one kind and one numeric value (`lm_eval_tasks.answers.signatures`).

Votes: a sample without an answer does not vote. The class with the most votes, or the largest sum
of weights, wins; tied classes share the win evenly. The answer given is that of a voter of the
winning class chosen at random, so a class that holds right and wrong spellings is worth its share
of right ones. If nobody votes the result is wrong.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from lm_eval_tasks.answers import (
    based_numeral,
    equal_pairs,
    normalise,
    parse_number,
    signatures,
)

#: Weights are whole multiples of 1e-9, the precision in which scores are stored, so that sums are
#: exact and ties do not depend on rounding or on order. See `weight_scale` for small ones.
WEIGHT_SCALE = 10**9

NumberReader = Callable[[str], Fraction | None]


def read_percentage(answer: str) -> Fraction | None:
    r"""Return the number of an answer, a percent sign after it ignored: 50 for "50" and "50\%"."""
    text = normalise(answer)
    return parse_number(text.removesuffix("%").removesuffix("\\"))


def group_answers(
    answers: Sequence[str | None], read_number: NumberReader = read_percentage
) -> list[int | None]:
    """Return the class of each sample's answer; see this module's docstring for the rules.

    Args:
        answers: one per sample; None for a sample without an answer.
        read_number: returns the value of an answer that is a number, else None.

    Returns:
        Class numbers from 0 in the order of first appearance; None where the answer is None or
        empty.
    """
    keys: dict[str, Fraction | str] = {}
    for answer in dict.fromkeys(answers):
        if answer is None or not normalise(answer):
            continue
        number = read_number(answer)
        keys[answer] = _text_key(answer) if number is None else number
    spelling: dict[Fraction | str, str] = {}
    for answer, key in keys.items():
        # math-verify sees one spelling of each; which one must not depend on the order.
        first = min(spelling.get(key, answer), answer)
        spelling[key] = first if based_numeral(first) is None else str(key)
    merged = _merge(spelling)
    numbers: dict[Fraction | str, int] = {}
    classes: list[int | None] = []
    for answer in answers:
        if answer is None or answer not in keys:
            classes.append(None)
        else:
            classes.append(numbers.setdefault(merged[keys[answer]], len(numbers)))
    return classes


_WORDS = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mbox)\s*\{)?\s*\(?\s*([A-Za-z][A-Za-z ]*?)\s*\)?\s*\}?"
)


def _text_key(answer: str) -> str:
    """Return the normalised text, words and single letters without what may surround them."""
    text = normalise(answer)
    numeral = based_numeral(text)
    if numeral is not None:
        return f"{numeral[0]}_{{{numeral[1]}}}"
    words = _WORDS.fullmatch(text)
    if words is None or text.count("{") != text.count("}"):
        return text
    # A single letter keeps its case, for formulas; math-verify, asked later, knows no case.
    return words[1] if len(words[1]) == 1 else words[1].casefold()


def _merge(spelling: dict[Fraction | str, str]) -> dict[Fraction | str, Fraction | str]:
    """Return the root of each key under math-verify's equality."""
    texts = [key for key in spelling if isinstance(key, str)]
    if not texts or len(spelling) == 1:
        return {key: key for key in spelling}
    words = dict(zip(texts, signatures([spelling[key] for key in texts]), strict=True))
    buckets: dict[str, list[Fraction | str]] = defaultdict(list)
    for text in texts:
        word = words[text]
        if word is not None:
            buckets[_bucket(word)].append(text)
    for key in spelling:
        if isinstance(key, Fraction) and _number_word(key) in buckets:
            buckets[_number_word(key)].append(key)
    disputed = _in_several_bases(texts)
    pairs = [
        pair
        for bucket in buckets.values()
        for pair in itertools.combinations(bucket, 2)
        if any(isinstance(key, str) for key in pair) and disputed.isdisjoint(pair)
    ]
    verdicts = equal_pairs([(spelling[one], spelling[other]) for one, other in pairs])
    equal = [pair for pair, is_equal in zip(pairs, verdicts, strict=True) if is_equal]
    parent: dict[Fraction | str, Fraction | str] = {key: key for key in spelling}

    def root(key: Fraction | str) -> Fraction | str:
        while parent[key] != key:
            key = parent[key]
        return key

    for one, other in equal:
        if isinstance(one, str) and isinstance(other, str):
            parent[root(one)] = root(other)
    # Numbers come last, so that each text already stands for all it is equal to.
    joins: dict[Fraction | str, set[Fraction]] = defaultdict(set)
    for pair in equal:
        numbers = [key for key in pair if isinstance(key, Fraction)]
        for key in pair:
            if isinstance(key, str):
                joins[root(key)].update(numbers)
    for joined, found in joins.items():
        if found:
            parent[joined] = min(found)
    return {key: root(key) for key in spelling}


def _in_several_bases(texts: Sequence[str]) -> set[Fraction | str]:
    """Return the numerals whose digits stand there with another base too: no digits join them."""
    bases: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        numeral = based_numeral(text)
        if numeral is not None:
            bases[numeral[0]].add(text)
    return {text for same in bases.values() if len(same) > 1 for text in same}


def _bucket(word: str) -> str:
    """Return which answers are compared with each other: those of one value, of one kind."""
    # math-verify reads "(1,2)" as an interval and still calls it equal to {1,2}, and an interval
    # equal to an inequality: these are one kind.
    return "region" if word == "points" else word


def _number_word(number: Fraction) -> str:
    """Return the signature of a number, as `lm_eval_tasks.math_worker` spells it."""
    try:
        return f"value:{float(number):.5e},{0.0:.5e}"
    except OverflowError:
        return "region"


def vote(
    classes: Sequence[int | None],
    is_correct: Sequence[bool],
    weights: Sequence[float | None] | None = None,
) -> float:
    """Return the probability that the vote of these samples gives a right answer.

    Args:
        classes: answer class of each sample, None for no vote.
        is_correct: verdict on each sample.
        weights: of each sample, in [0, 1]; None in it: the sample does not vote. Without weights
            each vote counts one. If all weights are zero, all classes are tied.

    Returns:
        A number in [0, 1]; see this module's docstring for ties.

    Raises:
        ValueError: a weight is negative or not a number.
    """
    totals: dict[int, int] = defaultdict(int)
    voters: dict[int, list[bool]] = defaultdict(list)
    given = [1.0] * len(classes) if weights is None else weights
    scale = weight_scale(given)
    for number, correct, weight in zip(classes, is_correct, given, strict=True):
        if number is not None and weight is not None:
            totals[number] += whole_weight(weight, scale)
            voters[number].append(correct)
    if not totals:
        return 0.0
    highest = max(totals.values())
    shares = [
        sum(voters[number]) / len(voters[number])
        for number, total in totals.items()
        if total == highest
    ]
    return sum(shares) / len(shares)


def weight_scale(weights: Iterable[float | None]) -> float:
    """Return in how many parts a weight of 1 is counted where these are all weights of a problem.

    It is `WEIGHT_SCALE`, or so many powers of ten more that the largest weight has as many digits:
    products of many step scores are all small, and would round to 0.
    """
    largest = max((weight for weight in weights if weight is not None), default=0.0)
    if not 0 < largest < 0.1:
        return WEIGHT_SCALE
    digits = math.ceil(-math.log10(largest)) - 1
    return WEIGHT_SCALE * 10.0 ** min(digits, 290)  # a scale of 1e309 would be infinite


def whole_weight(weight: float, scale: float = WEIGHT_SCALE) -> int:
    """Return a weight as a whole number of parts.

    Args:
        weight: the score of a sample.
        scale: parts of a weight of 1, from `weight_scale`.

    Raises:
        ValueError: it is negative or not a finite number.
    """
    return round(_checked(weight) * scale)


def comparable(weight: float) -> float:
    """Return a weight without its last digits, which depend on the order of a product or sum.

    Raises:
        ValueError: it is negative or not a finite number.
    """
    return float(f"{_checked(weight):.12g}")


def _checked(weight: float) -> float:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"weight is {weight!r}; need a finite number, 0 or more")
    return weight
