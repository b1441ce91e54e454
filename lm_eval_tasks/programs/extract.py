"""Find the program in a sampled text.

Extraction (version 2; part of the version of every verdict) takes the first rule that finds
something:

1. ``fence``: the last Markdown block marked as Python, else the last block without a mark; a block
   that defines a function or class goes before those that only use it. The fence's indentation is
   taken off its lines. A block that the token limit cut off goes to the end of the text. Other
   languages' blocks do not count.
2. ``body``: a text that begins with an indented line continues the prompt, as HumanEval asks of
   models without chat: all lines up to the first one that is not indented.
3. ``code``: from the first line that begins a program (``def``, ``class``, ``import``, ``from``,
   ``async def`` or a decorator) to the end.

A text without any of these has no answer. Whether the result is a program at all is for Python to
say, in the sandbox.
"""

import re

from lm_eval_tasks.answers import Extracted, Source

#: The rules in order, and their version.
EXTRACTION = "fence-body-code/2"

#: Longer programs count as none.
MAX_PROGRAM_CHARS = 65_536

# Whether the rest of the line fits is asked afterwards: a condition on it in the pattern would be
# tried for every length of the mark, the spaces and the language, in quadratic time.
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<mark>```+|~~~+)[ \t]*(?P<language>[\w+.-]*)(?P<rest>[^\n]*)",
    re.MULTILINE,
)
_PYTHON = frozenset({"python", "python3", "py", "py3"})
_DEFINITION = re.compile(
    r"^(?:(?:async[ \t]+)?def[ \t]|class[ \t]|\w+[ \t]*(?::[^=\n]*)?=[ \t]*lambda\b)", re.MULTILINE
)
_BEGINNING = re.compile(
    r"^(?:(?:async[ \t]+)?def[ \t]+\w+[ \t]*\(|class[ \t]+\w+[ \t]*[(:]|@\w"
    r"|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b)",
    re.MULTILINE,
)


def extract_program(text: str) -> Extracted:
    """Return the program of a sampled text, by the rules in this module's docstring.

    The time is linear in the text, which is read to its beginning: the block that counts may be
    followed by any amount of talk. What is found has at most `MAX_PROGRAM_CHARS` characters.
    """
    rules: tuple[tuple[Source, str | None], ...] = (
        ("fence", _last_fence(text)),
        ("body", _body(text)),
        ("code", _code(text)),
    )
    for source, code in rules:
        if code is not None and code.strip():
            found = code.rstrip() + "\n"
            if len(found) <= MAX_PROGRAM_CHARS:
                return Extracted(found, source)
            break
    return Extracted(None, None)


def _last_fence(text: str) -> str | None:
    """Return the content of the last block in Python, else of the last one without a language.

    Of either kind one that defines something comes first: what follows a solution is often a block
    that shows how it is called.
    """
    best: dict[tuple[bool, bool], str] = {}
    opened: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if "`" in match["rest"]:
            continue  # code within a line
        if opened is None:
            opened = match
        elif match["mark"].startswith(opened["mark"]) and not match["language"]:
            _keep(best, opened, text[opened.end() + 1 : match.start()])
            opened = None
    if opened is not None:
        _keep(best, opened, text[opened.end() + 1 :])
    return best[max(best)] if best else None


def _keep(best: dict[tuple[bool, bool], str], opened: re.Match[str], content: str) -> None:
    """Keep a block by whether it is marked as Python, and whether it defines something."""
    language = opened["language"].lower()
    if (language in _PYTHON or not language) and content.strip():
        if opened["indent"]:  # as in an item of a list
            content = re.sub(rf"(?m)^[ \t]{{1,{len(opened['indent'])}}}", "", content)
        best[language in _PYTHON, _DEFINITION.search(content) is not None] = content


def _body(text: str) -> str | None:
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if not first[:1].isspace():
        return None
    kept = []
    for line in lines:
        if line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return "\n".join(kept)


def _code(text: str) -> str | None:
    beginning = _BEGINNING.search(text)
    return None if beginning is None else text[beginning.start() :]
