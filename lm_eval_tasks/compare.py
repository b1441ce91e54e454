"""Run several models under equal conditions, in turns, and write one report.

Every step is a command of its own process, so that an engine gives its memory back before the next
one starts, and each can be repeated by hand. A round gives every model its part of the samples;
the order of the models is reversed from round to round, so that a machine that slows down in the
meantime slows all of them. All steps resume: run the same command again after a kill, and what is
finished is not done twice.

saturated: the samples of each problem are divided among the rounds.
latency: the problems are divided among the rounds, because the samples of a problem run together.

Speeds against batch size are measured by the engine that has just drawn the samples of a round.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import InputError, stop
from lm_eval_tasks.jsonl import read_object, write_atomically

PLAN = "compare.json"


@dataclass(frozen=True)
class Model:
    """One contender: ``--model PATH[,name=...][,revision=...][,key=value...]``."""

    path: str
    name: str
    engine_args: dict[str, str] = field(default_factory=dict)
    """Of this model alone, over those of all."""
    tokenizer: str | None = None
    revision: str | None = None
    """Of a hub model."""
    trust_remote_code: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as plans store it; those of earlier versions have no later fields."""
        later = ("revision", "trust_remote_code")
        return {key: value for key, value in vars(self).items() if value or key not in later}


@dataclass(frozen=True)
class Plan:
    """What is compared and how; decides every command."""

    models: list[Model]
    task: str
    num_samples: int
    num_problems: Mapping[str, int]
    """Of each regime that is measured, how many of the task's problems."""
    rounds: int
    sampling: list[str]
    """Options of ``thinkfast-eval sample`` that all models share."""
    engine_args: dict[str, str]
    rewards: list[str]
    """Specifications for ``thinkfast-eval reward``."""
    batch_sizes: list[int]
    speed_tokens: tuple[int, int]
    folder: Path

    def run_folder(self, model: Model, regime: str) -> Path:
        """Return where a model's samples go."""
        return self.folder / "runs" / regime / model.name

    def run_folders(self) -> list[Path]:
        """Return all run folders, regime by regime, the baseline of each first."""
        return [self.run_folder(m, regime) for regime in self.num_problems for m in self.models]

    def steps(self) -> list["Step"]:
        """Return all steps in their order."""
        found: list[Step] = []
        for number in range(self.rounds):
            order = self.models if number % 2 == 0 else self.models[::-1]
            for regime in self.num_problems:
                found += [self._sample(model, regime, number) for model in order]
        runs = list(map(str, self.run_folders()))
        found.append(Step("grading the answers", _cli("score", *runs)))
        for spec in self.rewards:
            command = _cli("reward", *runs, "--reward", spec)
            found.append(Step(f"reward model {spec.partition(',')[0]}", command))
        return found

    def _sample(self, model: Model, regime: str, number: int) -> "Step":
        samples, problems = self.num_samples, self.num_problems[regime]
        if regime == "latency":
            problems = share(problems, number, self.rounds)
        else:
            samples = share(samples, number, self.rounds)
        arguments = ["--model", model.path, "--name", model.name, "--task", self.task]
        arguments += ["--out", str(self.run_folder(model, regime)), "--regime", regime]
        arguments += ["--num-samples", str(samples), "--limit", str(problems), *self.sampling]
        if model.tokenizer:
            arguments += ["--tokenizer", model.tokenizer]
        if model.revision:
            arguments += ["--revision", model.revision]
        if model.trust_remote_code:
            arguments.append("--trust-remote-code")
        title = f"round {number + 1} of {self.rounds}, {regime}: {model.name}"
        # Speeds need no regime; they are measured once per round.
        if self.batch_sizes and regime == next(iter(self.num_problems)):
            arguments += ["--batch-sizes", *map(str, self.batch_sizes)]
            arguments += ["--speed-tokens", *map(str, self.speed_tokens)]
            arguments += ["--speed-round", str(number)]
            title += " and its speeds"
        engine = self.engine_args | model.engine_args
        if engine:
            arguments += ["--engine-args", *(f"{key}={value}" for key, value in engine.items())]
        return Step(title, _cli("sample", *arguments))

    def as_dict(self) -> dict[str, Any]:
        """Return what must not change between starts of the same comparison."""
        models = [model.as_dict() for model in self.models]
        return {
            "models": models,
            "task": self.task,
            "rounds": self.rounds,
            "num_samples": self.num_samples,
            "num_problems": dict(self.num_problems),
            "sampling": self.sampling,
            "engine_args": self.engine_args,
            "batch_sizes": self.batch_sizes,
            "speed_tokens": list(self.speed_tokens),
        }


