"""The figures of a report as data: what each shows, from the group's numbers alone.

`plots` draws them as PNG, `html_report` as SVG with hover, `tables` writes them as CSV; all three
show the same points.
"""

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

_SHORT = {"maj": "majority", "weighted_bon": "weighted"}
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
    """Points were measured at these x only; else the line is a curve."""


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

    @property
    def band_opacity(self) -> float:
        """Of the bands; where many lie over each other the lines must still be seen."""
        return 0.15 if len(self.series) <= 3 else 0.08

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
    over_k = f"{100 * level:g}% bootstrap bands over {group['num_problems']} problems"
    found = [
        Figure(
            "coverage-vs-k",
            "Coverage against samples",
            "samples per problem, k",
            "coverage, pass@k [%]",
            _over_k(group, ["pass"]),
            x_base=2,
            note=over_k,
        ),
        Figure(
            "accuracy-vs-k",
            f"Majority{' and weighted Best-of-N' if 'bon' in methods else ''} against samples",
            "samples per problem, k",
            "accuracy [%]",
            _over_k(group, [method for method in votes if method != "bon"]),
            x_base=2,
            note=over_k,
        ),
    ]
    timed = _time_note(group, level)
    for method in ("coverage", "maj", "bon", "weighted_bon"):
        slug = {"maj": "majority", "weighted_bon": "weighted-bon"}.get(method, method)
        label = METHOD_LABELS[method]
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
        slug = {"maj": "majority"}.get(method, method)
        label = METHOD_LABELS[method]
        found.append(
            Figure(
                f"{slug}-vs-tokens",
                f"{label[0].upper()}{label[1:]} against generated tokens",
                "generated tokens per problem",
                _share_label(method),
                _over_cost(group, method, "tokens"),
                note=over_k,
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
    if group["regime"] == "latency":
        return f"{bands}; one problem at a time, {group['k']} samples in flight"
    return f"{bands}; saturated server; a line ends where its samples do"


def _colours(group: dict[str, Any]) -> dict[str, int]:
    return {run["name"]: i % len(COLOURS) for i, run in enumerate(group["runs"])}


def _over_k(group: dict[str, Any], methods: Sequence[str]) -> list[Series]:
    colours = _colours(group)
    lines = []
    for dash, method in enumerate(methods):
        for run in group["runs"]:
            points = [run["metrics"][f"{method}@{k}"] for k in run["ks"]]
            suffix = f", {_SHORT[method]}" if len(methods) > 1 else ""
            lines.append(
                Series(
                    run["name"] + suffix,
                    [float(k) for k in run["ks"]],
                    [point["value"] for point in points],
                    [point["low"] for point in points],
                    [point["high"] for point in points],
                    colours[run["name"]],
                    dash,
                    has_markers=True,
                )
            )
    return lines


def _over_cost(group: dict[str, Any], method: str, axis: str) -> list[Series]:
    colours = _colours(group)
    return [
        Series(
            curve["run"],
            curve["x"],
            curve["y"],
            curve["low"],
            curve["high"],
            colours[curve["run"]],
        )
        for curve in group["curves"]
        if curve["method"] == method and curve["axis"] == axis
    ]


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
        note = (
            f"{rows[0]['num_prompt_tokens']} prompt and {rows[0]['num_tokens']} new tokens per "
            f"sequence, prefill included; bands: range of {rows[0]['rounds']} rounds"
        )
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


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart, each as little as possible in turn.

    Args:
        positions: where the labels belong.
        gap: smallest distance.
        low: lowest position allowed.
        high: highest position allowed; given up where there is no room.

    Returns:
        New positions in the order of ``positions``.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(positions)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result
