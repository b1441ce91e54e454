"""A backend that answers from the seed alone, and a program that draws with it (to be killed)."""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from lm_eval_tasks.samples import HASHED_FIELDS, SampleStore
from lm_eval_tasks.sampling.backend import BackendError, Drawn, DrawRequest, SamplingSettings
from lm_eval_tasks.sampling.problems import Problem
from lm_eval_tasks.sampling.runner import draw_session

SETTINGS = SamplingSettings(temperature=0.7, top_p=1.0, max_tokens=50, seed=1234)


def problems(count: int) -> list[Problem]:
    return [
        Problem(f"t/{i}", f"Question {i}?", str(i), f"<user>Question {i}?") for i in range(count)
    ]


class ScriptedBackend:
    """Finishes a few of the waiting requests per call, in a random order."""

    def __init__(
        self, max_in_flight: int = 4, delay_s: float = 0.0, fail_after: int | None = None
    ) -> None:
        self.max_in_flight = max_in_flight
        self.num_places = max_in_flight
        self.delay_s = delay_s
        self.fail_after = fail_after
        self.submitted: list[tuple[str, int]] = []
        self.waiting: list[tuple[DrawRequest, float]] = []
        self.peak = 0
        self.num_finished = 0
        self.warmed_up: list[int] = []
        self.is_closed = False
        self._random = random.Random(0)

    def prepare(self, problems: Sequence[Problem], settings: SamplingSettings) -> None:
        self.settings = settings

    def warm_up(self, num_samples: int) -> None:
        self.warmed_up.append(num_samples)

    def submit(self, request: DrawRequest) -> None:
        self.submitted.append((request.problem.problem_id, request.sample_index))
        self.waiting.append((request, time.monotonic()))
        self.peak = max(self.peak, len(self.waiting))

    def wait(self) -> list[Drawn]:
        if self.fail_after is not None and self.num_finished >= self.fail_after:
            raise BackendError("the script says so")
        time.sleep(self.delay_s)
        self._random.shuffle(self.waiting)
        count = self._random.randint(0, 2)
        finished, self.waiting = self.waiting[:count], self.waiting[count:]
        self.num_finished += len(finished)
        return [self._drawn(*each) for each in finished]

    @staticmethod
    def _drawn(request: DrawRequest, submitted_at: float) -> Drawn:
        now = time.monotonic()
        seed = random.getrandbits(62) if request.seed is None else request.seed
        return Drawn(
            request=request,
            text=f"{request.problem.prompt} -> {seed}",
            num_tokens=seed % 50,
            num_prompt_tokens=7,
            num_cached_tokens=3,
            finish_reason="stop" if seed % 3 else "length",
            submitted_at=submitted_at,
            first_token_at=(submitted_at + now) / 2,
            finished_at=now,
        )

    def facts(self) -> dict[str, Any]:
        return {"mean_running": 2.5}

    def close(self) -> None:
        self.is_closed = True


def draw(
    folder: Path,
    backend: ScriptedBackend,
    num_problems: int = 5,
    num_samples: int = 4,
    regime: str = "saturated",
    stream: TextIO = sys.stderr,
    settings: SamplingSettings = SETTINGS,
) -> dict[str, Any]:
    """Draw what is missing in a folder, as the sample command does."""
    config = {name: f"some {name}" for name in HASHED_FIELDS} | {
        "regime": regime,
        "num_samples": num_samples,
        "limit": num_problems,
    }
    asked = problems(num_problems)
    with SampleStore(folder).open(config, [problem.record() for problem in asked]) as store:
        return draw_session(
            store,
            backend,
            asked,
            settings,
            num_samples=num_samples,
            regime=regime,
            session_facts={"startup_s": 0.0},
            stream=stream,
        )


if __name__ == "__main__":
    draw(
        Path(sys.argv[1]),
        ScriptedBackend(delay_s=0.002),
        num_problems=int(sys.argv[2]),
        num_samples=int(sys.argv[3]),
        regime=sys.argv[4],
        settings=replace(SETTINGS, seed=None) if "unseeded" in sys.argv else SETTINGS,
    )
