"""Workers that answer from a script, and the settings that go with them."""

from pathlib import Path
from typing import Any

from vllm_thinkfast.bench.process import WorkerError
from vllm_thinkfast.bench.settings import Model, Settings, parse_cells

COST = {
    "weight_bytes": 4000,
    "weight_elements": 1000,
    "state_bytes": 100,
    "state_elements": 25,
    "kv_bytes_per_token": 8,
    "attention_flops_per_token": 16,
}
MACHINE = {
    "device": "cpu",
    "triad_bytes_per_s": 1e6,
    "copy_bytes_per_s": 5e5,
    "flops_per_s": 1e7,
}
SPEED = {"llama": 100.0, "llamba": 300.0}
"""Tokens per second while decoding one sequence."""


def settings(**changes: Any) -> Settings:
    cells, max_num_seqs = parse_cells(
        changes.pop("batches", "1,4"), changes.pop("lengths", "8+4"), changes.pop("n", ""), None
    )
    fields: dict[str, Any] = {
        "cells": cells,
        "rounds": 2,
        "load_format": "dummy",
        "dtype": "float32",
        "ssm_dtype": "float32",
        "threads": 1,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": 64,
        "kv_cache_bytes": 2**20,
        "engines": "together",
        "seed": 0,
        "engine_options": {},
    }
    return Settings(**{**fields, **changes})


def models(folder: Path, *names: str) -> list[Model]:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(f'{{"name": "{name}"}}')
    return [Model(name, folder / name, None) for name in names]


class Stage:
    """Makes scripted workers and notes what they are asked, in order."""

    def __init__(self, failing: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> None:
        """``failing``: "model batch" whose measurement fails; ``broken``: engines."""
        self.calls: list[str] = []
        self.alive: set[str] = set()
        self.most_alive = 0
        self.alive_at_roofline: list[int] = []
        self.failing = failing
        self.broken = broken
        self.num_measured = 0

    def start(self, settings: Settings, log: Path) -> Any:
        return _Scripted(self, log.stem)

    @property
    def measured(self) -> list[str]:
        return [call for call in self.calls if call.startswith("measure")]


class _Scripted:
    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.name = name

    def ask(self, do: str, **arguments: Any) -> Any:
        stage = self.stage
        if do == "roofline":
            stage.alive_at_roofline.append(len(stage.alive))
            if "roofline" in stage.failing:
                raise WorkerError("no memory")
            return dict(MACHINE)
        stage.alive.add(self.name)
        stage.most_alive = max(stage.most_alive, len(stage.alive))
        if do == "start":
            stage.calls.append(f"start {self.name}")
            if self.name in stage.broken:
                raise WorkerError("no memory")
            return {
                "num_parameters": 1000,
                "max_decoding": {f"{P}+{T}": 9 for P, T in arguments["lengths"]},
                "largest_batch": {f"{P}+{T}": 6 for P, T in arguments["lengths"]},
                "step_cost": COST,
                "prefix_caching": True,
            }
        stage.calls.append(f"{do} {self.name} {arguments['batch']}")
        if do == "warm_up":
            return None
        if f"{self.name} {arguments['batch']}" in stage.failing:
            raise WorkerError("IndexError")
        stage.num_measured += 1
        return cell_row(SPEED[self.name], arguments["batch"], slower=1 + 0.1 * stage.num_measured)

    def close(self) -> None:
        self.stage.alive.discard(self.name)


def cell_row(speed: float, batch: int, slower: float = 1.0) -> dict[str, Any]:
    """A result of ``Engine.measure`` on a machine that is ``slower`` than at first."""
    step_s = slower / speed
    return {
        "batch": batch,
        "seconds": 5 * step_s,
        "tokens_per_s": batch * 4 / (5 * step_s),
        "prefill_s": 2 * step_s,
        "num_prefilled_tokens": 8 * batch,
        "prefill_tokens_per_s": 8 * batch / (2 * step_s),
        "num_preempted": 0,
        "most_running": batch,
        "peak_cache_bytes": 1000.0 * batch,
        "peak_memory_bytes": {"process": 2**30},
        "load_average": 0.5,
        "num_decode_steps": 3,
        "step_s": step_s,
        "step_s_least": step_s,
        "step_s_most": step_s,
        "step_cpu_s": step_s,
        "decode_tokens_per_s": batch / step_s,
        "mean_context": 10.5,
    }
