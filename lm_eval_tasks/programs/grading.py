"""Judge programs and group them for votes; `lm_eval_tasks.scoring` builds its grading from these.

A program is right when it passes all tests of its problem. For votes, two programs are in one class
when they *behave* alike: given the tests' inputs they answer with the same values (floats to nine
digits) or the same kinds of exceptions, as in MBR-EXEC (Shi et al. 2022, arXiv 2204.11454). The
expected values take no part in that. A program that never gives a value, because it does not
compile or does not come back, agrees with no other text.
"""

import hashlib
import threading
from collections.abc import Sequence

from lm_eval_tasks.errors import stop
from lm_eval_tasks.programs.checks import Checks
from lm_eval_tasks.programs.sandbox import FaultyTestsError, Outcome, run_programs


class _Runs:
    """The outcomes of one problem's programs, so that grouping does not run them again."""

    def __init__(self) -> None:
        self._problem = ""
        self._outcomes: dict[str, Outcome] = {}
        self._lock = threading.Lock()

    def outcomes(self, gold: str, programs: Sequence[str]) -> list[Outcome]:
        """Return what each program does under a problem's tests."""
        checks = Checks.from_gold(gold)
        problem = hashlib.blake2b(gold.encode(errors="surrogatepass")).hexdigest()
        with self._lock:
            if problem != self._problem:
                self._problem, self._outcomes = problem, {}
            new = [code for code in dict.fromkeys(programs) if code not in self._outcomes]
            try:
                found = run_programs([checks.job(code) for code in new])
            except FaultyTestsError as error:
                stop(f"a problem cannot be tested: {error}; its tests begin {checks.tests[:60]!r}")
            self._outcomes.update(zip(new, found, strict=True))
            return [self._outcomes[code] for code in programs]


_runs = _Runs()


def grade_programs(gold: str, programs: Sequence[str]) -> list[bool]:
    """Return whether each program passes the tests.

    Args:
        gold: `Checks` as JSON.
        programs: extracted programs.

    Raises:
        ValueError: the gold answer describes no tests.
        InputError: programs cannot be run safely here, or the tests want what cannot be done.
    """
    return [outcome.outcome == "passed" for outcome in _runs.outcomes(gold, programs)]


def group_programs(gold: str, programs: Sequence[str | None]) -> list[int | None]:
    """Return the class of each program; see this module's docstring.

    Args:
        gold: `Checks` as JSON, for the inputs in it.
        programs: one per sample; None for a sample without a program.

    Returns:
        Class numbers from 0 in the order of first appearance; None where there is no program.
    """
    codes = [code for code in dict.fromkeys(programs) if code is not None]
    keys = {
        code: outcome.behaviour or f"no value:{code}"
        for code, outcome in zip(codes, _runs.outcomes(gold, codes), strict=True)
    }
    numbers: dict[str, int] = {}
    return [
        None if code is None else numbers.setdefault(keys[code], len(numbers)) for code in programs
    ]
