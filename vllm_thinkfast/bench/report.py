"""From measurements to the table and results.json; medians over rounds, with their spread."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vllm_thinkfast.bench.roofline import Machine, StepCost
from vllm_thinkfast.bench.run import Measured
from vllm_thinkfast.bench.settings import Cell, Model, Settings

_OVERLOAD = 1.5
"""Load average per thread above which others must have been computing too."""


def summarise(found: Measured, models: Sequence[Model], settings: Settings) -> dict[str, Any]:
    """Everything the table and the figure show.

    Args:
        found: by the run.
        models: the first is the reference of the ratios.
        settings: of the run.
    """
    machine = _median_machine(found.machines)
    cells = []
    for cell in settings.cells:
        reference = found.cells[models[0].name, cell.label]
        for model in models:
            rows = found.cells[model.name, cell.label]
            cost = found.facts[model.name].get("step_cost")
            cells.append(
                {
                    "cell": cell.label,
                    "mode": cell.mode,
                    "num_prompt_tokens": cell.num_prompt_tokens,
                    "num_tokens": cell.num_tokens,
                    "model": model.name,
                    **_cell_summary(rows, reference, cost, machine),
                }
            )
    loads = [row["load_average"] for rows in found.cells.values() for row in rows if _is_ok(row)]
    return {
        "machine": {
            "median": machine.__dict__,
            "rounds": found.machines,
        },
        "models": [{"name": model.name, **found.facts[model.name]} for model in models],
        "cells": cells,
        "highest_load_average": max(loads, default=None),
        "is_contended": bool(loads) and max(loads) > _OVERLOAD * settings.threads,
    }


def _is_ok(row: dict[str, Any]) -> bool:
    return "error" not in row


def _median_machine(machines: Sequence[dict[str, Any]]) -> Machine:
    rates = {
        name: statistics.median(machine[name] for machine in machines)
        for name in ("triad_bytes_per_s", "copy_bytes_per_s", "flops_per_s")
    }
    return Machine(device=machines[0]["device"], **rates)


def _cell_summary(
    rows: Sequence[dict[str, Any]],
    reference: Sequence[dict[str, Any]],
    cost: dict[str, Any] | None,
    machine: Machine,
) -> dict[str, Any]:
    errors = [row["error"] for row in rows if not _is_ok(row)]
    if errors:
        return {"error": errors[0]}
    has_decode = all(row["num_decode_steps"] for row in rows)
    summary: dict[str, Any] = {
        # "max" may be another number in another round, where engines take what memory is free.
        "batch": statistics.median_low(row["batch"] for row in rows),
        "tokens_per_s": _spread(row["tokens_per_s"] for row in rows),
        "tokens_per_s_ratio": _ratio(rows, reference, "tokens_per_s"),
        "prefill_tokens_per_s": _spread(row["prefill_tokens_per_s"] for row in rows),
        "num_prefilled_tokens": statistics.median_low(row["num_prefilled_tokens"] for row in rows),
        "most_running": max(row["most_running"] for row in rows),
        "num_preempted": max(row["num_preempted"] for row in rows),
        "peak_memory_bytes": {
            name: max(row["peak_memory_bytes"][name] for row in rows)
            for name in rows[0]["peak_memory_bytes"]
        },
        "cache_bytes_per_sequence": max(
            row["peak_cache_bytes"] / row["most_running"] for row in rows
        ),
        "time_per_token_s": None,
        "time_per_token_cpu_s": None,
        "decode_tokens_per_s": None,
        "decode_ratio": None,
        "decode_cpu_ratio": None,
        "roofline_fraction": None,
        "rounds": list(rows),
    }
    if cost is not None:
        flops = 2 * StepCost(**cost).weight_elements  # of one token
        summary["prefill_flops_fraction"] = _spread(
            flops * row["num_prefilled_tokens"] / row["prefill_s"] / machine.flops_per_s
            for row in rows
        )
    if not has_decode:
        return summary
    summary |= {
        "time_per_token_s": _spread(row["step_s"] for row in rows),
        "time_per_token_cpu_s": _spread(row["step_cpu_s"] for row in rows),
        "decode_tokens_per_s": _spread(row["decode_tokens_per_s"] for row in rows),
        "decode_ratio": _ratio(rows, reference, "decode_tokens_per_s"),
        "decode_cpu_ratio": _ratio(
            [_per_cpu_second(row) for row in rows], [_per_cpu_second(row) for row in reference], "x"
        ),
    }
    if cost is not None:
        step = StepCost(**cost)
        summary["roofline_fraction"] = _spread(
            step.least_seconds(row["batch"], row["mean_context"], machine) / row["step_s"]
            for row in rows
        )
    return summary


def _spread(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def _ratio(
    rows: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], name: str
) -> dict[str, float] | None:
    """Ratios within rounds; None where the reference has no such number."""
    if not all(_is_ok(row) and name in row for row in reference):
        return None
    return _spread(row[name] / other[name] for row, other in zip(rows, reference, strict=True))


def _per_cpu_second(row: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of processor time as ``x``; without it where there was no decoding."""
    return {"x": row["batch"] / row["step_cpu_s"]} if row.get("step_cpu_s") else {}