@dataclass(frozen=True)
class Step:
    """One command; it finds out by itself what of it is done already."""

    title: str
    command: list[str]

    @property
    def line(self) -> str:
        """The command as it can be typed, with the interpreter's bare name."""
        return shlex.join(["python", *self.command[1:]])


def _cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lm_eval_tasks.cli", *arguments]


def share(total: int, number: int, rounds: int) -> int:
    """Return how much of a total is done after a round, counted from 0; at least 1."""
    return max(1, total * (number + 1) // rounds)


def parse_model(text: str) -> Model:
    """Read ``PATH[,KEY=VALUE]...``.

    The keys are name, tokenizer, revision, trust_remote_code, and those of vLLM's EngineArgs.

    Raises:
        InputError: it is malformed.
    """
    path, *pairs = text.split(",")
    if not path:
        stop(f"--model {text}: need PATH[,name=NAME][,KEY=VALUE...]")
    values: dict[str, str] = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark or not key or not value:
            stop(f"--model {text}: {pair!r} is no KEY=VALUE")
        if key in values:
            stop(f"--model {text}: {key} is given twice")
        values[key] = value
    name = values.pop("name", None) or Path(path).resolve().name
    tokenizer, revision = values.pop("tokenizer", None), values.pop("revision", None)
    trusted = values.pop("trust_remote_code", "false").lower()
    if trusted not in ("true", "false"):
        stop(f"--model {text}: trust_remote_code={trusted} is neither true nor false")
    if "/" in name or name.startswith("."):
        stop(
            f"--model {text}: name {name!r} is a folder's name; need one without / and leading dot"
        )
    return Model(path, name, values, tokenizer, revision, trusted == "true")


def run_plan(plan: Plan) -> None:
    """Carry out the steps; those that are done find nothing to do.

    Raises:
        InputError: a step failed; its own message says why, and everything finished is kept.
    """
    _check_folder(plan)
    steps = plan.steps()
    started = time.monotonic()
    for number, step in enumerate(steps, start=1):
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        sys.stderr.write(f"[{number}/{len(steps)}] {minutes}:{seconds:02} {step.title}\n")
        sys.stderr.flush()
        code = _run(step.command)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            sys.stderr.write(f"error: this step ended with exit code {code}: {step.line}\n")
            raise InputError(f"step {number} of {len(steps)} failed")


def _run(command: Sequence[str]) -> int:
    """Run a command, its output on stderr; it ends with this process, however that ends."""
    with subprocess.Popen(command, stdout=2, preexec_fn=_end_with_parent) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _end_with_parent() -> None:
    """Ask Linux to end this process with its parent, so that none goes on writing unseen."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Return the plan that a folder is bound to: rounds of another one would mix conditions.

    None where no step has stored a sample yet: a plan that could not begin binds nothing.
    """
    path = folder / PLAN
    stores = folder.glob("runs/*/*/samples.jsonl")
    if not path.exists() or not any(store.stat().st_size for store in stores):
        return None
    return read_object(path)


def _check_folder(plan: Plan) -> None:
    """Bind the folder to its plan; see `read_plan`.

    Raises:
        InputError: it holds another comparison.
    """
    path = plan.folder / PLAN
    wanted = plan.as_dict()
    stored = read_plan(plan.folder)
    if stored is not None:
        for key, value in wanted.items():
            if stored.get(key) != value:
                stop(
                    f"{plan.folder} holds another comparison: {key} is "
                    f"{json.dumps(stored.get(key))} there and {json.dumps(value)} now; give the "
                    "same options, or another folder with --out"
                )
        return
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out {plan.folder}: cannot be made ({error.strerror}); give another folder")
    write_atomically(path, json.dumps(wanted, indent=1) + "\n")
