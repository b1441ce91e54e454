"""Child process of `lm_eval_tasks.workers`: compares one (gold, answer) pair per input line.

Started by path as a script, so that it needs nothing of its parent but the interpreter. Protocol:
JSON ``[gold, answer]`` on stdin, one word on stdout: ``ready`` once, then ``equal``, ``different``
or ``error`` per line. It holds three bounds on its own, in case the parent is gone and cannot kill
it: end of stdin ends it, a watchdog ends it after the time limit even inside C code, and the
address space is limited.
"""

import faulthandler
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path


def _comparer() -> Callable[[str, str], bool]:
    """Return math-verify's comparison of two LaTeX answers, the gold one first.

    Only the LaTeX reader is used. math-verify's reader for plain expressions hands model text to
    sympy's ``parse_expr``, which is ``eval``.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(answer: str) -> list[object]:
        # No timeout inside: math-verify's is SIGALRM, which cannot interrupt C code.
        result: list[object] = parse("\\boxed{" + answer + "}", config, parsing_timeout=None)
        return result

    def compare(gold: str, answer: str) -> bool:
        return bool(verify(read(gold), read(answer), timeout_seconds=None))

    return compare


def main() -> int:
    """Serve comparisons until stdin ends; arguments: time limit in s, memory limit in bytes."""
    time_limit_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    # stdout carries the protocol; whatever a library prints must not land in it.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    logging.disable(logging.CRITICAL)
    try:
        compare = _comparer()
    except ImportError as error:
        channel.write(f"failed {error}\n")
        return 1
    try:
        import resource
    except ImportError:  # not on Windows; the parent's kill deadline still bounds the work
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel.write("ready\n")
    for line in sys.stdin:
        gold, answer = json.loads(line)
        faulthandler.dump_traceback_later(time_limit_s, exit=True, file=null)
        try:
            verdict = "equal" if compare(gold, answer) else "different"
        except Exception:  # whatever the libraries raise on model text, the answer is not equal
            verdict = "error"
        finally:
            faulthandler.cancel_dump_traceback_later()
        channel.write(verdict + "\n")
    return 0


if __name__ == "__main__":
    # Python puts the script's own folder first on the path; the package's modules must not be
    # importable from there under short names.
    if sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
        del sys.path[0]
    sys.exit(main())
