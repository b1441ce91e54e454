"""``make paper`` without engines: samples come from a script, all else is the real thing.

Run as a program it draws slowly, so that it can be killed: ``python -m tests.scripts.scripted_paper
DELAY_S [option of scripts.paper ...]``.
"""

import random
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lm_eval_tasks import compare, throughput
from lm_eval_tasks.cli import main as thinkfast_eval
from lm_eval_tasks.sampling import vllm_backend
from lm_eval_tasks.sampling.backend import Drawn, DrawRequest, SamplingSettings
from lm_eval_tasks.sampling.problems import Problem
from scripts import paper


class ScriptedEngine:
    """Samples follow from their seeds; the stronger a model, the more of them are right."""

    max_in_flight = num_places = max_num_seqs = 8

    def __init__(self, model: str, delay_s: float) -> None:
        self.skill = {"llama-tiny": 0.8, "llamba-tiny": 0.4, "mambainllama-tiny": 0.6}[model]
        self.delay_s = delay_s
        self.engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=512, get_vocab_size=lambda: 50)
        )
        self.waiting: list[tuple[DrawRequest, float]] = []

    def prepare(self, problems: Sequence[Problem], settings: SamplingSettings) -> None:
        pass

    def warm_up(self, num_samples: int) -> None:
        pass

    def submit(self, request: DrawRequest) -> None:
        self.waiting.append((request, time.monotonic()))

    def wait(self) -> list[Drawn]:
        time.sleep(self.delay_s)
        request, submitted_at = self.waiting.pop(len(self.waiting) // 2)
        chance = random.Random()
        if request.seed is not None:
            chance.seed(f"{request.seed}/{self.skill}")
        gold = int(request.problem.gold)
        found = gold if chance.random() < self.skill else gold + chance.choice((-2, 1, 3))
        now = time.monotonic()
        return [
            Drawn(
                request=request,
                text=f"January: {gold}+0={gold}\nFebruary: 1*{found}={found}\n#### {found}",
                num_tokens=chance.randint(10, 40),
                num_prompt_tokens=7,
                num_cached_tokens=None,
                finish_reason="stop",
                submitted_at=submitted_at,
                first_token_at=(submitted_at + now) / 2,
                finished_at=now,
            )
        ]

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def install(set_attribute: Any, delay_s: float = 0.0) -> None:
    """Put the script in place of the engines, and run the steps in this process.

    Args:
        set_attribute: `setattr`, or that of a MonkeyPatch.
        delay_s: of every sample.
    """

    def start(model: str, *_: Any) -> ScriptedEngine:
        return ScriptedEngine(model.rpartition("/")[2], delay_s)

    def time_batch(backend: Any, prompts: Sequence[Any], num_tokens: int) -> dict[str, Any]:
        tokens_per_s = 100.0 * len(prompts) ** 0.5
        seconds = len(prompts) * num_tokens / tokens_per_s
        speeds = {"tokens_per_s": tokens_per_s, "decode_tokens_per_s": tokens_per_s}
        return {"seconds": seconds, "prefill_s": 0.01, "num_preemptions": 0} | speeds

    def run(command: Sequence[str]) -> int:
        assert list(command[:3]) == [sys.executable, "-m", "lm_eval_tasks.cli"]
        return thinkfast_eval(command[3:])

    set_attribute(vllm_backend, "start_vllm", start)
    set_attribute(throughput, "time_batch", time_batch)
    set_attribute(compare, "_run", run)


if __name__ == "__main__":
    install(setattr, float(sys.argv[1]))
    sys.exit(paper.main(sys.argv[2:]))
