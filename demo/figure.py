"""The figure: coverage against samples, and decoding speed, from the result file alone."""

import textwrap
from pathlib import Path
from typing import Any

from demo.report import reported_ks

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
MARKERS = "osD^vP"


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the figure as PNG; the file is complete or absent.

    Args:
        results: what `demo.report.build_results` returned.
        path: the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(7.2, 3.3), layout="constrained", width_ratios=[1.25, 1]
        )
        _draw_coverage(left, results)
        _draw_speed(right, results)
        unfinished = path.with_name(path.name + ".part")
        figure.savefig(unfinished, format="png", dpi=200)
        plt.close(figure)
    unfinished.replace(path)


def _draw_coverage(axes: Any, results: dict[str, Any]) -> None:
    settings = results["run"]["settings"]
    for model, colour, marker in zip(results["models"], COLOURS, MARKERS, strict=False):
        metrics = model["metrics"]
        ks = reported_ks(metrics)
        values = [100 * metrics[f"pass@{k}"] for k in ks]
        errors = [100 * metrics.get(f"pass@{k}_stderr", 0.0) for k in ks]
        low = [max(0.0, v - e) for v, e in zip(values, errors, strict=True)]
        high = [min(100.0, v + e) for v, e in zip(values, errors, strict=True)]
        axes.fill_between(ks, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            ks,
            values,
            "-",
            marker=marker,
            color=colour,
            label=model["label"],
            ms=4.5,
            clip_on=False,
            zorder=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("samples per problem, k")
    axes.set_ylabel("coverage pass@k [%]")
    axes.set_ylim(bottom=0)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, min(100.0, top))
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    problems = len(results["models"][0]["per_problem"])
    axes.set_title(
        f"(a) {problems} problems, N = {settings['num_samples']}; bands: ±1 standard error",
        loc="left",
        fontsize=8.5,
    )


def _draw_speed(axes: Any, results: dict[str, Any]) -> None:
    settings, rounds = results["run"]["settings"], results["speed_rounds"]
    models = results["models"]
    for i, (model, colour) in enumerate(zip(models, COLOURS, strict=False)):
        summary = model["speed"]["decode"]["tokens_per_s"]
        axes.bar(i, summary["median"], 0.55, color=colour, alpha=0.35, edgecolor=colour)
        values = [r[model["name"]]["decode_tokens_per_s"] for r in rounds]
        offsets = [i + 0.3 * (j / max(1, len(values) - 1) - 0.5) for j in range(len(values))]
        axes.plot(offsets, values, "o", color=colour, ms=3.5)
        text = f"{summary['median']:.0f}"
        if i:
            ratio = model["speed"]["decode"]["ratio"]
            times = "\N{MULTIPLICATION SIGN}"
            text += f"\n{ratio['median']:.2f} {times}\n({ratio['min']:.2f} to {ratio['max']:.2f})"
        axes.annotate(
            text, (i, max(summary["median"], *values)), xytext=(0, 4),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
    axes.set_xticks(
        range(len(models)), ["\n".join(textwrap.wrap(m["label"], 18)) for m in models], fontsize=8
    )
    axes.set_xlim(-0.6, len(models) - 0.4)
    axes.set_ylabel("generated tokens per second")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    axes.set_title(
        f"(b) decoding {settings['speed_sequences']} sequences; dots: {len(rounds)} rounds",
        loc="left",
        fontsize=8.5,
    )
