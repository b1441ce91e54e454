"""One self-contained HTML page: tables, and figures as SVG with hover; no network, no library.

The SVG is complete without JavaScript. The script reads the points from a JSON block and shows the
values nearest to the pointer.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lm_eval_tasks.figures import COLOURS, DASHES, Figure, spread
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
        *(_line(axes, series) for series in figure.series if series.x),
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
        self.scale = 100.0 if figure.is_percent else 1.0
        lines = [line for line in figure.series if line.x]
        xs = [x for line in lines for x in line.x]
        low, high = math.log(min(xs)), math.log(max(xs))
        margin = 0.03 * (high - low) or 0.5
        self.x_range = (low - margin, high + margin)
        top = self.scale * max(max(line.high or line.y) for line in lines) * 1.06 or 1.0
        self.top = min(top, 103.0) if figure.is_percent else top

    def x(self, value: float) -> float:
        """Return the horizontal position of a value."""
        low, high = self.x_range
        share = (math.log(value) - low) / (high - low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        """Return the vertical position of a value in the axis' unit (percent, or as it is)."""
        return round(HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM), 2)

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
        """Return about five round values from zero."""
        rough = self.top / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= rough * 0.999)
        return [step * i for i in range(int(self.top / step + 1e-9) + 1)]


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


def _line(axes: Axes, line: Any) -> str:
    colour = COLOURS[line.colour]
    points = [(axes.x(x), axes.y(axes.scale * y)) for x, y in zip(line.x, line.y, strict=True)]
    parts = []
    if line.low is not None and line.high is not None:
        upper = [
            (axes.x(x), axes.y(axes.scale * y)) for x, y in zip(line.x, line.high, strict=True)
        ]
        lower = [(axes.x(x), axes.y(axes.scale * y)) for x, y in zip(line.x, line.low, strict=True)]
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


def _labels(axes: Axes) -> list[str]:
    """Write each line's name at the right edge, at the height of its end."""
    drawn = [line for line in axes.figure.series if line.x]
    ends = [axes.y(axes.scale * line.y[-1]) for line in drawn]
    places = spread(ends, 14.0, TOP + 6.0, HEIGHT - BOTTOM - 2.0)
    parts = []
    for line, at in zip(drawn, places, strict=True):
        name = line.name if len(line.name) <= 28 else line.name[:27] + "\N{HORIZONTAL ELLIPSIS}"
        parts.append(
            f'<text class=name x="{WIDTH - RIGHT + 6}" y="{at + 4:.1f}" '
            f'style="fill: {COLOURS[line.colour]}">{escape(name)}'
            f"<title>{escape(line.name)}</title></text>"
        )
    return parts
