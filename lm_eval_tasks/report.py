"""Write a report: Markdown, one HTML page, figures as PNG, and the numbers as JSON and CSV.

All of it comes from ``results.json``, which `build_results` makes from run folders; figures can be
drawn again from that file alone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lm_eval_tasks import html_report
from lm_eval_tasks.analysis import Settings, analyse, load_run
from lm_eval_tasks.errors import stop
from lm_eval_tasks.figures import Figure, figures_of
from lm_eval_tasks.html_report import details_html, figure_html, settings_html, table_html
from lm_eval_tasks.jsonl import read_object, write_atomically
from lm_eval_tasks.plots import draw_figures
from lm_eval_tasks.provenance import commands_of, settings_markdown
from lm_eval_tasks.tables import Table, figure_csv, regime_text, tables_of

RESULTS = "results.json"
FORMAT = 1
_HOW_MADE = ("created", "command", "git_commit", "versions", "hardware", "settings")


def build_results(
    folders: Sequence[Path], settings: Settings, command: str, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Analyse run folders.

    Args:
        folders: scored runs; the first of each task is the baseline of its group.
        settings: how to compute.
        command: that was given.
        notes: sentences that the report shows on top.

    Raises:
        InputError: a folder is no scored run; see `lm_eval_tasks.analysis`.
    """
    from lm_eval_tasks.sampling import environment

    runs = [load_run(folder, settings) for folder in folders]
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "notes": list(notes),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "git_commit": environment.git_commit(),
        "settings": asdict(settings),
        "groups": analyse(runs, settings),
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read ``results.json`` of an earlier report.

    Raises:
        InputError: it is none.
    """
    results = read_object(path)
    if results.get("format") != FORMAT:
        stop(
            f"{path}: format {results.get('format')!r}, this version reads {FORMAT}; make it again "
            "with thinkfast-eval report"
        )
    kinds: dict[str, type] = {"settings": dict, "groups": list, "notes": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(results.get(name), kind)]
    wrong += [name for name in _HOW_MADE if name not in results]
    if not wrong and not isinstance(results["settings"].get("level"), float | int):
        wrong = ["settings.level"]
    if wrong:
        stop(
            f"{path}: fields missing or of a wrong type: {', '.join(dict.fromkeys(wrong))}; make "
            "it again with thinkfast-eval report"
        )
    return results


def write_report(results: dict[str, Any], folder: Path, title: str, with_png: bool = True) -> None:
    """Write ``report.md``, ``report.html``, ``results.json``, ``points.csv`` and ``figures/``.

    Args:
        results: of `build_results`.
        folder: is made if it is missing; files of an earlier report are replaced.
        title: of the report.
        with_png: draw the PNG files, which needs matplotlib.

    Raises:
        InputError: the folder cannot be written, or matplotlib is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out {folder}: cannot be made ({error.strerror}); give another folder")
    write_atomically(folder / RESULTS, json.dumps(_plain(results), indent=1) + "\n")
    figures = figures_by_group(results)
    write_figures(results, folder, title, with_png)
    level = results["settings"]["level"]
    write_atomically(folder / "report.md", _markdown(results, figures, title, level, with_png))


def write_figures(results: dict[str, Any], folder: Path, title: str, with_png: bool = True) -> None:
    """Write the HTML page, the CSV and the PNG files; see `write_report`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out {folder}: cannot be made ({error.strerror}); give another folder")
    figures = figures_by_group(results)
    level = results["settings"]["level"]
    write_atomically(folder / "report.html", _html(results, figures, title, level))
    points = [(name, figure) for name, drawn in figures.items() for figure in drawn]
    write_atomically(folder / "points.csv", figure_csv(points))
    if with_png:
        for name, drawn in figures.items():
            draw_figures(drawn, folder / "figures" / name)


def figures_by_group(results: dict[str, Any]) -> dict[str, list[Figure]]:
    """Return the figures of each group under a name fit for a folder."""
    level = results["settings"]["level"]
    found: dict[str, list[Figure]] = {}
    for group in results["groups"]:
        name = f"{group['task']}-{group['regime']}"
        if name in found:  # the same task in two versions
            name += f"-{group['task_version']}"
        found[name] = figures_of(group, level)
    return found


def _plain(value: Any) -> Any:
    """Replace what JSON does not have: NaN, where fewer than k samples exist, is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- the two texts --------------------------------------------------------------------------------


def _heading(group: dict[str, Any]) -> str:
    names = ", ".join(run["name"] for run in group["runs"])
    return f"{group['task']} (version {group['task_version']}): {names}"


def _introduction(group: dict[str, Any]) -> str:
    text = f"{group['num_problems']} problems; regime {regime_text(group)}."
    left_out = {name: count for name, count in group["problems_left_out"].items() if count}
    if left_out:
        parts = ", ".join(f"{count} of {name}" for name, count in left_out.items())
        text += f" Only problems that every run has are compared; left out: {parts}."
    return text


def _how_made(results: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, results[name]) for name in _HOW_MADE]


def _markdown(
    results: dict[str, Any],
    figures: dict[str, list[Figure]],
    title: str,
    level: float,
    with_png: bool,
) -> str:
    parts = [f"# {title}\n", *(f"{note}\n" for note in results["notes"])]
    for group, (name, drawn) in zip(results["groups"], figures.items(), strict=True):
        parts += [f"## {_heading(group)}\n", f"{_introduction(group)}\n"]
        first, *others = tables_of(group, level)
        parts += [f"### {first.title}\n", first.markdown()]
        if with_png:
            for figure in drawn:
                parts.append(f"![{figure.title}](figures/{name}/{figure.name}.png)\n")
                parts.append(f"{figure.title}. {figure.note[:1].upper()}{figure.note[1:]}.\n")
        for table in others:
            parts += [f"### {table.title}\n", table.markdown()]
        parts += ["### Commands\n", "```text", *commands_of(group["runs"]), "```\n"]
        parts.append("### Settings of the runs\n")
        parts += [part for run in group["runs"] for part in settings_markdown(run["name"], run)]
    if results.get("steps"):
        parts += ["## Steps of the comparison\n", "```text", *results["steps"], "```\n"]
    parts.append("## How this report was made\n")
    parts.append(_settings_table(results).markdown())
    return "\n".join(parts)


def _settings_table(results: dict[str, Any]) -> Table:
    rows = [
        [name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for name, value in _how_made(results)
    ]
    return Table("How this report was made", ["", "value"], rows)


def _html(
    results: dict[str, Any], figures: dict[str, list[Figure]], title: str, level: float
) -> str:
    from html import escape

    sections = [f"<p>{escape(note)}</p>" for note in results["notes"]]
    numbered: list[Figure] = []
    for group, drawn in zip(results["groups"], figures.values(), strict=True):
        sections.append(f"<h2>{escape(_heading(group))}</h2><p>{escape(_introduction(group))}</p>")
        first, *others = tables_of(group, level)
        sections.append(table_html(first))
        charts = [figure_html(figure, len(numbered) + i) for i, figure in enumerate(drawn)]
        numbered += drawn
        sections += ["<h3>Figures</h3>\n<div class=charts>", *charts, "</div>"]
        sections += [table_html(table) for table in others]
        sections.append(details_html("Commands", "\n".join(commands_of(group["runs"]))))
        sections += [
            section for run in group["runs"] for section in settings_html(run["name"], run)
        ]
    if results.get("steps"):
        sections.append(details_html("Steps of the comparison", "\n".join(results["steps"])))
    sections.append(table_html(_settings_table(results)))
    return html_report.page(title, sections, numbered)
