"""The run: every cell of every model once per round, interleaved, each result stored at once.

With ``engines="together"`` all engines stay alive and take turns cell by cell, in an order that is
reversed every other round: a machine that gets slower meanwhile slows all of them. With
"one-by-one", for models that need the whole memory, a round starts each engine, measures all of its
cells and stops it. Either way ratios are formed within a round only. Warm-up is not timed: once per
engine and cell, with short prompts.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_thinkfast.bench import environment
from vllm_thinkfast.bench.process import CACHE_VARIABLE, Worker, WorkerError
from vllm_thinkfast.bench.settings import Cell, Model, Settings
from vllm_thinkfast.bench.store import Results, fingerprint

Say = Callable[[str], None]
Task = tuple[int, Model, Cell]
"""(round, model, cell)."""
MODULE = "vllm_thinkfast.bench.worker"
"""Of each process."""


@dataclass
class Measured:
    """Everything a run found; the report is made from it."""

    machines: list[dict[str, Any]] = field(default_factory=list)
    """One roofline measurement per round."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Model name -> what its engine says about itself; with "error" if it did not start."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    """(model name, cell label) -> one result per round; those that failed have "error"."""


def start_worker(settings: Settings, log: Path) -> Worker:
    """A process of `vllm_thinkfast.bench.worker`.

    Args:
        settings: of the run; threads and memory are read from it.
        log: file to which everything it prints is appended.
    """
    environment: dict[str, str | None] = {
        "OMP_NUM_THREADS": str(settings.threads),
        # Threads of several engines that vLLM pins would all sit on the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if settings.kv_cache_bytes is not None:
        environment[CACHE_VARIABLE] = None  # it would win
    return Worker(MODULE, log, environment)


class Run:
    """Measures what is not stored yet."""

    def __init__(
        self,
        models: Sequence[Model],
        settings: Settings,
        results: Results,
        logs: Path,
        say: Say,
        start: Callable[[Settings, Path], Worker] = start_worker,
    ) -> None:
        """See the class.

        Args:
            models: the first is the one others are compared with.
            settings: of the run.
            results: where finished measurements are and go.
            logs: folder for what the engines print.
            say: is told what happens, a line each.
            start: makes the process of an engine; arguments as of `start_worker`.
        """
        self.models = models
        self.settings = settings
        self.results = results
        self.logs = logs
        self.say = say
        self._start = start
        self._workers: dict[str, Worker] = {}
        self._broken: dict[str, str] = {}
        """Model -> why its engine does not start; it is not tried again in this run."""
        self._failed: dict[tuple[str, str], str] = {}
        """(model, cell) -> why; the same."""
        self._warm: set[tuple[str, str]] = set()
        self._base = {
            "llm": settings.llm_options(),
            "threads": settings.threads,
            # Engines that wait for each other share caches and memory.
            "engines": settings.engines,
            "versions": environment.versions("numba"),
            "cpu_operators": environment.cpu_operators(),
            "hardware": environment.hardware(),
            "environment": environment.environment_of_runs(settings),
            "code": environment.code_hash(),
        }
        self._identities = {model.name: model.identity for model in models}

    def measure(self) -> Measured:
        """Runs what is missing; returns everything."""
        found = Measured()
        tasks = list(self._tasks())
        missing = [task for task in tasks if self.results.get(self._key(*task)) is None]
        num_done = len(tasks) - len(missing)
        if num_done:
            self.say(f"{num_done} of {len(tasks)} measurements reused")
        try:
            for round_number in range(self.settings.rounds):
                found.machines.append(self._machine(round_number))
                for task in [task for task in missing if task[0] == round_number]:
                    num_done += 1
                    self._measure(*task, progress=f"[{num_done}/{len(tasks)}]")
            found.facts = {model.name: self._facts(model) for model in self.models}
        finally:
            for worker in self._workers.values():
                worker.close()
        for task in sorted(tasks, key=lambda task: task[0]):
            _, model, cell = task
            value = self.results.get(self._key(*task))
            if value is None:
                value = {"error": self._failure(model, cell)}
            found.cells.setdefault((model.name, cell.label), []).append(value)
        return found

    def _tasks(self) -> Iterator[Task]:
        for round_number in range(self.settings.rounds):
            models = list(self.models)
            if round_number % 2:
                models.reverse()
            if self.settings.engines == "together":
                for cell in self.settings.cells:
                    for model in models:
                        yield round_number, model, cell
            else:
                for model in models:
                    for cell in self.settings.cells:
                        yield round_number, model, cell

    def _key(self, round_number: int, model: Model, cell: Cell) -> str:
        identity = self._identities[model.name]
        return f"cell-{fingerprint([self._base, identity, cell.label, round_number])}"

    def _facts_key(self, model: Model) -> str:
        lengths = self._lengths()
        return f"facts-{fingerprint([self._base, self._identities[model.name], lengths])}"

    def _lengths(self) -> list[tuple[int, int]]:
        cells = self.settings.cells
        return sorted({(cell.num_prompt_tokens, cell.num_tokens) for cell in cells})

    def _machine(self, round_number: int) -> dict[str, Any]:
        key = f"machine-{fingerprint([self._base, round_number])}"
        stored = self.results.get(key)
        if stored is None:
            self._make_room()
            self.say(f"round {round_number + 1}: measuring bandwidth and operations per second")
            worker = self._start(self.settings, self.logs / "roofline")
            with contextlib.closing(worker):
                stored = worker.ask("roofline", dtype=self.settings.dtype)
            assert stored is not None
            self.results.add(key, stored)
        return stored

    def _make_room(self) -> None:
        """Before something that may need the whole memory."""
        if self.settings.engines == "one-by-one":
            for name in list(self._workers):
                self._workers.pop(name).close()
            self._warm.clear()

    def _worker(self, model: Model) -> Worker:
        """The engine of a model; starts it if it does not run."""
        if model.name in self._workers:
            return self._workers[model.name]
        self._make_room()
        self.say(f"{model.name}: starting vLLM")
        worker = self._start(self.settings, self.logs / f"{model.name}.log")
        facts = worker.ask(
            "start",
            folder=str(model.folder),
            options=self.settings.llm_options(),
            lengths=self._lengths(),
        )
        self.results.add(self._facts_key(model), facts)
        self._workers[model.name] = worker
        return worker

    def _facts(self, model: Model) -> dict[str, Any]:
        stored = self.results.get(self._facts_key(model))
        if stored is None and model.name not in self._broken:
            # All cells are from an earlier run that measured other lengths too.
            with self._noting_failure(model, None):
                self._worker(model)
            stored = self.results.get(self._facts_key(model))
        return stored if stored is not None else {"error": self._broken[model.name]}

    def _measure(self, round_number: int, model: Model, cell: Cell, progress: str) -> None:
        if self._failure(model, cell) is not None:
            return
        with self._noting_failure(model, cell):
            worker = self._worker(model)
            batch = self._batch(model, cell)
            if (model.name, cell.label) not in self._warm:
                worker.ask(
                    "warm_up",
                    batch=batch,
                    mode=cell.mode,
                    num_prompt_tokens=cell.num_prompt_tokens,
                )
                self._warm.add((model.name, cell.label))
            value = worker.ask(
                "measure",
                mode=cell.mode,
                batch=batch,
                num_prompt_tokens=cell.num_prompt_tokens,
                num_tokens=cell.num_tokens,
                seed=self.settings.seed + round_number,
            )
            self.results.add(self._key(round_number, model, cell), value)
            self.say(
                f"{progress} round {round_number + 1}, {cell.label}: {model.name} "
                f"{value['tokens_per_s']:.0f} tokens/s"
            )

    def _batch(self, model: Model, cell: Cell) -> int:
        if cell.batch is not None:
            return cell.batch
        facts = self.results.get(self._facts_key(model))
        assert facts is not None
        fitting = int(facts["largest_batch"][f"{cell.num_prompt_tokens}+{cell.num_tokens}"])
        return max(1, min(fitting, self.settings.max_num_seqs))

    def _failure(self, model: Model, cell: Cell) -> str | None:
        failed = self._failed.get((model.name, cell.label))
        return failed if failed is not None else self._broken.get(model.name)

    @contextlib.contextmanager
    def _noting_failure(self, model: Model, cell: Cell | None) -> Iterator[None]:
        """A model or cell that fails is reported and does not stop the others."""
        try:
            yield
        except WorkerError as error:
            reason = f"{model.name}: {error}"
            if model.name not in self._workers:
                self._broken[model.name] = reason
            else:
                assert cell is not None
                self._workers.pop(model.name).close()
                self._warm = {pair for pair in self._warm if pair[0] != model.name}
                self._failed[model.name, cell.label] = reason
            self.say(f"FAILED: {reason}")
