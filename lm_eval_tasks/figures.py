"""The figures of a report as data: what each shows, from the group's numbers alone.

`plots` draws them as PNG, `html_report` as SVG with hover, `tables` writes them as CSV; all three
show the same points.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

METHOD_LABELS = {
    "pass": "coverage",
    "coverage": "coverage",
    "maj": "majority",
    "bon": "Best-of-N",
    "weighted_bon": "weighted Best-of-N",
}

_SLUGS = {"maj": "majority", "weighted_bon": "weighted-bon"}
#: Okabe and Ito's palette, which colour-blind readers can tell apart, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: Dash patterns (matplotlib and SVG): the second cue beside colour.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))


@dataclass(frozen=True)
class Series:
    """One line of a figure."""

    name: str
    """What the label says."""
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    """Ends of the band around y."""
    colour: int = 0
    """Position in `COLOURS`: the same for a model in all figures."""
    dash: int = 0
    """Position in `DASHES`."""
    has_markers: bool = False
    """Points were measured at these x only; else the line is a curve. Points have bars instead of a
    band, and stand beside each other where they share their x."""
    on_front: list[bool] | None = None
    """Which points no line of the figure beats at the same or a smaller x; None: not computed."""


@dataclass(frozen=True)
class Figure:
    """One figure with its axes."""

    name: str
    """Of the file."""
    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    x_base: int = 10
    """Of the logarithmic x axis."""
    is_percent: bool = True
    """Values of y are shares, shown in percent."""
    note: str = ""
    """What the bands are, and what else must be known to read it."""
    sharing_y: Sequence[Series] = ()
    """Lines of a figure beside this one, which has the same y axis so that both can be compared."""

    @property
    def band_opacity(self) -> float:
        """Of the bands; where many lie over each other the lines must still be seen."""
        return 0.12 if len(self.series) <= 3 else 0.07

    @property
    def scale(self) -> float:
        """What a value is multiplied with to be shown."""
        return 100.0 if self.is_percent else 1.0

    @property
    def y_limits(self) -> tuple[float, float]:
        """Ends of the y axis as shown: from 0, except shares that all lie far above it."""
        lines = [line for line in (*self.series, *self.sharing_y) if line.x]
        high = self.scale * max(max(line.high or line.y) for line in lines)
        low = self.scale * min(min(line.low or line.y) for line in lines)
        top = high * 1.06 or 1.0
        if not self.is_percent:
            return 0.0, top
        top = min(top, 103.0)
        return (10.0 * math.floor(low / 10) if low > top / 3 else 0.0), top

    def shifts(self) -> list[float]:
        """Return for each line the factor on x that keeps points of equal x apart."""
        if self.x_base != 2 or not all(line.has_markers for line in self.series):
            return [1.0] * len(self.series)
        step = min(0.13, 0.45 / len(self.series))
        middle = (len(self.series) - 1) / 2
        return [2.0 ** (step * (i - middle)) for i in range(len(self.series))]

    def front(self) -> list[tuple[int, float, float]]:
        """Return (colour, from x, to x) of the stretches on which a line is the best so far."""
        points = sorted(
            (x, line.colour)
            for line in self.series
            for x, is_on in zip(line.x, line.on_front or [], strict=False)
            if is_on
        )
        if not points:
            return []
        ends = [x for x, _ in points[1:]] + [max(line.x[-1] for line in self.series if line.x)]
        stretches: list[tuple[int, float, float]] = []
        for (x, colour), end in zip(points, ends, strict=True):
            if stretches and stretches[-1][0] == colour:
                stretches[-1] = (colour, stretches[-1][1], end)
            else:
                stretches.append((colour, x, end))
        return stretches

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(line.x for line in self.series)


def figures_of(group: dict[str, Any], level: float) -> list[Figure]:
    """Return the figures of a group, without those that have no data.

    Args:
        group: of `lm_eval_tasks.analysis.analyse`.
        level: of the intervals.
    """
    methods = [m for m in METHOD_LABELS if any(f"{m}@1" in run["metrics"] for run in group["runs"])]
    votes = [method for method in methods if method != "pass"]
    unit = _unit(group)
    problems = f"over {group['num_problems']} problems"
    over_k = f"bars: {100 * level:g}% bootstrap intervals {problems}"
    over_tokens = f"{100 * level:g}% bootstrap bands {problems}"
    shown = [method for method in votes if method != "bon"]
    lines = {method: _over_k(group, method) for method in ("pass", *shown)}
    found = [
        Figure(
            "coverage-vs-k",
            "Coverage against samples",
            "samples per problem, k",
            "coverage, pass@k [%]",
            lines["pass"],
            x_base=2,
            note=over_k,
        ),
    ]
    for method in shown:
        slug, label = _SLUGS.get(method, method), METHOD_LABELS[method]
        found.append(
            Figure(
                f"{slug}-vs-k",
                f"{label[0].upper()}{label[1:]} against samples",
                "samples per problem, k",
                _share_label(method),
                lines[method],
                x_base=2,
                note=over_k,
                sharing_y=[line for other in shown for line in lines[other]],
            )
        )
    timed = _time_note(group, level)
    for method in ("coverage", "maj", "bon", "weighted_bon"):
        slug, label = _SLUGS.get(method, method), METHOD_LABELS[method]
        found.append(
            Figure(
                f"{slug}-vs-seconds",
                f"{label[0].upper()}{label[1:]} against time",
                _with_reward(unit, group, method),
                _share_label(method),
                _over_cost(group, method, "seconds"),
                note=timed,
            )
        )
    for method in ("coverage", "maj"):
        slug, label = _SLUGS.get(method, method), METHOD_LABELS[method]
        found.append(
            Figure(
                f"{slug}-vs-tokens",
                f"{label[0].upper()}{label[1:]} against generated tokens",
                "generated tokens per problem",
                _share_label(method),
                _over_cost(group, method, "tokens"),
                note=over_tokens,
            )
        )
    found += [_throughput(group), _composed(group)]
    return [figure for figure in found if not figure.is_empty]


def _share_label(method: str) -> str:
    return "coverage [%]" if method == "coverage" else f"accuracy of {METHOD_LABELS[method]} [%]"


def _unit(group: dict[str, Any]) -> str:
    if group["regime"] == "latency":
        return "seconds since the problem was submitted"
    return "server seconds per problem"


def _with_reward(unit: str, group: dict[str, Any], method: str) -> str:
    curves = [c for c in group["curves"] if c["method"] == method and c["axis"] == "seconds"]
    if any(curve["with_reward_time"] for curve in curves):
        return f"{unit}, reward model included"
    return unit


def _time_note(group: dict[str, Any], level: float) -> str:
    bands = f"{100 * level:g}% bootstrap bands over {group['num_problems']} problems"
    if len(group["runs"]) > 1:
        bands += "; strip: the run on the Pareto front"
    if group["regime"] == "latency":
        return f"{bands}; one problem at a time; {in_flight(group)}"
    return f"{bands}; saturated server; a line ends where its samples do"


def in_flight(group: dict[str, Any]) -> str:
    """Return how many samples of a problem ran together: the load under which latencies hold.

    Args:
        group: of the regime "latency". Where its runs drew other numbers of samples, or a kill
            divided a problem, ``k`` samples are judged and more or fewer ran beside them.
    """
    loads = {run["name"]: _load(run, group["k"]) for run in group["runs"]}
    if set(loads.values()) == {str(group["k"])}:
        return f"{group['k']} samples in flight"
    known = ", ".join(f"{load} ({name})" for name, load in loads.items())
    return f"{group['k']} samples of each problem, in flight together: {known}"


def _load(run: dict[str, Any], k: int) -> str:
    low, high = run["facts"].get("load", (k, k))  # not in reports of earlier versions
    return str(low) if low == high else f"{low} to {high}"


def _colours(group: dict[str, Any]) -> dict[str, int]:
    return {run["name"]: i % len(COLOURS) for i, run in enumerate(group["runs"])}


def _over_k(group: dict[str, Any], method: str) -> list[Series]:
    colours = _colours(group)
    lines = []
    for run in group["runs"]:
        points = [run["metrics"][f"{method}@{k}"] for k in run["ks"]]
        lines.append(
            Series(
                run["name"],
                [float(k) for k in run["ks"]],
                [point["value"] for point in points],
                [point["low"] for point in points],
                [point["high"] for point in points],
                colours[run["name"]],
                has_markers=True,
            )
        )
    return lines


def _over_cost(group: dict[str, Any], method: str, axis: str) -> list[Series]:
    colours = _colours(group)
    is_loaded = axis == "seconds" and group["regime"] == "latency"
    loads = {run["name"]: _load(run, group["k"]) for run in group["runs"]} if is_loaded else {}
    front = {(p["run"], p["seconds"]) for p in group["fronts"] if p["method"] == method}
    lines = []
    for curve in group["curves"]:
        if (curve["method"], curve["axis"]) != (method, axis):
            continue
        name = curve["run"]
        if len(set(loads.values())) > 1:
            name += f" ({loads[name]} in flight)"
        lines.append(
            Series(
                name,
                curve["x"],
                curve["y"],
                curve["low"],
                curve["high"],
                colours[curve["run"]],
                on_front=[(curve["run"], x) in front for x in curve["x"]]
                if front and axis == "seconds"
                else None,
            )
        )
    return lines


def _measured(
    group: dict[str, Any], y_of: Callable[[dict[str, Any]], dict[str, float]]
) -> list[Series]:
    colours = _colours(group)
    lines = []
    for run in group["runs"]:
        rows = run["throughput"]
        if rows:
            points = [y_of(row) for row in rows]
            lines.append(
                Series(
                    run["name"],
                    [float(row["batch_size"]) for row in rows],
                    [point["median"] for point in points],
                    [point["low"] for point in points],
                    [point["high"] for point in points],
                    colours[run["name"]],
                    has_markers=True,
                )
            )
    return lines


def _throughput(group: dict[str, Any]) -> Figure:
    rows = [row for run in group["runs"] for row in run["throughput"]]
    note = ""
    if rows:
        rounds = rows[0]["rounds"]
        note = (
            f"{rows[0]['num_prompt_tokens']} prompt and {rows[0]['num_tokens']} new tokens per "
            "sequence, prefill included; "
        )
        spread_text = f"bars: timing spread, least to most of {rounds} rounds"
        note += spread_text if rounds > 1 else "one round: no spread"
    return Figure(
        "throughput-vs-batch",
        "Generation speed against batch size",
        "sequences at once",
        "generated tokens per second",
        _measured(group, lambda row: row["tokens_per_s"]),
        x_base=2,
        is_percent=False,
        note=note,
    )


def _composed(group: dict[str, Any]) -> Figure:
    """Pass@k at the time of a batch of k: as the paper plots it, not a run that was timed."""
    colours = _colours(group)
    lines = []
    for run in group["runs"]:
        rows = [row for row in run["throughput"] if row["batch_size"] in run["ks"]]
        points = [run["metrics"][f"pass@{row['batch_size']}"] for row in rows]
        if len(rows) > 1:
            lines.append(
                Series(
                    run["name"],
                    [row["seconds"]["median"] for row in rows],
                    [point["value"] for point in points],
                    [point["low"] for point in points],
                    [point["high"] for point in points],
                    colours[run["name"]],
                    has_markers=True,
                )
            )
    return Figure(
        "composed-coverage-vs-seconds",
        "Composed: pass@k against the time of a batch of k",
        "seconds for k sequences of fixed length",
        "coverage, pass@k [%]",
        lines,
        note="not one run: lengths and speed are of the throughput measurement, coverage of the "
        "samples",
    )


def end_order(series: Sequence[Series]) -> list[int]:
    """Return the lines from the lowest to the highest, where the first of them ends.

    Args:
        series: not empty; x ascending.
    """
    common = min(line.x[-1] for line in series)
    heights = [
        max((x, y) for x, y in zip(line.x, line.y, strict=True) if x <= common)[1]
        if line.x[0] <= common
        else line.y[0]
        for line in series
    ]
    return sorted(range(len(series)), key=lambda i: (heights[i], series[i].y[-1]))


def spread(
    positions: Sequence[float],
    gap: float,
    low: float,
    high: float,
    order: Sequence[int] | None = None,
) -> list[float]:
    """Move label positions apart by the smallest squared distance in all.

    Args:
        positions: where the labels belong.
        gap: smallest distance.
        low: lowest position allowed; given up where there is no room.
        high: highest position allowed.
        order: of the labels from low to high; that of their positions by default.

    Returns:
        New positions in the order of ``positions``.
    """
    if order is None:
        order = sorted(range(len(positions)), key=lambda i: positions[i])
    # With the gaps taken out this is a rising fit: neighbours that would cross share their mean.
    groups: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        mean, count = positions[i] - place * gap, 1
        while groups and groups[-1][0] > mean:
            other, size = groups.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        groups.append((mean, count))
    flat = [mean for mean, count in groups for _ in range(count)]
    highest = high - (len(positions) - 1) * gap
    result = [0.0] * len(positions)
    for place, (i, at) in enumerate(zip(order, flat, strict=True)):
        result[i] = min(max(at, low), highest) + place * gap
    return result
