"""The tables of a study as Markdown."""

from collections.abc import Sequence
from typing import Any

from lm_eval_tasks.prm_study.evaluate import METHODS

_NOTE = (
    "Percent; differences in percentage points with paired 95 % bootstrap intervals over problems. "
    "AUROC: within a problem, over the problems that have right and wrong solutions. Loss: against "
    "the reference, the first row, problem by problem; with the clean scores of another reward "
    "it is the loss of the swap. Below 0 it is a gain."
)
_HEAD = (
    "| scores | AUROC | bon@{k} | - maj@{k} (95 %) | weighted_bon@{k} | - maj@{k} (95 %) "
    "| loss, bon (95 %) | loss, weighted (95 %) |"
)


def render(runs: Sequence[dict[str, Any]], k: int) -> str:
    """Return one table per run, all values in percent or percentage points.

    Args:
        runs: studies of `study_run`, each with ``name``.
        k: subset size of the table.
    """
    lines: list[str] = []
    for run in runs:
        majority, coverage = run["majority"][str(k)], run["coverage"][str(k)]
        summary = (
            f"{run['num_problems']} problems, {_samples(run)} samples each. "
            f"maj@{k} {_interval(majority)}, pass@1 {_interval(run['pass@1'])}, "
            f"pass@{k} {_interval(coverage)}."
        )
        lines += [
            f"### {run['name']}",
            "",
            summary,
            "",
            _HEAD.format(k=k),
            "| --- |" + " ---: |" * 7,
        ]
        lines += [_row(one, k) for one in run["conditions"]]
        lines.append("")
    lines += [_NOTE, ""]
    return "\n".join(lines)


def _samples(run: dict[str, Any]) -> str:
    low, high = run["num_samples"]
    return str(low) if low == high else f"{low} to {high}"


def _row(one: dict[str, Any], k: int) -> str:
    auroc = "-" if one["auroc"] is None else f"{one['auroc']:.3f}"
    cells = [one["label"], auroc]
    for method in METHODS:
        found = one[method][str(k)]
        cells += [_percent(found["value"]), _interval(found["minus_majority"], is_signed=True)]
    for method in METHODS:
        loss = one[method][str(k)].get("loss_to_reference")
        cells.append("reference" if loss is None else _interval(loss, is_signed=True))
    return "| " + " | ".join(cells) + " |"


def _percent(value: float, is_signed: bool = False) -> str:
    return f"{100 * value:{'+' if is_signed else ''}.1f}"


def _interval(found: dict[str, float], is_signed: bool = False) -> str:
    value, low, high = (_percent(found[name], is_signed) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
