"""The figures of a study: gain over the majority vote, and loss against the reference reward."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import stop

#: Okabe and Ito's palette, told apart by colour-blind readers and in grey with the markers.
_STYLE = {
    "clean": ("#000000", "*", "clean"),
    "noise": ("#0072B2", "o", "noise on log-odds"),
    "flip": ("#D55E00", "s", "ranks mirrored"),
    "label": ("#CC79A7", "^", "labels flipped"),
    "shuffle": ("#009E73", "D", "scores shuffled"),
    "oracle": ("#E69F00", "v", "verifier with errors"),
}
#: What the levels of a family are.
_LEVELS = {
    "noise": "spreads",
    "flip": "share",
    "label": "share",
    "shuffle": "share",
    "oracle": "rate",
}
_TITLES = {"bon": "Best-of-{k}", "weighted_bon": "Weighted Best-of-{k}"}
#: Of the rewards' clean scores, the reference first.
_REWARD_MARKERS = ("*", "P", "X", "h", "d", "<", ">")


def require_matplotlib() -> None:
    """Refuse early where the figure cannot be drawn.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        stop("the figure needs matplotlib: pip install matplotlib, or leave it out: --no-figure")


def draw(runs: Sequence[dict[str, Any]], k: int, folder: Path) -> list[Path]:
    """Draw both figures, one row per run: Best-of-k on the left, weighted on the right.

    ``prm_study`` shows the gain over the majority vote against the quality of the scores;
    ``prm_loss`` what every change of the reference reward costs. Degraded scores of other rewards
    are in the table only.

    Args:
        runs: studies of `study_run`, each with ``name``.
        k: subset size.
        folder: where ``.png`` and ``.svg`` of both go.

    Returns:
        The files.

    Raises:
        InputError: a file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    with plt.rc_context({"font.size": 9, "svg.hashsalt": "prm-study"}):
        for name, drawn in (("prm_study", _gain), ("prm_loss", _loss)):
            figure = drawn(plt, runs, k)
            try:
                paths += [_save(figure, folder / f"{name}.{kind}") for kind in ("png", "svg")]
            finally:
                plt.close(figure)
    return paths


def _save(figure: Any, path: Path) -> Path:
    """Write a figure that is complete or absent."""
    kind = path.suffix.removeprefix(".")
    unfinished = path.with_name(path.name + ".part")
    try:
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(unfinished, format=kind, dpi=200, metadata=metadata)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        stop(
            f"{path}: cannot be written ({error.strerror or error}); table and JSON are there: "
            "free space or rights and run again, or leave the figure out: --no-figure"
        )
    return path


# -- gain over the majority vote ------------------------------------------------------------------


def _gain(plt: Any, runs: Sequence[dict[str, Any]], k: int) -> Any:
    figure, grid = plt.subplots(
        len(runs), 2, figsize=(7.2, 3.1 * len(runs) + 0.9), sharey="row", squeeze=False
    )
    for run, row in zip(runs, grid, strict=True):
        for method, axes in zip(_TITLES, row, strict=True):
            _draw_gains(axes, run, method, k)
        row[0].set_ylabel(f"{_name(run, runs)}accuracy minus majority of {k}\n(percentage points)")
    for axes in grid[-1]:
        axes.set_xlabel("AUROC of the scores within a problem")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        found, labels = axes.get_legend_handles_labels()
        for label, handle in zip(labels, found, strict=True):
            handles.setdefault(label, handle)
    rows = -(-len(handles) // 4)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, fontsize=8
    )
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, (0.19 * rows + 0.05) / height, 1, 1))
    return figure


def _draw_gains(axes: Any, run: dict[str, Any], method: str, k: int) -> None:
    key = str(k)
    majority = run["majority"][key]["value"]
    coverage, first = run["coverage"][key]["value"], run["pass@1"]["value"]
    for value, line, label in (
        (majority, "-", f"majority of {k}"),
        (coverage, ":", f"coverage (pass@{k})"),
        (first, "--", "one sample (pass@1)"),
    ):
        axes.axhline(100 * (value - majority), color="0.35", lw=1, ls=line, label=label)
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    clean: dict[str, dict[str, Any]] = {}
    reference = _reference(run)
    for one in run["conditions"]:
        if one["auroc"] is None:
            continue
        if one["family"] == "clean":
            clean.setdefault(one["reward"], one)  # the aggregation of the degraded ones is first
        elif one["reward"] in (None, reference["reward"]):
            lines[one["family"]].append(one)

    def errorbar(
        points: list[dict[str, Any]], colour: str, marker: str, label: str, **style: Any
    ) -> None:
        gains = [one[method][key]["minus_majority"] for one in points]
        y, bars = _percent_bars(gains)
        style = {"lw": 1.1, "elinewidth": 0.7, "ms": 4, "label": label} | style
        x = [one["auroc"] for one in points]
        axes.errorbar(x, y, yerr=bars, color=colour, marker=marker, **style)

    for family, points in lines.items():
        begin = [clean[reference["reward"]]] if family != "oracle" and clean else []
        errorbar([*begin, *points], *_STYLE[family])
    for (reward, one), marker in zip(clean.items(), _REWARD_MARKERS * 8, strict=False):
        size = 9 if marker == "*" else 6
        style = {"ms": size, "ls": "", "mec": "white", "mew": 0.5, "zorder": 4}
        errorbar([one], "black", marker, f"clean ({reward})", **style)
    axes.axvline(0.5, color="0.8", lw=0.8, zorder=0)
    axes.set_title(_TITLES[method].format(k=k))
    axes.grid(axis="y", color="0.93", zorder=0)
    _open_frame(axes)


# -- loss against the reference -------------------------------------------------------------------


def _loss(plt: Any, runs: Sequence[dict[str, Any]], k: int) -> Any:
    groups = [_groups(run) for run in runs]
    heights = [sum(len(rows) + 1.3 for _, _, rows in found) for found in groups]
    total = 0.165 * sum(heights) + 0.75 * len(runs) + 0.5
    figure, grid = plt.subplots(
        len(runs), 2, figsize=(7.2, total), sharey="row", sharex=True, squeeze=False,
        layout="constrained", height_ratios=[max(1, height) for height in heights],
    )  # fmt: skip
    for run, found, row in zip(runs, groups, grid, strict=True):
        for method, axes in zip(_TITLES, row, strict=True):
            _draw_losses(axes, found, method, str(k))
            axes.set_title(_TITLES[method].format(k=k))
        row[0].set_ylabel(_name(run, runs).strip())
        label = _reference(run)["label"]
        for axes in row:
            axes.set_xlabel(f"accuracy lost against {label}\n(percentage points; hollow: may be 0)")
    return figure


def _groups(run: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, dict[str, Any]]]]]:
    """Return title, colour and labelled conditions of each group of rows."""
    reference = _reference(run)
    swaps, aggregations = [], []
    families: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for one in run["conditions"]:
        is_own = one["reward"] == reference["reward"]
        if one["family"] != "clean":
            if is_own or one["reward"] is None:
                families[one["family"]].append((f"{one['level']:g}", one))
        elif not is_own and one["aggregation"] == reference["aggregation"]:
            swaps.append((one["reward"], one))
        elif is_own and one is not reference:
            aggregations.append((one["aggregation"], one))
    groups = [
        ("another reward", _STYLE["clean"][0], swaps),
        ("another aggregation", "0.45", aggregations),
        *(
            (f"{_STYLE[family][2]}, {_LEVELS[family]}", _STYLE[family][0], rows)
            for family, rows in families.items()
        ),
    ]
    return [group for group in groups if group[2]]


def _draw_losses(
    axes: Any,
    groups: Sequence[tuple[str, str, Sequence[tuple[str, dict[str, Any]]]]],
    method: str,
    key: str,
) -> None:
    """Draw one line per condition, from the top; hollow where the interval holds 0."""
    place, ticks = 0.0, []
    for title, colour, rows in groups:
        ticks.append((place, title, colour, True))
        for label, one in rows:
            place += 1
            ticks.append((place, label, colour, False))
            loss = one[method][key]["loss_to_reference"]
            (x,), bars = _percent_bars([loss])
            is_clear = loss["low"] > 0 or loss["high"] < 0
            face = colour if is_clear else "white"
            axes.errorbar(
                [x], [place], xerr=bars, color=colour, marker="o", ms=4, mfc=face, elinewidth=1.0
            )
        place += 1.3
    axes.axvline(0, color="0.35", lw=1, zorder=0)
    axes.grid(axis="x", color="0.93", zorder=0)
    axes.set_ylim(place - 0.6, -0.8)
    axes.set_yticks([tick[0] for tick in ticks], [tick[1] for tick in ticks], fontsize=7.5)
    # The panel on the right shares the axis and has no labels.
    for text, (_, _, colour, is_title) in zip(axes.get_yticklabels(), ticks, strict=False):
        if is_title:
            text.set_color(colour)
            text.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    _open_frame(axes)


def _reference(run: dict[str, Any]) -> dict[str, Any]:
    """Return the condition that losses are measured against."""
    found: dict[str, Any] = next(one for one in run["conditions"] if one["family"] == "clean")
    return found


def _name(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    return f"{run['name']}\n" if len(runs) > 1 else ""


def _percent_bars(found: Sequence[dict[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Return values in percent, and the lengths of their bars below and above."""
    values = [100 * one["value"] for one in found]
    below = [value - 100 * one["low"] for value, one in zip(values, found, strict=True)]
    above = [100 * one["high"] - value for value, one in zip(values, found, strict=True)]
    return values, [[max(0.0, length) for length in side] for side in (below, above)]


def _open_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
