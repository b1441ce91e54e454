r"""Find the final answer in a sampled text, and decide whether it equals the gold answer.

Extraction (version 2; the task version counts it) takes the first rule that finds something:

1. ``boxed``: the content of the last balanced ``\boxed{...}`` (or ``\fbox``) that has any;
2. ``hash``: the number after the last GSM8K-style ``#### ``;
3. ``phrase``: what follows the last "answer is", "answer:" or "answer =" on its line, or on the
   first line after it that says something, or in the displayed formula after it;
4. ``number``: the last number in the text.

Equality: equal strings after light normalisation, else exact rational numbers, else math-verify in
a worker process (`lm_eval_tasks.workers`). The gold answer always comes first, since math-verify's
comparison is not symmetric. Model text is never evaluated: math-verify's reader for plain
expressions (sympy's ``parse_expr``, which is ``eval``) is not used. What differs from math-verify
alone: rational numbers are compared exactly, so 0.333333 is not 1/3.
"""

import itertools
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from lm_eval_tasks.workers import WorkerPool

#: The last three are those of programs (`lm_eval_tasks.programs.extract`).
Source = Literal["boxed", "hash", "phrase", "number", "fence", "body", "code"]

#: The extraction rules in order, and their version. Part of every task's version: changing a rule
#: means a new number here and a new version in the tasks' YAML files.
EXTRACTION = "boxed-hash-phrase-number/2"

#: Characters at the end of a text that are searched; an answer further up is not a final answer.
MAX_TEXT_CHARS = 65_536
#: Longer answers are only compared as strings; the longest MATH-500 gold has 92 characters.
MAX_ANSWER_CHARS = 512
_MAX_CACHED_VERDICTS = 200_000


class Extracted(NamedTuple):
    """An answer and the rule that found it; both None when the text has no answer."""

    answer: str | None
    source: Source | None


# A backslash with the character after it is one token, so that the \{ and \} of a set do not count.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = r"[-+]?(?:\$\s*)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?(?:\$\s*)?\.\d+"
_LAST_NUMBER = re.compile(rf"(?<![\w.])(?:{_NUMBER})(?:\s*/\s*\d+)?")
# No two repeats that can take the same characters stand side by side, here and below: a text that
# almost matches would be tried in all its divisions, in quadratic time, outside of any limit.
_HASH = re.compile(
    rf"####[ \t]*((?:{_NUMBER})(?:/\d+)?)[ \t]*(?:%\.?[ \t]*|\.[ \t]*)?$", re.MULTILINE
)
_PHRASE = re.compile(r"\banswer\s*(?:is\b|are\b|=|:)[ \t]*:?[ \t]*", re.IGNORECASE)
_MATH_SEGMENT = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_LEADING_NUMBER = re.compile(
    rf"((?:{_NUMBER})(?:/\d+)?%?)(?=[.,;:!?]?$|[.,;:!?]?\s+(?!(?:and|or)\b)[A-Za-z(])"
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_DISPLAY = re.compile(r"\\\[(.+?)\\\]|\$\$(.+?)\$\$", re.DOTALL)
_ALIGNED = re.compile(
    r"\\begin\{((?:align|aligned|alignat|equation|gather|gathered|split|multline)\*?)\}"
    r"(.*?)\\end\{\1\}",
    re.DOTALL,
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}\n]*\}")
_CODE_FENCE = re.compile(r"[ \t]*(?:```|~~~)[\w+.-]*[ \t]*")
_SUBSTANCE = re.compile(r"[^\W_]")


