"""``thinkfast-distill status``: how far a run is, from its newest checkpoint and its log."""

from pathlib import Path
from typing import Any

from thinkfast_distill.checkpoint import CheckpointStore
from thinkfast_distill.config import RunConfig, load
from thinkfast_distill.distributed import World
from thinkfast_distill.loop import CONFIG_FILE
from thinkfast_distill.recipe import RecipeError
from thinkfast_distill.run_log import LOG_FILE, duration, read_log


def read_run_config(run: Path) -> RunConfig:
    """The resolved recipe of a run folder.

    Raises:
        RecipeError: it is no run folder.
    """
    if not (run / CONFIG_FILE).is_file():
        raise RecipeError(f"{run}: no run folder (no {CONFIG_FILE}); give the folder of a run.")
    return load(run / CONFIG_FILE)


def read_status(run: Path) -> dict[str, Any]:
    """What is known about a run, JSON-able.

    Args:
        run: the run folder.

    Returns:
        steps, tokens and held-out metrics per stage, the newest checkpoint, and the time left at
        the pace of the last steps (None if there is none).
    """
    config = read_run_config(run)
    checkpoint = CheckpointStore(run, config.checkpoint.keep, World()).latest()
    records = read_log(run / LOG_FILE)
    steps = [record for record in records if record["event"] in ("train", "skip")]
    last = steps[-1] if steps else None
    logged = last["step"] if last else 0
    total = sum(stage.num_steps for stage in config.stages)
    saved = checkpoint.progress if checkpoint else None
    recent = [record["tokens_per_s"] for record in steps[-20:]]
    left_s = None
    if recent and saved is not None:
        tokens = sum(s.num_steps * s.batch_tokens for s in config.stages) - last_tokens(last)
        left_s = tokens / (sum(recent) / len(recent))
    finished = saved is not None and saved.stage == len(config.stages)
    return {
        "run": str(run),
        "name": config.name,
        "is_finished": finished,
        "step": logged,
        "total_steps": total,
        "tokens": last_tokens(last),
        "skipped_steps": saved.skipped_steps if saved else 0,
        "left_s": 0.0 if finished else left_s,
        "checkpoint": str(checkpoint.folder) if checkpoint else None,
        "checkpoint_step": saved.step if saved else None,
        "stages": [_stage_status(config, i, records) for i in range(len(config.stages))],
    }


def last_tokens(record: dict[str, Any] | None) -> int:
    """Tokens of the run at a record; 0 without one."""
    return int(record["tokens"]) if record else 0


def _stage_status(config: RunConfig, index: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    stage = config.stages[index]
    own = [record for record in records if record.get("stage_index") == index]
    trained = [record for record in own if record["event"] == "train"]
    measured = [record for record in own if record["event"] == "eval"]
    return {
        "name": stage.name,
        "kind": stage.kind,
        "step": max((record["stage_step"] for record in own), default=0),
        "total_steps": stage.num_steps,
        "loss": trained[-1]["loss"] if trained else None,
        "held_out": {key: _metrics(measured[i]) for key, i in (("first", 0), ("last", -1))}
        if measured
        else None,
    }


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    position = ("event", "step", "stage", "stage_index", "stage_step", "tokens")
    return {
        key: value for key, value in record.items() if key not in position and "num_" not in key
    }


def render(found: dict[str, Any]) -> str:
    """The status for people."""
    state = "finished" if found["is_finished"] else f"step {found['step']}/{found['total_steps']}"
    lines = [f"{found['name']}: {state}, {found['tokens']:,} tokens"]
    if found["left_s"]:
        lines[0] += f", about {duration(found['left_s'])} left at the pace of the last steps"
    saved = found["checkpoint"] or "none yet"
    lines.append(f"checkpoint: {saved}")
    if found["skipped_steps"]:
        lines.append(f"steps without an update (see log.jsonl): {found['skipped_steps']}")
    for stage in found["stages"]:
        loss = "" if stage["loss"] is None else f", loss {stage['loss']:.4g}"
        lines.append(f"{stage['name']:<20} {stage['step']}/{stage['total_steps']}{loss}")
        if stage["held_out"] is not None:
            first, last = stage["held_out"]["first"], stage["held_out"]["last"]
            for key, value in last.items():
                if isinstance(value, (int, float)) and key in first:
                    lines.append(f"  held out {key:<24} {first[key]:.4g} -> {value:.4g}")
    return "\n".join(lines)
