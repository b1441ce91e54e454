"""The figure of a study: gain over the majority vote against the quality of the scores."""

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
_TITLES = {"bon": "Best-of-{k}", "weighted_bon": "Weighted Best-of-{k}"}
_FILLS = ("full", "none", "left", "right")


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
    """Draw one row per run: Best-of-k on the left, weighted on the right.

    Args:
        runs: studies of `study_run`, each with ``name``.
        k: subset size.
        folder: where ``prm_study.png`` and ``.svg`` go.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 9, "svg.hashsalt": "prm-study"}):
        figure, grid = plt.subplots(
            len(runs), 2, figsize=(7.2, 3.1 * len(runs) + 0.9), sharey="row", squeeze=False
        )
        rewards = list(dict.fromkeys(c["reward"] for run in runs for c in run["conditions"]))
        fills = dict(zip([name for name in rewards if name], _FILLS * 8, strict=False))
        for run, row in zip(runs, grid, strict=True):
            for method, axes in zip(_TITLES, row, strict=True):
                _draw_panel(axes, run, method, k, fills)
            name = f"{run['name']}\n" if len(runs) > 1 else ""
            row[0].set_ylabel(f"{name}accuracy minus majority of {k}\n(percentage points)")
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
        paths = [folder / f"prm_study.{kind}" for kind in ("png", "svg")]
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=200, metadata=metadata)
        plt.close(figure)
    return paths


def _draw_panel(axes: Any, run: dict[str, Any], method: str, k: int, fills: dict[str, str]) -> None:
    key = str(k)
    majority = run["majority"][key]["value"]
    coverage, first = run["coverage"][key]["value"], run["pass@1"]["value"]
    for value, line, label in (
        (majority, "-", f"majority of {k}"),
        (coverage, ":", f"coverage (pass@{k})"),
        (first, "--", "one sample (pass@1)"),
    ):
        axes.axhline(100 * (value - majority), color="0.35", lw=1, ls=line, label=label)
    lines: dict[tuple[str, str | None], list[dict[str, Any]]] = defaultdict(list)
    clean: dict[str | None, dict[str, Any]] = {}
    for one in run["conditions"]:
        if one["auroc"] is None:
            continue
        if one["family"] == "clean":
            clean.setdefault(one["reward"], one)  # the aggregation of the degraded ones is first
        else:
            lines[one["family"], one["reward"]].append(one)

    def errorbar(
        family: str, reward: str | None, points: list[dict[str, Any]], **style: Any
    ) -> None:
        colour, marker, text = _STYLE[family]
        gains = [one[method][key]["minus_majority"] for one in points]
        y = [100 * gain["value"] for gain in gains]
        below = [value - 100 * gain["low"] for value, gain in zip(y, gains, strict=True)]
        above = [100 * gain["high"] - value for value, gain in zip(y, gains, strict=True)]
        bars = [[max(0.0, length) for length in side] for side in (below, above)]
        label = f"{text} ({reward})" if family == "clean" else text
        style = {"lw": 1.1, "elinewidth": 0.7, "ms": 4, "label": label} | style
        style["fillstyle"] = fills.get(reward or "", "full")
        x = [one["auroc"] for one in points]
        axes.errorbar(x, y, yerr=bars, color=colour, marker=marker, **style)

    for (family, reward), points in lines.items():
        errorbar(family, reward, [clean[reward], *points] if reward in clean else points)
    for reward, one in clean.items():
        errorbar("clean", reward, [one], ms=9, ls="", zorder=4)
    axes.axvline(0.5, color="0.8", lw=0.8, zorder=0)
    axes.set_title(_TITLES[method].format(k=k))
    axes.grid(axis="y", color="0.93", zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