def extract_answer(text: str) -> Extracted:
    """Return the final answer of a sampled text, by the rules in this module's docstring.

    The time is linear in the text, of which at most the last `MAX_TEXT_CHARS` characters count.
    """
    tail = text[-MAX_TEXT_CHARS:]
    boxed = _last_boxed(tail)
    if boxed:
        return Extracted(boxed, "boxed")
    for match in reversed(list(_HASH.finditer(tail))):
        return Extracted(match[1], "hash")
    phrase = _last_phrase(tail)
    if phrase:
        return Extracted(phrase, "phrase")
    for match in reversed(list(_LAST_NUMBER.finditer(tail))):
        return Extracted(match[0], "number")
    return Extracted(None, None)


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the balanced ``\boxed{}`` that opens last, in one pass.

    Boxes of nothing, or of nothing but such boxes, do not count: the prompt's own ``\boxed{}``,
    repeated after the answer, is none.
    """
    open_braces: list[int | None] = []  # where a box's content starts, None for a plain brace
    last: tuple[int, int] | None = None
    ink = before = 0  # the end of the last thing that is neither blank nor a brace; of the token
    for match in _BRACES.finditer(text):
        token = match[0]
        if text[before : match.start()].strip():
            ink = match.start()
        before = match.end()
        if len(token) == 2:
            ink = before
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and ink > start and (last is None or start > last[0]):
                last = (start, match.start())
        elif token.endswith("{") and len(token) > 2:
            open_braces.append(match.end())
    return text[slice(*last)].strip() if last is not None else None


def _last_phrase(text: str) -> str | None:
    """Return what follows the last "answer is", reduced to its leading value."""
    matches = list(_PHRASE.finditer(text))
    if not matches:
        return None
    rest = text[matches[-1].end() :].lstrip("\n*_ ")
    formula = _displayed(rest)
    if formula:
        return formula
    lines = rest.split("\n")
    if _SENTENCE_END.match(lines[0]):
        return None  # as in "I do not know what the answer is."
    line = next((line for line in lines if _says_something(line)), "")
    line = line[:MAX_ANSWER_CHARS].strip().strip("*_ ")
    number = _LEADING_NUMBER.match(line)
    if number:
        return number[1]
    segment = _MATH_SEGMENT.match(line)
    if segment:
        return next(group for group in segment.groups() if group is not None).strip() or None
    end = _SENTENCE_END.search(line)
    return (line[: end.start()] if end else line).strip("*_ ") or None


def _displayed(text: str) -> str | None:
    """Return the formula of several lines that a text begins with; of aligned lines the last."""
    block = _DISPLAY.match(text) or _ALIGNED.match(text)
    if block is None or "\n" not in block[0] or len(block[0]) > 2 * MAX_ANSWER_CHARS:
        return None
    formula = block[0] if block.re is _ALIGNED else (block[1] or block[2]).strip()
    aligned = _ALIGNED.fullmatch(formula)
    if aligned:
        lines = [line for line in aligned[2].split("\\\\") if _says_something(line)]
        formula = (lines or [""])[-1].rpartition("&=")[2].strip()
    return formula if _says_something(formula) else None


def _says_something(line: str) -> bool:
    """Return whether a line is more than what surrounds a formula or a block of code."""
    if _CODE_FENCE.fullmatch(line):
        return False
    return _SUBSTANCE.search(_ENVIRONMENT.sub("", line)) is not None


# Each pattern starts at a backslash that is not the second of a line break (two backslashes).
_DELIMITER = re.compile(r"(?<!\\)\\[()$]|\$")
_SPACING = re.compile(r"(?<!\\)\\[!,;:>]|(?<!\\)\\q?quad(?![a-zA-Z])|~")
_SIZING = re.compile(r"(?<!\\)\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])")
_DEGREE = re.compile(
    r"(?:\^ ?\{ ?(?:°|\\(?:circ|degree)(?![a-zA-Z])) ?\}"
    r"|(?:\^ ?)?(?:°|(?<!\\)\\degree(?![a-zA-Z])))(?P<letter> ?(?=[a-zA-Z]))?"
)
# Outside of brackets a blank after a comma tells a list of numbers from one number with thousands.
_LISTED = re.compile(
    r"(?P<open>\\\{|[(\[])|(?P<close>\\\}|[)\]])"
    r"|(?<=\d),(?:\s|(?<!\\)\\(?:[ ,;:>]|q?quad(?![a-zA-Z]))|~)+(?=\d{3}(?!\d))"
)
_LIST_BLANK = re.compile(r"(?<=,)\0(?=\d{3}(?!\d))")
_FREE_SPACE = re.compile(r"\s+(?=[^\w\s{}])|(?<=[^\w\s\\{}])\s+")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")


def normalise(answer: str) -> str:
    r"""Return a canonical spelling of a LaTeX answer without changing what it means.

    Removes math delimiters, currency signs, spacing and sizing commands, spaces that LaTeX ignores,
    and trailing punctuation; spells ``\dfrac`` and ``\tfrac`` as ``\frac`` and degrees as
    ``^\circ``. In a list of numbers (``100, 200``) the blank before three digits stays.
    """
    text = _DELIMITER.sub("", answer.replace("\u2212", "-"))
    text = _keep_lists(text)
    text = re.sub(r"(?<!\\)\\ ", " ", text)
    text = _SIZING.sub("", _SPACING.sub("", text))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = " ".join(text.split())
    text = _DEGREE.sub(lambda m: "^\\circ" + ("" if m["letter"] is None else " "), text)
    text = _LIST_BLANK.sub(" ", _FREE_SPACE.sub("", text))
    return text.rstrip(".,;: ")


def _keep_lists(text: str) -> str:
    """Put a NUL, which is no blank, for the blanks that must stay between the numbers of a list."""
    depth = 0

    def mark(match: re.Match[str]) -> str:
        nonlocal depth
        if match["open"]:
            depth += 1
        elif match["close"]:
            depth = max(depth - 1, 0)
        elif not depth:
            return ",\0"
        return match[0]

    return _LISTED.sub(mark, text)


_RATIONAL = re.compile(
    r"(?P<sign>[-+]?)(?:"
    r"\\frac\{(?P<over>[-+]?\d+)\}\{(?P<under>\d+)\}|"
    r"(?P<num>\d+)/(?P<den>\d+)|"
    r"(?P<decimal>\d+(?:\.\d*)?|\.\d+))"
)


def parse_number(answer: str) -> Fraction | None:
    r"""Return the value of a plain integer, decimal, ``a/b`` or ``\frac{a}{b}``, else None.

    Thousands separators, currency signs and trailing zeros do not matter. Exponents are not read,
    so a short text cannot name a number that fills the memory.
    """
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), normalise(answer))
    if len(text) > MAX_ANSWER_CHARS:
        return None
    match = _RATIONAL.fullmatch(text)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"] is not None:
        return sign * Fraction(match["decimal"])
    over, under = (match["over"], match["under"]) if match["over"] else (match["num"], match["den"])
    return sign * Fraction(int(over), int(under)) if int(under) else None


_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_OPERATOR = re.compile(r"[\\^_*!(){}]|/\s*\d")
_TOKEN = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")


def number_in_words(answer: str) -> Fraction | None:
    r"""Return the number of an answer in words and units ("x = 18", "18 dollars"), if it has one.

    Words and units may surround the number; an operator or a second number may not. What stands in
    ``\text{}`` is words, unless the number stands nowhere else.
    """
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), normalise(answer))
    text = text.replace("^\\circ", " ")
    for bare in (_TEXT_COMMAND.sub(" ", text), normalise(_TEXT_COMMAND.sub(r" \1 ", text))):
        value = bare.rpartition("=")[2]
        if len(value) > MAX_ANSWER_CHARS or _OPERATOR.search(value.replace("\\%", "")):
            return None
        tokens = _TOKEN.findall(value)
        if tokens:
            return Fraction(tokens[0]) if len(tokens) == 1 else None
    return None


# Beside numbers, words, commas and blanks: then only the numbers of a list count.
_NOT_PLAIN = re.compile(r"[^\w\s,.+-]|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])|_")


def _quantities(answer: str) -> list[Fraction]:
    r"""Return the numbers of a normalised answer two of which nothing but words separate.

    Of ``2\text{ hours and }30\text{ minutes}`` math-verify reads the 2 alone. An answer of one
    number, or with operators between its numbers, has none of these.
    """
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer)
    text = _TEXT_COMMAND.sub("\0", text.replace("\0", " "))
    numbers = list(_TOKEN.finditer(text))
    gaps = [text[a.end() : b.start()] for a, b in itertools.pairwise(numbers)]
    if not any(_is_words(gap) for gap in gaps):
        return []
    return [Fraction(number[0]) for number in numbers]


def _is_words(gap: str) -> bool:
    """Return whether words, at least one, and no sign of mathematics stand between two numbers."""
    words = re.sub(r"[A-Za-z]{2,}", "\0", gap)
    return "\0" in words and not words.strip("\0 ,")


def _counts_otherwise(gold: str, answer: str) -> bool:
    """Return whether one of two normalised answers has several quantities and the other has not.

    Where both have, and beside them words alone, the numbers must be the same ones.
    """
    expected, found = _quantities(gold), _quantities(answer)
    bare = [_TEXT_COMMAND.sub(" ", text).strip() for text in (gold, answer)]
    if expected and found:
        return not any(map(_NOT_PLAIN.search, bare)) and sorted(expected) != sorted(found)
    if expected:
        return parse_number(bare[1]) is not None
    if not found or "\\pm" in gold or "\\mp" in gold:
        return False
    return parse_number(bare[0]) is not None or len(_TOKEN.findall(bare[0])) == 1


# A numeral with its base: 52_8, 52_{8}, (52)_8, 52_{\text{eight}}.
_NUMERAL = re.compile(
    r"\(?(?P<digits>\d[\dA-F]*)\)?_"
    r"(?:(?P<one>\d)|(?P<brace>\{)? ?(?P<text>\\(?:text|mathrm) ?\{)? ?(?P<base>\d+|[a-z]+) ?"
    r"(?(text)\} ?)(?(brace)\}))"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}


def based_numeral(answer: str) -> tuple[str, int] | None:
    """Return digits and base of a numeral that names its base, else None."""
    match = _NUMERAL.fullmatch(normalise(answer))
    if match is None:
        return None
    name = match["one"] or match["base"]
    base = int(name) if name.isdecimal() and len(name) <= 2 else _BASES.get(name)
    return None if base is None else (match["digits"], base)


def equivalent(gold: str, answer: str) -> bool:
    """Return whether an extracted answer equals the gold answer; see this module's docstring.

    An empty answer equals nothing. A comparison that exceeds its time or memory counts as unequal.

    Raises:
        ModuleNotFoundError: math-verify is needed and not installed.
    """
    return equivalent_many(gold, [answer])[0]


def equivalent_many(gold: str, answers: Sequence[str]) -> list[bool]:
    """Return `equivalent` for several answers to one problem; the workers share them."""
    target = normalise(gold)
    verdicts = {answer: _cheap_verdict(target, normalise(answer)) for answer in answers}
    undecided = [answer for answer, verdict in verdicts.items() if verdict is None]
    verdicts.update(zip(undecided, _verifier.verify(target, undecided), strict=True))
    return [bool(verdicts[answer]) for answer in answers]


def same_number_many(gold: Fraction, answers: Sequence[str]) -> list[bool]:
    """Return for each answer whether it is the number ``gold``, written as a number or in words.

    Only an answer that is neither, such as ``2^{10}``, is left to math-verify.
    """
    verdicts: dict[str, bool] = {}
    undecided: list[str] = []
    for answer in dict.fromkeys(answers):
        number = parse_number(answer)
        number = number_in_words(answer) if number is None else number
        if number is None:
            undecided.append(answer)
        else:
            verdicts[answer] = number == gold
    verdicts.update(zip(undecided, equivalent_many(str(gold), undecided), strict=True))
    return [verdicts[answer] for answer in answers]


def _cheap_verdict(gold: str, answer: str) -> bool | None:
    """Decide without math-verify if possible; both sides are normalised."""
    if not answer or not gold:
        return False
    if gold == answer:
        return True
    if len(answer) > MAX_ANSWER_CHARS or len(gold) > MAX_ANSWER_CHARS:
        return False
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return _closer_verdict(gold, answer)


def _closer_verdict(gold: str, answer: str) -> bool | None:
    """Decide what math-verify reads too little of: bases, and quantities after the first one."""
    expected, found = based_numeral(gold), based_numeral(answer)
    if expected is not None and (found is not None or answer.isdecimal()):
        # Where the base is known, as the gold answer's is, digits alone say enough.
        return expected == (found or (answer, expected[1]))
    return False if _counts_otherwise(gold, answer) else None


def equal_pairs(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Return math-verify's verdict on pairs of answers, in either order, for voting.

    Args:
        pairs: answers as extracted; unlike in `equivalent_many` neither one is the gold answer, so
            a pair is equal when math-verify says so for one of its two orders.
    """
    texts = [(normalise(a), normalise(b)) for a, b in pairs]
    # Neither is the gold answer: what holds with one of them as gold decides.
    known = [(_closer_verdict(a, b), _closer_verdict(b, a)) for a, b in texts]
    asked = [text for text, verdicts in zip(texts, known, strict=True) if verdicts == (None, None)]
    forward = _verifier.verify_pairs(asked)
    backward = _verifier.verify_pairs([(b, a) for a, b in asked])
    found = iter(one or other for one, other in zip(forward, backward, strict=True))
    return [next(found) if v == (None, None) else True in v for v in known]


