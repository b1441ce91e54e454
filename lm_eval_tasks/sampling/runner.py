"""Draw the missing samples of a run and store each the moment it finishes.

Two regimes, never mixed in one run (docs/evaluation.md):

saturated: all problems compete for the server. Sample-major order, sample 0 of every problem, then
    sample 1 of every problem, the problems of each round shuffled with a fixed seed; a bounded
    number is in flight, so that neither requests nor texts pile up in memory.
latency: one problem owns the server. All its samples are submitted at once; the next problem
    starts when the last of them has finished.

With early stops (saturated only) `lm_eval_tasks.sampling.waves` says what is drawn next.
"""

import io
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import redirect_stderr, suppress
from typing import Any, TextIO

from lm_eval_tasks.errors import InputError, stop
from lm_eval_tasks.samples import SampleRecord, SampleStore
from lm_eval_tasks.sampling.backend import (
    Backend,
    BackendError,
    Drawn,
    DrawRequest,
    SamplingSettings,
)
from lm_eval_tasks.sampling.problems import Problem
from lm_eval_tasks.sampling.progress import Progress
from lm_eval_tasks.sampling.waves import Waves, shuffled

REGIMES = ("saturated", "latency")
_FACTS_INTERVAL_S = 60.0


def missing_samples(
    problems: Sequence[Problem],
    num_samples: int,
    have: Mapping[str, Set[int]],
    settings: SamplingSettings,
    regime: str,
) -> Iterator[DrawRequest]:
    """Yield the requests that are still to be drawn, in the order of their submission.

    Args:
        problems: in data set order.
        num_samples: N, of every problem.
        have: indices of the samples that exist; read as the iteration proceeds.
        settings: of the run; they give each sample its seed, or none.
        regime: see the module.
    """
    if regime == "latency":
        order = ((problem, index) for problem in problems for index in range(num_samples))
    else:
        order = (
            (problem, index)
            for index in range(num_samples)
            for problem in shuffled(problems, settings.seed, index)
        )
    for problem, index in order:
        if index not in have.get(problem.problem_id, ()):
            yield DrawRequest(problem, index, settings.seed_of(problem.problem_id, index))


def draw_session(
    store: SampleStore,
    backend: Backend,
    problems: Sequence[Problem],
    settings: SamplingSettings,
    *,
    num_samples: int,
    regime: str,
    session_facts: Mapping[str, Any],
    stream: TextIO,
    waves: Waves | None = None,
) -> dict[str, Any]:
    """Draw what is missing, in one session with its own clock.

    Args:
        store: open for writing.
        backend: loaded; prepared and warmed up here.
        problems: of this session.
        settings: of every sample.
        num_samples: N, of every problem; with early stops the most of a problem.
        regime: "saturated" or "latency".
        session_facts: what the caller knows about this start: versions, hardware, ``startup_s``.
        stream: where the progress line goes.
        waves: of a run with early stops, over the same store and problems.

    Returns:
        Facts about the session, as they stand in sessions.jsonl.

    Raises:
        InputError: a prompt does not fit, the engine gave up, or the disk is full; every sample
            that finished before is stored.
    """
    assert regime in REGIMES
    assert waves is None or regime == "saturated"
    have = store.have()
    if waves is None:
        total, drawn = len(problems) * num_samples, range(num_samples)
        done = sum(len([i for i in have.get(p.problem_id, ()) if i in drawn]) for p in problems)
    else:
        total = waves.bound
        done = sum(len(have.get(p.problem_id, ())) for p in problems)
    session = max((row["session"] for row in store.sessions()), default=-1) + 1
    backend.prepare(problems, settings)
    started = time.monotonic()
    try:
        backend.warm_up(num_samples if regime == "latency" else total - done)
    except BackendError as error:
        stop(f"{error}; nothing was drawn, {done} of {total} samples are stored")
    facts: dict[str, Any] = {"session": session} | dict(session_facts)
    facts["warmup_s"] = time.monotonic() - started
    facts["num_samples"] = num_samples
    if regime == "latency":
        # Their samples run at another concurrency than those of whole problems.
        facts["resumed_problems"] = [
            problem.problem_id
            for problem in problems
            if 0 < len(have.get(problem.problem_id, ())) < num_samples
        ]
    store.append_session(facts)
    drawing = _Session(store, backend, session, Progress(total, done, stream), waves)
    requests = missing_samples(problems, num_samples, have, settings, regime)
    return facts | drawing.run(requests, is_latency=regime == "latency")


