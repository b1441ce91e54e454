"""The measuring phases: sampling with scores per model, then speed of all models side by side."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo.engine import EngineProcess
from demo.settings import Contender, Settings, code_hash, resolved
from demo.store import PhaseStore

Start = Callable[[Contender], EngineProcess]
WARM_UP_TOKENS = 4


class Progress:
    """Where the phases say what they do; `demo.run` prints it."""

    def say(self, text: str) -> None:
        """One line."""

    def update(self, what: str, done: int, total: int) -> None:
        """How far a phase is."""


class Measurement:
    """Runs the phases that are not stored yet; engines start when they are first needed."""

    def __init__(
        self,
        settings: Settings,
        contenders: Sequence[Contender],
        store: PhaseStore,
        environment: dict[str, Any],
        progress: Progress,
        start: Start,
    ) -> None:
        """See the class.

        Args:
            settings: of the run.
            contenders: the models; the first is the one others are compared with.
            store: of finished phases.
            environment: versions and hardware; results from another one are not reused.
            progress: is told what happens.
            start: starts a contender's engine.
        """
        self.contenders = contenders
        self.store = store
        self.progress = progress
        self.settings = settings
        values = resolved(settings)
        # Where the file lies and how speed is measured do not change the samples.
        for name in ("data", "speed_rounds", "speed_sequences", "speed_tokens"):
            del values[name]
        self.base_key = {"settings": values, "environment": environment, "code": code_hash()}
        self._start = start
        self._engines: dict[str, EngineProcess] = {}

    def run(self) -> dict[str, Any]:
        """Returns ``{"passk": {name: result}, "speed": {"rounds": [...]}}``."""
        try:
            passk = {c.name: self._passk(c) for c in self.contenders}
            return {"passk": passk, "speed": self._speed()}
        finally:
            for engine in self._engines.values():
                engine.close()

    def _engine(self, contender: Contender) -> EngineProcess:
        if contender.name not in self._engines:
            self.progress.say(f"{contender.name}: starting vLLM")
            self._engines[contender.name] = self._start(contender)
            seconds = self._engines[contender.name].engine_start_s
            self.progress.say(f"{contender.name}: engine ready after {seconds:.0f} s")
        return self._engines[contender.name]

    def _passk(self, contender: Contender) -> dict[str, Any]:
        key = self.base_key | {"model": contender.identity}
        phase = f"passk-{contender.name}"
        stored: dict[str, Any] | None = self.store.load(phase, key)
        if stored is not None:
            self.progress.say(f"{contender.name}: samples and scores reused from an earlier run")
            return stored
        engine = self._engine(contender)
        what = f"{contender.name}: sampling"
        result: dict[str, Any] = engine.ask(
            "passk", lambda done, total: self.progress.update(what, done, total)
        )
        result["engine_start_s"] = engine.engine_start_s
        self.store.save(phase, key, result)
        self.progress.say(f"{contender.name}: sampled and scored in {result['wall_s']:.0f} s")
        return result

    def _speed(self) -> dict[str, Any]:
        """Rounds of one timed batch per model, in alternating order.

        Models are compared within a round, so that a machine that gets slower or faster during the
        measurement changes both sides of a ratio.
        """
        key = self.base_key | {
            "models": [c.identity for c in self.contenders],
            "speed_sequences": self.settings.speed_sequences,
            "speed_tokens": self.settings.speed_tokens,
        }
        stored = self.store.load("speed", key) or {"rounds": []}
        rounds: list[dict[str, Any]] = stored["rounds"]
        if rounds:
            self.progress.say(f"speed: {len(rounds)} rounds reused from an earlier run")
        if len(rounds) < self.settings.speed_rounds:
            prompts = read_questions(Path(self.settings.data), self.settings.limit)
            batch = {
                "prompts": prompts,
                "num_sequences": self.settings.speed_sequences,
                "num_tokens": self.settings.speed_tokens,
            }
            for contender in self.contenders:
                self._engine(contender).ask("speed", **batch | {"num_tokens": WARM_UP_TOKENS})
            while len(rounds) < self.settings.speed_rounds:
                order = list(self.contenders)
                if len(rounds) % 2:
                    order.reverse()
                found = {c.name: self._engine(c).ask("speed", **batch) for c in order}
                rounds.append(found)
                self.store.save("speed", key, {"rounds": rounds})
                self.progress.update("speed: round", len(rounds), self.settings.speed_rounds)
        return {"rounds": rounds[: self.settings.speed_rounds]}


def read_questions(data: Path, limit: int | None) -> list[str]:
    """The questions of a checked data file, for the speed measurement."""
    lines = [line for line in data.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [json.loads(line)["question"] for line in lines[:limit]]