def signatures(answers: Sequence[str]) -> list[str | None]:
    """Return a word for each answer that answers of equal value share, None where none is found.

    It comes from `lm_eval_tasks.math_worker`; an answer longer than `MAX_ANSWER_CHARS` has none.
    """
    texts = [normalise(answer) for answer in answers]
    short = [text for text in dict.fromkeys(texts) if text and len(text) <= MAX_ANSWER_CHARS]
    found = dict(zip(short, _verifier.signatures(short), strict=True))
    return [found.get(text) for text in texts]


class _Verifier:
    """math-verify behind the worker pool and a cache of verdicts."""

    def __init__(self) -> None:
        self.pool: WorkerPool | None = None  # started at the first comparison that needs it
        self._verdicts: dict[tuple[str, str], bool] = {}
        self._signatures: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def verify(self, gold: str, answers: Sequence[str]) -> list[bool]:
        """Return math-verify's verdict on each answer; ``gold`` is normalised."""
        return self.verify_pairs([(gold, normalise(answer)) for answer in answers])

    def verify_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return math-verify's verdict on each normalised (gold, answer) pair."""
        with self._lock:
            if len(self._verdicts) + len(pairs) > _MAX_CACHED_VERDICTS:
                self._verdicts.clear()
            unknown = [pair for pair in dict.fromkeys(pairs) if pair not in self._verdicts]
            if unknown:
                self.pool = self.pool or WorkerPool()
                outcomes = self.pool.compare(unknown)
                for pair, outcome in zip(unknown, outcomes, strict=True):
                    self._verdicts[pair] = outcome == "equal"
            return [self._verdicts[pair] for pair in pairs]

    def signatures(self, texts: Sequence[str]) -> list[str | None]:
        """Return the signature of each normalised answer."""
        with self._lock:
            if len(self._signatures) + len(texts) > _MAX_CACHED_VERDICTS:
                self._signatures.clear()
            unknown = [text for text in texts if text not in self._signatures]
            if unknown:
                self.pool = self.pool or WorkerPool()
                found = self.pool.signatures(unknown)
                self._signatures.update(zip(unknown, found, strict=True))
            return [self._signatures[text] for text in texts]


_verifier = _Verifier()
