"""One self-contained HTML page: tables, and figures as SVG with hover; no network, no library.

The SVG is complete without JavaScript. The script reads the points from a JSON block and shows the
values nearest to the pointer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lm_eval_tasks.figures import COLOURS, DASHES, Figure, Series, end_order, spread
from lm_eval_tasks.provenance import session_rows
from lm_eval_tasks.tables import Table

WIDTH, HEIGHT = 660, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 190, 12, 48


def page(title: str, sections: Sequence[str], figures: Sequence[Figure]) -> str:
    """Return the page.

    Args:
        title: of the page.
        sections: HTML, figures among it from `figure_html`.
        figures: those in the sections, in the order of their numbers.
    """
    folder = files("lm_eval_tasks") / "assets"
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = (folder / "report.js").read_text(encoding="utf-8")
    # "<" cannot end the block then, whatever a run is called.
    data = json.dumps([_hover_data(figure) for figure in figures]).replace("<", "\\u003c")
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + f'\n</main>\n<script type="application/json" id="points">{data}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def table_html(table: Table) -> str:
    """Return a table with its heading."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>\n<div class=scroll><table>\n<thead><tr>{head}</tr></thead>"
        f"\n<tbody>\n{rows}</tbody>\n</table></div>\n{note}"
    )


def details_html(title: str, text: str) -> str:
    """Return preformatted text that opens with a click."""
    return f"<details><summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre>\n</details>"


def settings_html(name: str, run: Mapping[str, Any]) -> list[str]:
    """Return the folded settings and sessions of a run.

    Args:
        name: of the run.
        run: ``folder``, ``config``, and what `lm_eval_tasks.provenance.session_rows` reads.
    """
    config = json.dumps(run["config"], indent=1, ensure_ascii=False)
    sessions = json.dumps(dict(session_rows(run)), indent=1, ensure_ascii=False)
    return [
        details_html(f"Settings of {name} ({run['folder']})", config),
        details_html(f"Sessions of {name}", sessions),
    ]


def figure_html(figure: Figure, number: int) -> str:
    """Return a figure.

    Args:
        figure: what to draw.
        number: its position among the figures given to `page`.
    """
    axes = Axes(figure)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<figure class=chart data-figure="{number}">',
        f"<figcaption><b>{escape(figure.title)}</b>",
        f"<br><span class=note>{escape(figure.note)}</span></figcaption>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(figure.title)}">',
        *_frame(axes),
        *(
            _line(axes, series, shift)
            for series, shift in zip(figure.series, figure.shifts(), strict=True)
            if series.x
        ),
        *_front(axes),
        *_labels(axes),
        f'<line class=cursor y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/>',
        f'<rect class=catch x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>',
        "</svg>",
        "<div class=tip></div>",
        "</figure>",
    ]
    return "\n".join(parts)


class Axes:
    """Where values lie in the picture."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.scale = figure.scale
        lines = [line for line in figure.series if line.x]
        xs = [x for line in lines for x in line.x]
        low, high = math.log(min(xs)), math.log(max(xs))
        margin = 0.03 * (high - low) or 0.5
        self.x_range = (low - margin, high + margin)
        self.bottom, self.top = figure.y_limits

    def x(self, value: float) -> float:
        """Return the horizontal position of a value."""
        low, high = self.x_range
        share = (math.log(value) - low) / (high - low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        """Return the vertical position of a value in the axis' unit (percent, or as it is)."""
        share = (value - self.bottom) / (self.top - self.bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)

    def x_ticks(self) -> list[float]:
        """Return the measured places on a base-2 axis, else decades or parts of them."""
        if self.figure.x_base == 2:
            return sorted({x for line in self.figure.series for x in line.x})
        low, high = (math.exp(end) for end in self.x_range)
        parts = (1, 2, 5) if high / low < 200 else (1,)
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [part * 10.0**exponent for exponent in exponents for part in parts]
        return [tick for tick in ticks if low <= tick <= high]

    def y_ticks(self) -> list[float]:
        """Return about five round values."""
        rough = (self.top - self.bottom) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= rough * 0.999)
        first = math.ceil(self.bottom / step - 1e-9)
        return [step * i for i in range(first, int(self.top / step + 1e-9) + 1)]


