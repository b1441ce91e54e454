"""Runs with early stops on the scripted engine, and a program that draws one (to be killed).

Problem i asks for the number i. Its samples answer i with a chance that depends on i, else another
number; which one follows from the seed alone.
"""

import random
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from run_folders import CONFIG
from scripted_backend import SETTINGS, ScriptedBackend, problems

from lm_eval_tasks.jury import VoteJury
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.sampling.backend import Drawn, DrawRequest
from lm_eval_tasks.sampling.runner import draw_session
from lm_eval_tasks.sampling.waves import Waves
from lm_eval_tasks.stopping import StopRule

SKILLS = (1.0, 0.9, 0.75, 0.5, 0.3)


def answer_of(problem: int, seed: int | None) -> int | None:
    """What a sample answers; problem 3 is silent now and then."""
    chance = random.Random(seed)
    if problem % len(SKILLS) == 3 and chance.random() < 0.2:
        return None
    if chance.random() < SKILLS[problem % len(SKILLS)]:
        return problem
    return 1000 + chance.randrange(2 if problem % len(SKILLS) == 3 else 4)


class AnsweringBackend(ScriptedBackend):
    """Answers by the script; those of ``slow`` problems come when all others are finished."""

    def __init__(self, *arguments: Any, slow: frozenset[str] = frozenset(), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.slow = slow
        self.patience = 100

    def wait(self) -> list[Drawn]:
        held = [one for one in self.waiting if one[0].problem.problem_id in self.slow]
        if len(held) == len(self.waiting) and self.patience:
            self.patience -= 1
            time.sleep(0.01)  # others may be released, once they are judged
            return []
        if len(held) < len(self.waiting):
            self.waiting = [one for one in self.waiting if one not in held]
            finished = super().wait()
            self.waiting += held
            return finished
        return super().wait()

    @staticmethod
    def _drawn(request: DrawRequest, submitted_at: float) -> Drawn:
        drawn = ScriptedBackend._drawn(request, submitted_at)
        problem = int(request.problem.problem_id.removeprefix("t/"))
        answer = answer_of(problem, request.seed)
        return replace(drawn, text="no idea" if answer is None else f"so it is #### {answer}")


def draw_stopping(
    folder: Path,
    backend: ScriptedBackend,
    num_problems: int = 10,
    num_samples: int = 32,
    error: float = 0.05,
    every: int = 4,
    stream: TextIO = sys.stderr,
    jury: Any = VoteJury,
) -> dict[str, Any]:
    """Draw what is missing of a run with early stops, as the sample command does."""
    rule = StopRule(error, every)
    config = CONFIG | {"task": "arith", "num_samples": num_samples, "limit": num_problems}
    config |= {"stop_error": error, "stop_every": every}
    asked = problems(num_problems)
    records = [problem.record() for problem in asked]
    with SampleStore(folder).open(config, records) as store, ExitStack() as opened:
        judging = opened.enter_context(jury(folder, rule, num_samples, "the command"))
        waves = Waves(asked, SETTINGS, rule, num_samples, store.have(), judging)
        opened.enter_context(waves)
        if waves.is_finished:
            return {"drawn": 0}
        return draw_session(
            store,
            backend,
            asked,
            SETTINGS,
            num_samples=num_samples,
            regime="saturated",
            session_facts={"startup_s": 0.0, "num_problems": num_problems},
            stream=stream,
            waves=waves,
        )


if __name__ == "__main__":
    draw_stopping(
        Path(sys.argv[1]),
        AnsweringBackend(delay_s=0.002),
        num_problems=int(sys.argv[2]),
        num_samples=int(sys.argv[3]),
    )