def render(summary: dict[str, Any], settings: Settings) -> Iterator[str]:
    """The lines of the report."""
    machine = summary["machine"]["median"]
    yield (
        f"machine, {machine['device']}, OMP_NUM_THREADS={settings.threads}: "
        f"triad {machine['triad_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"copy {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"{settings.dtype} products {machine['flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    if summary["is_contended"]:
        yield (
            f"CONTENDED: load average up to {summary['highest_load_average']:.1f} with "
            f"OMP_NUM_THREADS={settings.threads}; trust the ratios, not the rates"
        )
    yield ""
    yield from _model_table(summary["models"])
    yield ""
    yield from _cell_table(summary["cells"])


def _model_table(models: Sequence[dict[str, Any]]) -> Iterator[str]:
    lengths = next((list(m["largest_batch"]) for m in models if _is_ok(m)), [])
    heads = [f"batch, decoding ({length})" for length in lengths]
    rows = [["model", "parameters", "state/seq", "KV/token", "prefix cache", *heads]]
    for model in models:
        if not _is_ok(model):
            rows.append([model["name"], f"did not start: {model['error']}"])
            continue
        cost = model["step_cost"]
        count = model["num_parameters"]
        rows.append(
            [
                model["name"],
                f"{count / 1e6:.1f} M" if count else "unknown",
                f"{cost['state_bytes'] / 2**20:.2f} MiB" if cost else "unknown",
                f"{cost['kv_bytes_per_token'] / 2**10:.2f} KiB" if cost else "unknown",
                "on" if model["prefix_caching"] else "off",
                *(f"{model['largest_batch'][n]}, {model['max_decoding'][n]}" for n in lengths),
            ]
        )
    yield from _columns(rows)


def _cell_table(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = [
        [
            "cell",
            "model",
            "tokens/s",
            "ratio",
            "ms/token",
            "decode ratio",
            "by CPU time",
            "roofline",
            "prefilled",
            "prefill/s",
            "at once",
            "cache/seq",
            "peak memory",
        ]
    ]
    notes = []
    for cell in cells:
        if not _is_ok(cell):
            rows.append([cell["cell"], cell["model"], "failed"])
            notes.append(f"{cell['cell']}, {cell['model']}: {cell['error']}")
            continue
        step, fraction = cell["time_per_token_s"], cell["roofline_fraction"]
        batches = {row["batch"] for row in cell["rounds"]}
        if len(batches) > 1:
            notes.append(
                f"{cell['cell']}, {cell['model']}: batches of {min(batches)} to {max(batches)} in "
                "the rounds"
            )
        at_once = str(cell["most_running"])
        if cell["num_preempted"]:
            at_once += f", {cell['num_preempted']} preempted"
        rows.append(
            [
                cell["cell"],
                cell["model"],
                f"{cell['tokens_per_s']['median']:.0f}",
                _with_spread(cell["tokens_per_s_ratio"]),
                f"{1e3 * step['median']:.2f}" if step else "-",
                _with_spread(cell["decode_ratio"]),
                _with_spread(cell["decode_cpu_ratio"]),
                f"{fraction['median']:.0%}" if fraction else "-",
                str(cell["num_prefilled_tokens"]),
                f"{cell['prefill_tokens_per_s']['median']:.0f}",
                at_once,
                f"{cell['cache_bytes_per_sequence'] / 2**20:.2f} MiB",
                f"{_peak(cell) / 2**20:.0f} MiB",
            ]
        )
    yield from _columns(rows)
    yield from notes


def _peak(cell: dict[str, Any]) -> int:
    memory: dict[str, int] = cell["peak_memory_bytes"]
    return memory.get("device", memory["process"])


def _with_spread(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.2f} ({value['least']:.2f}-{value['most']:.2f})"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    num_columns = max(len(row) for row in rows)
    complete = [row for row in rows if len(row) == num_columns]
    widths = [max(len(row[i]) for row in complete) for i in range(num_columns)]
    for row in rows:
        yield "  ".join(
            text.ljust(width) for text, width in zip(row, widths, strict=False)
        ).rstrip()


def cell_of(summary: dict[str, Any], cell: Cell, model: str) -> dict[str, Any]:
    """One entry of ``summary["cells"]``."""
    (found,) = [
        entry
        for entry in summary["cells"]
        if entry["cell"] == cell.label and entry["model"] == model
    ]
    entry: dict[str, Any] = found
    return entry