def _hover_data(figure: Figure) -> dict[str, Any]:
    """Return the points in picture coordinates and as they shall be read."""
    axes = Axes(figure)
    return {
        "xLabel": figure.x_label,
        "unit": " %" if figure.is_percent else "",
        "series": [
            {
                "name": line.name,
                "colour": COLOURS[line.colour],
                "px": [axes.x(value) for value in line.x],
                "x": [float(f"{value:.4g}") for value in line.x],
                "y": [round(axes.scale * value, 2) for value in line.y],
                "low": [round(axes.scale * value, 2) for value in line.low or []],
                "high": [round(axes.scale * value, 2) for value in line.high or []],
                "front": [int(is_on) for is_on in line.on_front or []],
            }
            for line in figure.series
            if line.x
        ],
    }


def _frame(axes: Axes) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in axes.y_ticks():
        at = axes.y(tick)
        parts.append(f'<line class=grid x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class=tick x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{tick:g}')
        parts[-1] += "</text>"
    for tick in axes.x_ticks():
        at = axes.x(tick)
        parts.append(f'<line class=axis x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text class=tick x="{at}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (TOP + bottom) / 2
    x_label, y_label = escape(axes.figure.x_label), escape(axes.figure.y_label)
    parts += [
        f'<line class=axis x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<line class=axis x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{bottom}"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>',
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{y_label}',
        "</text>",
    ]
    return parts


def _line(axes: Axes, line: Series, shift: float) -> str:
    def places(values: Sequence[float]) -> list[tuple[float, float]]:
        pairs = zip(line.x, values, strict=True)
        return [(axes.x(shift * x), axes.y(axes.scale * y)) for x, y in pairs]

    colour = COLOURS[line.colour]
    points = places(line.y)
    parts = []
    if line.low is not None and line.high is not None and line.has_markers:
        parts += [
            f'<line class=bar x1="{x}" x2="{x}" y1="{low}" y2="{high}" stroke="{colour}"/>'
            for (x, low), (_, high) in zip(places(line.low), places(line.high), strict=True)
        ]
    elif line.low is not None and line.high is not None:
        upper, lower = places(line.high), places(line.low)
        outline = " ".join(f"{x},{y}" for x, y in [*upper, *reversed(lower)])
        opacity = axes.figure.band_opacity
        parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity="{opacity}"/>')
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = " ".join(f"{1.5 * part:g}" for part in DASHES[line.dash])
    style = f' stroke-dasharray="{dash}"' if dash else ""
    parts.append(f'<polyline class=line points="{path}" stroke="{colour}"{style}/>')
    if line.has_markers:
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
    return "\n".join(parts)


def _front(axes: Axes) -> list[str]:
    """Draw above the axes which line is the best so far."""
    parts = []
    for colour, start, end in axes.figure.front():
        left, right = axes.x(start), axes.x(end)
        parts.append(
            f'<rect x="{left}" y="{TOP - 9}" width="{right - left:.2f}" height="5" '
            f'fill="{COLOURS[colour]}"/>'
        )
    if parts:
        parts.append(f'<text class=tick x="{WIDTH - RIGHT + 13}" y="{TOP - 3}">Pareto front</text>')
    return parts


def _labels(axes: Axes) -> list[str]:
    """Write each line's name at the right edge, in the order of the lines, with a leader to it."""
    drawn = [line for line in axes.figure.series if line.x]
    ends = [axes.y(axes.scale * line.y[-1]) for line in drawn]
    order = end_order(drawn)[::-1]  # pictures count from the top
    places = spread(ends, 14.0, TOP + 6.0, HEIGHT - BOTTOM - 2.0, order)
    parts = []
    edge = WIDTH - RIGHT
    for line, end, at in zip(drawn, ends, places, strict=True):
        name = line.name if len(line.name) <= 28 else line.name[:27] + "\N{HORIZONTAL ELLIPSIS}"
        colour = COLOURS[line.colour]
        parts.append(
            f'<line class=leader x1="{edge}" y1="{end}" x2="{edge + 11}" y2="{at:.1f}" '
            f'stroke="{colour}"/>'
            f'<text class=name x="{edge + 13}" y="{at + 4:.1f}" '
            f'style="fill: {colour}">{escape(name)}'
            f"<title>{escape(line.name)}</title></text>"
        )
    return parts
