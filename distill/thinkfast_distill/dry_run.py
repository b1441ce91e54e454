"""``thinkfast-distill run --dry-run``: the resolved recipe and what it costs, without running it.

Needs the teacher's config.json, or ``teacher.sizes`` in the recipe; no weights, data or GPU. With
``WORLD_SIZE=8`` in the environment it shows the memory per device of 8 ranks.
"""

import os
from typing import Any

from thinkfast_distill import architecture, costs, parts, recipe
from thinkfast_distill.config import RunConfig
from thinkfast_distill.freeze import freeze_table

_GB = 1e9


def report(config: RunConfig) -> dict[str, Any]:
    """Everything the dry run knows, JSON-able.

    Args:
        config: the run.

    Returns:
        recipe, notes on it, parameter counts, and per stage steps, freeze table, FLOPs, memory and
        hours.

    Raises:
        RecipeError: the teacher's configuration is not there or does not fit.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    teacher_config = None
    if config.teacher is not None:
        teacher_config = architecture.teacher_config(config.teacher, allow_sizes=True)
    tokenizer = parts.tokenizer(config) if config.student.kind == "llama" else None
    teacher = None if teacher_config is None else costs.model_cost(teacher_config)
    peak = config.logging.peak_flops_per_s or config.compute.assumed_peak_flops_per_s
    stages = []
    for i, stage in enumerate(config.stages):
        student_config = parts.student_config(config, teacher_config, tokenizer, i)
        student = costs.model_cost(student_config)
        model, objective = parts.stage_without_weights(config, i, student_config, None)
        named = dict(model.named_parameters())
        trained = objective.trainable_parameters()
        flops = costs.stage_cost(config, stage, student, teacher)
        trainable = sum(named[name].numel() for name in trained)
        memory = costs.memory_estimate(
            config, stage, student_config, student, teacher, trainable, num_ranks
        )
        total = flops.per_token * stage.num_steps * stage.batch_tokens
        stages.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "student_parameters": {**student.parameters, "all": student.total},
                "trainable_parameters": trainable,
                "freeze_table": freeze_table(
                    named.items(), trained, objective.partly_trained_parameters()
                ),
                "steps": stage.num_steps,
                "tokens": stage.num_steps * stage.batch_tokens,
                "flops_per_token": {**vars(flops), "all": flops.per_token},
                "memory_bytes_per_device": {**vars(memory), "all": memory.total},
                "device_hours": total / (peak * config.compute.assumed_mfu) / 3600,
            }
        )
    return {
        "recipe": recipe.to_dict(config),
        "notes": parts.contamination_notes(config),
        "teacher_parameters": None if teacher is None else teacher.total,
        "student_parameters": stages[-1]["student_parameters"],
        "num_ranks": num_ranks,
        "assumed_peak_flops_per_s": peak,
        "assumed_mfu": config.compute.assumed_mfu,
        "stages": stages,
        "tokens": sum(stage["tokens"] for stage in stages),
        "device_hours": sum(stage["device_hours"] for stage in stages),
    }


def render(config: RunConfig, found: dict[str, Any]) -> str:
    """The report for people.

    Args:
        config: the run.
        found: what ``report`` returned.
    """
    lines = ["# resolved recipe", recipe.to_yaml(config).rstrip(), "", "# models"]
    if found["teacher_parameters"] is not None:
        lines.append(f"teacher {found['teacher_parameters']:,} parameters")
    counts = found["student_parameters"]
    listed = ", ".join(f"{part} {n:,}" for part, n in counts.items() if n and part != "all")
    lines.append(f"student {counts['all']:,} parameters: {listed}")
    for stage in found["stages"]:
        lines += [
            "",
            f"# stage {stage['name']} ({stage['kind']})",
            f"{stage['steps']:,} steps, {stage['tokens']:,} tokens",
            *stage["freeze_table"],
            f"FLOPs per token (G): {_listed(stage['flops_per_token'])}",
            f"memory per device, estimated (GB): {_listed(stage['memory_bytes_per_device'])}",
            f"device-hours: {stage['device_hours']:.3g}",
        ]
    if found["notes"]:
        lines += ["", "# notes", *found["notes"]]
    hours, devices = found["device_hours"], found["num_ranks"]
    lines += [
        "",
        f"# all stages: {found['tokens']:,} tokens",
        (
            f"device-hours: {hours:.3g} at {found['assumed_mfu']:.0%} of "
            f"{found['assumed_peak_flops_per_s'] / 1e12:.4g} TFLOP/s"
        ),
        f"hours on {devices} device{'s' if devices > 1 else ''}: {hours / devices:.3g}",
    ]
    return "\n".join(lines)


def _listed(values: dict[str, float]) -> str:
    """All values in units of a billion, the sum first."""
    parts = [f"{key} {value / _GB:.3g}" for key, value in values.items() if key != "all"]
    return ", ".join([f"all {values['all'] / _GB:.3g}", *parts])
