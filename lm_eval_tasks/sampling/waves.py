"""Which samples a run with early stops draws next: wave after wave, of the problems still open.

A wave gives a problem its next few samples (`lm_eval_tasks.stopping.StopRule.every`). When the last
of them has finished, a jury judges them and looks at the vote; if it is open, the next wave of this
problem is released at once. Problems do not wait for each other: a wave of all problems that had to
be complete before the next one began would empty the batch at every border. Of what is released,
the lowest sample index goes first, in the order that a run without early stops has.

Judging runs on a thread of its own beside the engine. Which samples are drawn does not depend on
it: a problem's decision at a border follows from its samples up to there.
"""

import heapq
import random
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Protocol

from lm_eval_tasks.sampling.backend import DrawRequest, SamplingSettings
from lm_eval_tasks.sampling.problems import Problem
from lm_eval_tasks.stopping import StopRule


class Jury(Protocol):
    """Judges samples and decides votes."""

    def keep(self, problem_id: str, index: int, text: str) -> None:
        """Take a finished sample, quickly."""

    def is_open(self, problem_id: str, num_drawn: int) -> bool:
        """Judge what was taken of a problem; return whether it needs more samples.

        It is called on another thread, while no sample of the problem is being drawn.

        Args:
            problem_id: whose stored samples are complete up to a border.
            num_drawn: their number.
        """


class Waves:
    """The waves of one session; use it in a ``with`` statement, which ends the judging."""

    def __init__(
        self,
        problems: Sequence[Problem],
        settings: SamplingSettings,
        rule: StopRule,
        cap: int,
        have: Mapping[str, Set[int]],
        jury: Jury,
    ) -> None:
        """Find the open problems of a store and release what their present waves lack.

        Args:
            problems: of this session.
            settings: of the run; they give each sample its seed.
            rule: of the run.
            cap: most samples of a problem.
            have: indices of the samples that are stored, as the session adds to them.
            jury: has judged what is stored.
        """
        self.num_problems = len(problems)
        self.num_open = 0
        self.bound = 0
        """Samples of these problems in the end if no open one is decided."""
        self.counts = {"grading_s": 0.0, "idle_s": 0.0, "unfilled_s": 0.0}
        """Seconds of judging; seconds in which nothing was under way because of it; seconds in
        which a place in the batch (of a server: in the queue) was free and no sample released."""
        self._problems = problems
        self._settings = settings
        self._rule = rule
        self._cap = cap
        self._have = have
        self._jury = jury
        self._places = {problem.problem_id: i for i, problem in enumerate(problems)}
        self._ranks: dict[int, dict[str, int]] = {}
        self._released: list[tuple[int, int, int]] = []  # a heap: index, rank, place
        self._missing: dict[str, int] = {}
        self._judging: dict[Future[tuple[bool, float]], tuple[str, int]] = {}
        self._failure: BaseException | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judging")
        for problem in problems:
            name = problem.problem_id
            indices = have.get(name, frozenset())
            border = rule.border(indices, cap)
            if rule.is_at_border(indices, cap):
                if not jury.is_open(name, len(indices)):
                    self.bound += len(indices)
                    continue
                border = rule.border({border}, cap)  # as if the next wave had begun
            self.num_open += 1
            self.bound += cap
            self._release(name, border)

    def __enter__(self) -> "Waves":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give up what is not judged yet; the next session judges it."""
        self._executor.shutdown(cancel_futures=True)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is released and nothing is being judged; samples may be under way."""
        return not self._released and not self._judging

    def next(self) -> DrawRequest | None:
        """Return the next sample to draw; None while none is released."""
        self._take_decisions()
        if not self._released:
            return None
        index, _, place = heapq.heappop(self._released)
        problem = self._problems[place]
        return DrawRequest(problem, index, self._settings.seed_of(problem.problem_id, index))

    def add(self, problem_id: str, index: int, text: str) -> None:
        """Take a sample that is stored."""
        self._jury.keep(problem_id, index, text)
        self._missing[problem_id] -= 1
        if not self._missing[problem_id]:
            num_drawn = len(self._have[problem_id])
            future = self._executor.submit(self._judge, problem_id, num_drawn)
            self._judging[future] = (problem_id, num_drawn)

    def wait(self) -> None:
        """Wait for a decision while nothing is under way.

        Raises:
            InputError: samples cannot be judged.
        """
        started = time.monotonic()
        wait(self._judging, return_when=FIRST_COMPLETED)
        self.counts["idle_s"] += time.monotonic() - started
        self._take_decisions()

    def facts(self) -> dict[str, Any]:
        """Return what sessions.jsonl says about the waves."""
        rounded = {name: round(seconds, 6) for name, seconds in self.counts.items()}
        return {"open_problems": self.num_open} | rounded

    def _judge(self, problem_id: str, num_drawn: int) -> tuple[bool, float]:
        if self._failure is not None:
            raise self._failure  # what stopped the judging stops the session, with one message
        started = time.monotonic()
        try:
            is_open = self._jury.is_open(problem_id, num_drawn)
        except BaseException as error:
            self._failure = error
            raise
        return is_open, time.monotonic() - started

    def _take_decisions(self) -> None:
        for future in [future for future in self._judging if future.done()]:
            name, num_drawn = self._judging.pop(future)
            is_open, seconds = future.result()
            self.counts["grading_s"] += seconds
            if is_open:
                self._release(name, self._rule.border({num_drawn}, self._cap))
            else:
                self.num_open -= 1
                self.bound -= self._cap - num_drawn

    def _release(self, name: str, border: int) -> None:
        have = self._have.get(name, frozenset())
        missing = [index for index in range(border) if index not in have]
        self._missing[name] = len(missing)
        for index in missing:
            entry = (index, self._rank(name, index), self._places[name])
            heapq.heappush(self._released, entry)

    def _rank(self, name: str, index: int) -> int:
        """Return the problem's place in the order of a round."""
        if index not in self._ranks:
            order = shuffled(self._problems, self._settings.seed, index)
            self._ranks[index] = {problem.problem_id: i for i, problem in enumerate(order)}
        return self._ranks[index][name]


def shuffled(problems: Sequence[Problem], seed: int | None, round_index: int) -> list[Problem]:
    """Return the problems in the order of a round: that of one sample index of all of them."""
    order = list(problems)
    random.Random(f"{seed}/{round_index}").shuffle(order)
    return order