class _Session:
    """The loop of one session, and what it counts."""

    def __init__(
        self,
        store: SampleStore,
        backend: Backend,
        session: int,
        progress: Progress,
        waves: Waves | None = None,
    ) -> None:
        self.store = store
        self.backend = backend
        self.session = session
        self.progress = progress
        self.waves = waves
        self.in_flight = 0
        self.counts = {"drawn": 0, "tokens": 0, "prompt_tokens": 0}
        self.cached_tokens: int | None = 0
        self._origin = 0.0
        self._facts_at = 0.0

    def run(self, requests: Iterator[DrawRequest], is_latency: bool) -> dict[str, Any]:
        """Draw all requests, or with early stops the waves; return the facts of the end."""
        self._show_open()
        self.progress.start()
        self._origin = self._facts_at = time.monotonic()
        try:
            if self.waves is not None:
                self._in_waves(self.waves)
            elif is_latency:
                self._one_problem_at_a_time(requests)
            else:
                self._saturated(requests)
        except InputError:
            # Samples cannot be judged, or the disk is full: then the facts may not fit either, and
            # that was said.
            with suppress(InputError), redirect_stderr(io.StringIO()):
                self._end()
            raise
        except (BackendError, KeyboardInterrupt) as error:
            # These facts belong to the samples stored so far.
            self._end()
            if isinstance(error, KeyboardInterrupt):
                raise
            stop(
                f"{error}; {self.progress.samples} are stored, the same command goes on from there"
            )
        return self._end()

    def _end(self) -> dict[str, Any]:
        self.progress.end()
        return self._write_facts()

    def _saturated(self, requests: Iterator[DrawRequest]) -> None:
        is_exhausted = False
        while self.in_flight or not is_exhausted:
            while self.in_flight < self.backend.max_in_flight and not is_exhausted:
                request = next(requests, None)
                if request is None:
                    is_exhausted = True
                else:
                    self._submit(request)
            if self.in_flight:
                self._collect()

    def _in_waves(self, waves: Waves) -> None:
        while self.in_flight or not waves.is_finished:
            while self.in_flight < self.backend.max_in_flight:
                request = waves.next()
                if request is None:
                    break
                self._submit(request)
            if not self.in_flight:
                waves.wait()
                self._show_open()
                continue
            is_full, started = self.in_flight >= self.backend.num_places, time.monotonic()
            self._collect()
            if not is_full:
                waves.counts["unfilled_s"] += time.monotonic() - started

    def _show_open(self) -> None:
        if self.waves is not None:
            self.progress.bound(self.waves.bound, self.waves.num_open, self.waves.num_problems)

    def _one_problem_at_a_time(self, requests: Iterator[DrawRequest]) -> None:
        waiting = next(requests, None)
        while waiting is not None:
            problem = waiting.problem
            while waiting is not None and waiting.problem is problem:
                self._submit(waiting)
                waiting = next(requests, None)
            while self.in_flight:
                self._collect()

    def _submit(self, request: DrawRequest) -> None:
        self.backend.submit(request)
        self.in_flight += 1

    def _collect(self) -> None:
        """Store what has finished."""
        for drawn in self.backend.wait():
            self.in_flight -= 1
            self.store.append(self._record(drawn))
            self.counts["drawn"] += 1
            self.counts["tokens"] += drawn.num_tokens
            self.counts["prompt_tokens"] += drawn.num_prompt_tokens
            if drawn.num_cached_tokens is None:
                self.cached_tokens = None
            elif self.cached_tokens is not None:
                self.cached_tokens += drawn.num_cached_tokens
            self.progress.add(drawn.num_tokens)
            if self.waves is not None:
                request = drawn.request
                self.waves.add(request.problem.problem_id, request.sample_index, drawn.text)
        self._show_open()
        self.progress.show()
        if time.monotonic() - self._facts_at >= _FACTS_INTERVAL_S:
            self._write_facts()  # a killed session shall not lose them all

    def _record(self, drawn: Drawn) -> SampleRecord:
        first = drawn.first_token_at
        return SampleRecord(
            problem_id=drawn.request.problem.problem_id,
            sample_index=drawn.request.sample_index,
            seed=drawn.request.seed,
            text=drawn.text,
            num_tokens=drawn.num_tokens,
            num_prompt_tokens=drawn.num_prompt_tokens,
            num_cached_tokens=drawn.num_cached_tokens,
            finish_reason=drawn.finish_reason,
            session=self.session,
            submit_s=self._seconds(drawn.submitted_at),
            first_token_s=None if first is None else self._seconds(first),
            finish_s=self._seconds(drawn.finished_at),
            config_hash=self.store.config_hash,
        )

    def _seconds(self, at: float) -> float:
        return round(at - self._origin, 6)

    def _write_facts(self) -> dict[str, Any]:
        self._facts_at = time.monotonic()
        facts: dict[str, Any] = {"session": self.session, "wall_s": self._seconds(self._facts_at)}
        facts |= self.counts | {"cached_tokens": self.cached_tokens} | self.backend.facts()
        if self.waves is not None:
            facts |= self.waves.facts()
        self.store.append_session(facts)
        return facts
