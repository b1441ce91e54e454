"""Child process of `lm_eval_tasks.workers`: compares or describes answers, one job per input line.

Started by path as a script, so that it needs nothing of its parent but the interpreter. Protocol:
JSON ``[gold, answer]`` or ``[answer]`` on stdin, one word on stdout: ``ready`` once, then for a
pair ``equal`` or ``different``, for a single answer its `signature`, or ``error``. It holds three
bounds on its own: end of stdin ends it; processor time and wall-clock time are limited, even inside
C code; the address space is limited. It needs a POSIX system, as vLLM does.
"""

import cmath
import faulthandler
import importlib
import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any


class _Mathematics:
    """math-verify's reading and comparison of LaTeX answers, and sympy's numeric evaluation.

    Only the LaTeX reader is used. math-verify's reader for plain expressions hands model text to
    sympy's ``parse_expr``, which is ``eval``.
    """

    def __init__(self) -> None:
        self.math_verify = importlib.import_module("math_verify")
        self.sympy = importlib.import_module("sympy")
        self.config = [self.math_verify.LatexExtractionConfig(boxed_match_priority=0)]
        self.read = lru_cache(maxsize=1024)(self._read)  # an answer is compared with many others

    def _read(self, answer: str) -> list[Any]:
        # No timeout inside: math-verify's is SIGALRM, which cannot interrupt C code.
        result: list[Any] = self.math_verify.parse(
            "\\boxed{" + answer + "}", self.config, parsing_timeout=None
        )
        return result

    def compare(self, gold: str, answer: str) -> str:
        """Return "equal" or "different"; the gold answer comes first."""
        is_equal = self.math_verify.verify(self.read(gold), self.read(answer), timeout_seconds=None)
        return "equal" if is_equal else "different"

    def signature(self, answer: str) -> str:
        """Return a word that equal answers share, so that most unequal pairs need no comparison.

        ``value:`` with six digits for a number, or for an expression at one fixed point; ``points``
        for sets, tuples, intervals and matrices; ``region`` for what has no such value;
        ``text`` for what math-verify cannot read as mathematics.
        """
        result = self.read(answer)
        value = result[0] if result else None
        sympy = self.sympy
        if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
            value = value.rhs
        if isinstance(value, sympy.FiniteSet) and len(value) == 1:
            (value,) = value
        is_word = isinstance(value, sympy.Symbol) and len(value.name) > 1
        if is_word or not isinstance(value, sympy.Basic | sympy.MatrixBase):
            return "text"
        if not isinstance(value, sympy.Expr):
            is_list = isinstance(
                value, (sympy.FiniteSet, sympy.Tuple, sympy.Interval, sympy.MatrixBase)
            )
            return "points" if is_list else "region"
        symbols = sorted(value.free_symbols, key=lambda symbol: symbol.name)
        point = {symbol: _POINT + _STEP * i for i, symbol in enumerate(symbols)}
        number = complex(value.evalf(15, subs=point))
        if not cmath.isfinite(number):
            return "region"
        parts = (_shorten(part, abs(number)) for part in (number.real, number.imag))
        return "value:" + ",".join(f"{part:.5e}" for part in parts)


# Where expressions in letters are evaluated; any point without special properties would do.
_POINT, _STEP = 0.7390851332151607, 0.3183098861837907


def _shorten(part: float, size: float) -> float:
    """Drop a part that is nothing but rounding error beside the other, and the sign of zero."""
    return 0.0 if part == 0 or abs(part) < 1e-9 * size else part


def main() -> int:
    """Serve jobs until stdin ends.

    Arguments: limits of a job in s of processor time and of wall-clock time, memory in bytes.
    """
    cpu_limit_s, time_limit_s, memory_bytes = *map(float, sys.argv[1:3]), int(sys.argv[3])
    # stdout carries the protocol; whatever a library prints must not land in it.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    logging.disable(logging.CRITICAL)
    try:
        mathematics = _Mathematics()
    except ImportError as error:
        channel.write(f"failed {error}\n")
        return 1
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel.write("ready\n")
    for line in sys.stdin:
        texts = json.loads(line)
        faulthandler.dump_traceback_later(time_limit_s, exit=True, file=null)
        # Nobody handles SIGPROF, so it ends the process, even inside C code.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        try:
            is_pair = len(texts) == 2
            word = mathematics.compare(*texts) if is_pair else mathematics.signature(*texts)
        except Exception:  # whatever the libraries raise on model text, the answer is not equal
            word = "error"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
        channel.write(word + "\n")
    return 0


if __name__ == "__main__":
    # Python puts the script's own folder first on the path; the package's modules must not be
    # importable from there under short names.
    if sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
        del sys.path[0]
    sys.exit(main())
