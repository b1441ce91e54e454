"""Draw the figures as PNG with matplotlib, each alone and all on one sheet."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import stop
from lm_eval_tasks.figures import COLOURS, DASHES, Figure, end_order, spread

MARKERS = "osD^vPX"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_PANEL_INCHES = (4.8, 3.3)
_NOTE_CHARACTERS = 72
#: A longer label of the x axis takes two lines; it would stand out of the narrow axes.
_LABEL_CHARACTERS = 40
#: More lines than this do not fit beside the axes; they get a legend below.
_MOST_DIRECT_LABELS = 6


def draw_figures(figures: Sequence[Figure], folder: Path, dpi: int = 200) -> list[Path]:
    """Write ``<name>.png`` for each figure, and ``overview.png`` with all of them.

    Args:
        figures: not empty ones only.
        folder: is made if it is missing.
        dpi: dots per inch.

    Returns:
        The files.

    Raises:
        InputError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        stop('figures need matplotlib: pip install "vllm-thinkfast[plots]"')
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    with plt.rc_context(_STYLE):
        for figure in figures:
            written.append(_save(plt, [figure], folder / f"{figure.name}.png", 1, dpi))
        if len(figures) > 1:
            written.append(_save(plt, figures, folder / "overview.png", 2, dpi))
    return written


def _save(plt: Any, figures: Sequence[Figure], path: Path, columns: int, dpi: int) -> Path:
    rows = math.ceil(len(figures) / columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows)
    sheet, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    flat = panels.ravel()
    for panel, figure in zip(flat, figures, strict=False):
        _draw(panel, figure)
    for panel in flat[len(figures) :]:
        panel.set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        sheet.savefig(unfinished, format="png", dpi=dpi)
        unfinished.replace(path)
    except OSError as error:
        stop(f"{path}: cannot be written ({error.strerror}); give another folder with --out")
    finally:
        plt.close(sheet)
    return path


def _draw(axes: Any, figure: Figure) -> None:
    scale = figure.scale
    for number, (line, shift) in enumerate(zip(figure.series, figure.shifts(), strict=True)):
        colour = COLOURS[line.colour]
        xs = [shift * x for x in line.x]
        if line.low is not None and line.high is not None:
            low, high = ([scale * value for value in end] for end in (line.low, line.high))
            if line.has_markers:
                axes.vlines(xs, low, high, color=colour, alpha=0.55, linewidth=1.0, zorder=2)
            else:
                axes.fill_between(
                    xs, low, high, color=colour, alpha=figure.band_opacity, linewidth=0
                )
        axes.plot(
            xs,
            [scale * value for value in line.y],
            color=colour,
            linestyle=(0, DASHES[line.dash]) if DASHES[line.dash] else "-",
            linewidth=1.3,
            marker=MARKERS[number % len(MARKERS)] if line.has_markers else None,
            markersize=3.6,
            label=line.name,
            zorder=3,
        )
    axes.set_xscale("log", base=figure.x_base)
    _set_ticks(axes, figure)
    axes.set_xlabel(textwrap.fill(figure.x_label, _LABEL_CHARACTERS))
    axes.set_ylabel(figure.y_label)
    axes.set_ylim(*figure.y_limits)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    strip = _draw_front(axes, figure)
    note = textwrap.fill(figure.note, _NOTE_CHARACTERS)
    num_lines = len(note.splitlines())
    axes.set_title(figure.title, fontweight="bold", pad=8 + 8 * num_lines + 5 * strip)
    if note:
        place = {"transform": axes.transAxes, "va": "bottom"}
        axes.text(0, 1.055 if strip else 1.03, note, fontsize=6.2, color="0.35", **place)
    if len(figure.series) <= _MOST_DIRECT_LABELS:
        _label_lines(axes, figure, scale)
    else:
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _set_ticks(axes: Any, figure: Figure) -> None:
    """Label the measured x on a base-2 axis; elsewhere decades, and more where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if figure.x_base == 2:
        places = sorted({x for line in figure.series for x in line.x})
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()
        return
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_xlim()
    if high / low < 200:
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_front(axes: Any, figure: Figure) -> bool:
    """Draw above the axes which line is the best so far; return whether there is such a strip."""
    stretches = figure.front()
    for colour, start, end in stretches:
        axes.plot(
            [start, end],
            [1.02, 1.02],
            transform=axes.get_xaxis_transform(),
            color=COLOURS[colour],
            linewidth=3.5,
            solid_capstyle="butt",
            clip_on=False,
        )
    if stretches:
        axes.annotate(
            "Pareto front",
            xy=(1.0, 1.02),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            color="0.35",
            fontsize=6.2,
            va="center",
            annotation_clip=False,
        )
    return bool(stretches)


def _label_lines(axes: Any, figure: Figure, scale: float) -> None:
    """Write each line's name at its right end, in the order of the lines, with a leader to it."""
    bottom, top = axes.get_ylim()
    drawn = [line for line in figure.series if line.x]
    ends = [scale * line.y[-1] for line in drawn]
    gap = 0.065 * (top - bottom)
    places = spread(ends, gap, bottom + gap / 2, top - gap / 2, end_order(drawn))
    for line, end, at in zip(drawn, ends, places, strict=True):
        colour = COLOURS[line.colour]
        axes.annotate(
            line.name,
            xy=(1.0, end),
            xycoords=("axes fraction", "data"),
            xytext=(1.045, at),
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=7.5,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
