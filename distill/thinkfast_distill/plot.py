"""``thinkfast-distill plot``: the held-out curves of runs, from their logs alone.

KL(student || teacher) and top-1 agreement, or cross entropy where there is no teacher, against the
tokens trained on, with the borders of the stages.
"""

from pathlib import Path
from typing import Any

from thinkfast_distill.recipe import RecipeError
from thinkfast_distill.run_log import LOG_FILE, read_log
from thinkfast_distill.status import read_run_config

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

PANELS = (
    ("reverse_kl", "held-out KL(student || teacher)\n[nats per token]", True),
    ("cross_entropy", "held-out cross entropy\n[nats per token]", True),
    ("top1_agreement", "held-out top-1 agreement\nwith the teacher", False),
    ("top1_accuracy", "held-out top-1 accuracy", False),
)
"""Metric, axis label, logarithmic; a panel is drawn where a run has the metric."""


def held_out(run: Path) -> list[dict[str, Any]]:
    """The held-out records of a run, in order; of a step that was measured again, the last.

    Raises:
        RecipeError: it is no run folder, or nothing was measured yet.
    """
    read_run_config(run)
    records = [r for r in read_log(run / LOG_FILE) if r["event"] == "eval"]
    if not records:
        raise RecipeError(
            f"{run}: nothing measured on held-out data yet; the recipe needs evaluation.data."
        )
    # The end of a stage and the start of the next are two records of one step.
    newest = {(r["stage_index"], r["stage_step"]): r for r in records}
    return [newest[key] for key in sorted(newest)]


def draw(runs: list[Path], out: Path) -> None:
    """Writes the figure; its format follows from the file's name (.png, .pdf, .svg).

    Args:
        runs: run folders; one line each.
        out: file to write.

    Raises:
        RecipeError: no run folder, nothing to draw, a format that does not exist, or matplotlib is
            not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RecipeError("plot needs matplotlib; run: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {run: held_out(run) for run in runs}
    panels = [p for p in PANELS if any(p[0] in r for records in found.values() for r in records)]
    if any("reverse_kl" in r for records in found.values() for r in records):
        panels = [p for p in panels if p[0] in ("reverse_kl", "top1_agreement")]
    style: dict[str, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):  # type: ignore[arg-type]
        figure, grid = plt.subplots(
            1, len(panels), figsize=(3.7 * len(panels), 3.1), layout="constrained", squeeze=False
        )
        for axes, (metric, label, is_log) in zip(grid[0], panels, strict=True):
            for (run, records), colour in zip(found.items(), COLOURS * len(runs), strict=False):
                _draw_run(axes, run.name, records, metric, colour, with_borders=len(runs) == 1)
            axes.set_xlabel("training tokens [millions]")
            axes.set_ylabel(label)
            axes.grid(alpha=0.25, linewidth=0.6)
            if is_log:
                axes.set_yscale("log")
        if len(runs) > 1:
            grid[0][0].legend(frameon=False, fontsize=8)
        else:
            figure.suptitle(runs[0].name, fontsize=9)
        try:
            figure.savefig(out, dpi=200)
        except ValueError as error:  # an unknown format; matplotlib lists those that it knows
            raise RecipeError(f"{out}: {error}") from error
        finally:
            plt.close(figure)


def _draw_run(
    axes: Any, name: str, records: list[dict[str, Any]], metric: str, colour: str,
    *, with_borders: bool,
) -> None:  # fmt: skip
    shown = [r for r in records if metric in r]
    axes.plot(
        [r["tokens"] / 1e6 for r in shown], [r[metric] for r in shown], "o-", ms=2.5, lw=1.3,
        color=colour, label=name,
    )  # fmt: skip
    if not with_borders:
        return
    for stage in dict.fromkeys(r["stage"] for r in records):
        begin = min(r["tokens"] for r in records if r["stage"] == stage) / 1e6
        axes.axvline(begin, color="#888888", lw=0.7, ls=":")
        axes.annotate(
            stage.replace("_", " "), (begin, 0.03), xycoords=("data", "axes fraction"),
            rotation=90, fontsize=7, color="#666666", ha="left", va="bottom",
            xytext=(2, 0), textcoords="offset points",
        )  # fmt: skip
