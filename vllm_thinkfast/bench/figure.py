"""The figure of a bench: speed while decoding, and its ratio to the first model, by batch size."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_thinkfast.bench.report import cell_of
from vllm_thinkfast.bench.settings import Model, Settings


def check_matplotlib() -> None:
    """Raises ValueError if the figure cannot be drawn; before hours of measuring, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figure needs matplotlib: pip install matplotlib, or give --no-figure")


def draw(summary: dict[str, Any], models: Sequence[Model], settings: Settings, path: Path) -> None:
    """Draws a column per kind of batch and length: tokens per second above, ratios below.

    Args:
        summary: of ``report.summarise``.
        models: the first is the reference.
        settings: of the run.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((c.mode, c.num_prompt_tokens, c.num_tokens) for c in settings.cells))
    figure = Figure(figsize=(max(6.0, 4.2 * len(kinds)), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex="col")
    for column, kind in enumerate(kinds):
        speed, ratio = axes[0][column], axes[1][column]
        for model in models:
            points = _points(summary, settings, kind, model.name)
            _line(speed, points, "decode_tokens_per_s", model.name)
            _line(ratio, points, "decode_ratio", model.name)
        mode, prompt, generated = kind
        what = "n samples of one prompt" if mode == "samples" else "separate prompts"
        speed.set_title(f"{what}, {prompt} + {generated} tokens", fontsize=10)
        speed.set_yscale("log")
        for axis in (speed, ratio):
            axis.set_xscale("log", base=2)
            axis.grid(visible=True, alpha=0.3)
        ratio.axhline(1.0, color="black", linewidth=0.8)
        ratio.set_xlabel("sequences decoded at once")
    axes[0][0].set_ylabel("tokens/s while decoding")
    axes[1][0].set_ylabel(f"ratio to {models[0].name}")
    axes[0][0].legend(fontsize=8)
    note = " (machine was shared)" if summary["is_contended"] else ""
    figure.suptitle(
        f"{settings.dtype}, OMP_NUM_THREADS={settings.threads}; median and range, "
        f"rounds: {settings.rounds}{note}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _points(
    summary: dict[str, Any], settings: Settings, kind: tuple[str, int, int], model: str
) -> list[dict[str, Any]]:
    """Summaries of a model's measured cells of one kind, by batch size."""
    cells = [
        cell_of(summary, cell, model)
        for cell in settings.cells
        if (cell.mode, cell.num_prompt_tokens, cell.num_tokens) == kind
    ]
    return sorted((cell for cell in cells if "batch" in cell), key=lambda cell: cell["batch"])


def _line(axis: Any, points: Sequence[dict[str, Any]], name: str, label: str) -> None:
    measured = [point for point in points if point[name] is not None]
    middle = [point[name]["median"] for point in measured]
    below = [point[name]["median"] - point[name]["least"] for point in measured]
    above = [point[name]["most"] - point[name]["median"] for point in measured]
    axis.errorbar(
        [point["batch"] for point in measured],
        middle,
        yerr=[below, above],
        marker="o",
        markersize=4,
        capsize=2,
        label=label,
    )
