"""The table and the result file, from stored measurements alone."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from demo.settings import Contender

GIB = 2**30
SPEEDS = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}
"""Name in the table -> key in a round."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speed_summary(rounds: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Speeds, and their ratios to the first model taken round by round.

    Args:
        rounds: ``{name: {"decode_tokens_per_s": ..., "prefill_tokens_per_s": ...}}`` each.
        names: the models; ratios are relative to the first.

    Returns:
        name -> "decode" and "prefill" -> ``tokens_per_s`` and ``ratio``, each with median, min and
        max.
    """
    first = names[0]
    return {
        name: {
            kind: {
                "tokens_per_s": spread([r[name][key] for r in rounds]),
                "ratio": spread([r[name][key] / r[first][key] for r in rounds]),
            }
            for kind, key in SPEEDS.items()
        }
        for name in names
    }


def reported_ks(metrics: dict[str, float]) -> list[int]:
    """The k for which pass@k is there, ascending."""
    names = [name for name in metrics if name.startswith("pass@")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def build_results(
    contenders: Sequence[Contender],
    measured: dict[str, Any],
    run: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the table and the figure show, and how it came about.

    Args:
        contenders: the models.
        measured: what `demo.measure.Measurement.run` returned.
        run: resolved settings, versions, commit, hardware, command.
    """
    names = [c.name for c in contenders]
    speed = speed_summary(measured["speed"]["rounds"], names)
    models = []
    for c in contenders:
        passk = {k: v for k, v in measured["passk"][c.name].items() if k != "samples"}
        models.append(
            {
                "name": c.name,
                "label": c.label,
                "attention_layers": c.attention_layers,
                "identity": c.identity,
                **passk,
                "speed": speed[c.name],
            }
        )
    return {"models": models, "speed_rounds": measured["speed"]["rounds"], "run": run}


def table(results: dict[str, Any]) -> str:
    """The results as an aligned text table, with the notes that are needed to read it."""
    models = results["models"]
    settings = results["run"]["settings"]
    rows: list[list[str]] = [["", *(m["label"] for m in models)]]
    rows.append(["layers with attention", *(m["attention_layers"] for m in models)])

    def add(name: str, metric: str, scale: float = 1.0, digits: int = 1) -> None:
        if any(metric not in m["metrics"] for m in models):
            return
        cells = []
        for m in models:
            value, error = m["metrics"][metric], m["metrics"].get(f"{metric}_stderr")
            text = f"{value * scale:.{digits}f}"
            cells.append(text if error is None else f"{text} ± {error * scale:.{digits}f}")
        rows.append([name, *cells])

    for k in reported_ks(models[0]["metrics"]):
        add(f"pass@{k} [%]", f"pass@{k}", 100)
    add(f"cut at {settings['max_tokens']} tokens [%]", "truncated", 100)
    add("no answer found [%]", "no_answer", 100)
    add("answer in \\boxed{} [%]", "boxed", 100)
    add("different texts / N", "n_distinct", digits=2)
    add("tokens per sample", "gen_tokens")
    for kind in SPEEDS:
        for title, key, digits in (
            (f"{kind} tokens/s *", "tokens_per_s", 0),
            ("  relative **", "ratio", 2),
        ):
            cells = []
            for m in models:
                s = m["speed"][kind][key]
                is_first = key == "ratio" and m is models[0]
                shown = f"{s['median']:.{digits}f} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"
                cells.append("1" if is_first else shown)
            rows.append([title, *cells])
    rows.append(["sampling and scoring [s]", *(f"{m['wall_s']:.0f}" for m in models)])
    rows.append(["engine start [s]", *(f"{m['engine_start_s']:.0f}" for m in models)])
    for kind, name in (("process", "peak memory [GiB]"), ("device", "peak device memory [GiB]")):
        if all(kind in m["peak_memory_bytes"] for m in models):
            peak = [f"{m['peak_memory_bytes'][kind] / GIB:.2f}" for m in models]
            rows.append([name, *peak])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_notes(results)])


def _notes(results: dict[str, Any]) -> list[str]:
    models, settings = results["models"], results["run"]["settings"]
    rounds = len(results["speed_rounds"])
    problems = len(models[0]["per_problem"])
    sampled = f"{problems} word problems, N = {settings['num_samples']} samples each"
    batch = (
        f"{settings['speed_sequences']} sequences at once, {settings['speed_tokens']} tokens each"
    )
    return [
        f"{sampled}, temperature {settings['temperature']}; ± is the standard error over problems.",
        f"*  {batch}; median (range) of {rounds} rounds.",
        "** to the first model in the same round: median (range). Compare this, not tokens/s.",
    ]


def results_text(results: dict[str, Any]) -> str:
    """The result file's text."""
    return json.dumps(results, indent=1) + "\n"
