"""What a problem asks of a program: the gold answer of a programming task, as JSON text.

HumanEval's form (a prompt that ends in the signature and docstring of a function, tests in a
``check(candidate)``) and MBPP's (assertions that name the function) both fit.
"""

import ast
import json
import re
from dataclasses import asdict, dataclass

from lm_eval_tasks.programs.sandbox import Job


@dataclass(frozen=True)
class Checks:
    """The tests of a problem, and the code that belongs to it."""

    tests: str
    """Code with assertions."""
    entry_point: str | None = None
    """Function that the tests' ``check`` is called with; None: the tests name it."""
    prompt: str = ""
    """Code that comes before the program and may be continued by it."""
    setup: str = ""
    """Code that comes before the tests and may use the program's names."""

    def to_gold(self) -> str:
        """Return the gold answer that `from_gold` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_gold(cls, gold: str) -> "Checks":
        """Read a gold answer.

        Raises:
            ValueError: it is none; says what is wrong.
        """
        try:
            found = cls(**json.loads(gold))
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"the gold answer {gold[:40]!r} does not describe tests") from None
        fault = found.fault()
        if fault:
            raise ValueError(fault)
        return found

    def fault(self) -> str | None:
        """Return what is wrong with the tests, or None."""
        for name, text in asdict(self).items():
            if name == "entry_point":
                if text is not None and not (isinstance(text, str) and text.isidentifier()):
                    return f"entry_point is {text!r}; need the name of a function"
                continue
            if not isinstance(text, str):
                return f"{name} is of type {type(text).__name__}; need text"
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                return f"{name} is not Python: {error}"
            if name == "tests":
                nodes = list(ast.walk(tree))
                if not any(isinstance(node, ast.Assert) for node in nodes):
                    return "the tests assert nothing"
                defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
                if self.entry_point is not None and "check" not in defined:
                    return "the tests define no function check(candidate)"
        return None

    def job(self, code: str) -> Job:
        """Return what to run for an extracted program.

        A program that defines the asked function comes after the prompt, whose imports and helpers
        it may use, and replaces the prompt's function; any other one continues the prompt.
        """
        is_whole = self.entry_point is None or _defines(code, self.entry_point)
        texts = (self.prompt, code) if is_whole else (self.prompt + code,)
        return Job(texts, self.prompt, self.setup, self.tests, self.entry_point)


def _defines(code: str, name: str) -> bool:
    pattern = rf"^(?:(?:async[ \t]+)?def[ \t]+{name}\b|{name}[ \t]*[=:])"
    return re.search(pattern, code, re.MULTILINE) is not None
