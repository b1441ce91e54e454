"""``thinkfast-eval adaptive``: what early stops save.

A run that was drawn with them (``thinkfast-eval sample --stop-error``) is reported as it is, and
against a uniform run; a uniform run is replayed, as if decided problems had been left alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_tasks.adaptive import reallocation, replay, savings
from lm_eval_tasks.analysis import Run, Settings, load_run
from lm_eval_tasks.early_stops import figures_of, load_stopped, tables_of
from lm_eval_tasks.errors import stop
from lm_eval_tasks.figures import Figure, Series
from lm_eval_tasks.html_report import details_html, figure_html, page, settings_html, table_html
from lm_eval_tasks.jsonl import write_atomically
from lm_eval_tasks.plots import draw_figures
from lm_eval_tasks.provenance import commands_of, settings_markdown
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.stopping import HIGHEST_ERROR, StopRule
from lm_eval_tasks.tables import Table, what_was_run

_DEFAULT_ERRORS = [0.2, 0.1, 0.05, 0.01, 0.0]
#: Options of the replay and their defaults; a run with early stops has its own rule.
_REPLAY = {"error": _DEFAULT_ERRORS, "least_votes": 1, "orders": 32, "seed": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, all drawn with early stops or all without",
    )
    parser.epilog = (
        "Runs of thinkfast-eval sample --stop-error are reported as they are: the accuracy of each "
        "vote at its stop, and what was spent. Other runs are replayed: what stops would have "
        "saved. Both need finished, scored runs; a run with early stops scores itself."
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="UNIFORM_RUN",
        help="a scored run of the same model, problems and settings without early stops: the "
        "accuracy difference, and the samples and seconds saved at equal accuracy",
    )
    replayed = parser.add_argument_group("replay of runs without early stops")
    replayed.add_argument(
        "--error",
        type=float,
        nargs="+",
        metavar="LEVEL",
        help="stop when the second answer would overtake the first with at most this posterior "
        "probability; 0: when the stored samples cannot change the vote "
        f"({' '.join(f'{level:g}' for level in _DEFAULT_ERRORS)})",
    )
    replayed.add_argument("--least-votes", type=int, help="of the leader before a stop (1)")
    replayed.add_argument("--orders", type=int, help="random orders of the samples (32)")
    replayed.add_argument("--seed", type=int, help="of the orders (0)")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write adaptive.html, .md, .json and PNGs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    Raises:
        InputError: a value is out of range, or a folder is no scored run.
    """
    if options.draws < 100:
        stop(f"--draws {options.draws}: need a whole number of at least 100")
    given = [name for name in _REPLAY if getattr(options, name) is not None]
    for name, value in _REPLAY.items():
        if name not in given:
            setattr(options, name, value)
    for level in options.error:
        if not 0 <= level < HIGHEST_ERROR:
            stop(f"--error {level:g}: need 0 or more and below 0.5")
    for flag, value, least in (
        ("--least-votes", options.least_votes, 1),
        ("--orders", options.orders, 1),
        ("--seed", options.seed, 0),
    ):
        if value < least:
            stop(f"{flag} {value}: need a whole number of at least {least}")
    _refuse_equal_names(options.runs)
    found: list[dict[str, Any]]
    report: _Report
    if _has_early_stops(options.runs):
        if given:
            stop(
                f"--{given[0].replace('_', '-')} is for the replay of runs without early stops; "
                f"{options.runs[0]} was drawn with its own rule: leave the option out"
            )
        found = [load_stopped(run, options.against, options.draws) for run in options.runs]
        report = _Report(
            found,
            tables_of(found),
            figures_of(found),
            "Sampling with early stops",
        )
    else:
        if options.against is not None:
            stop(
                f"--against {options.against}: {options.runs[0]} was drawn without early stops; "
                "give a run of thinkfast-eval sample --stop-error"
            )
        found = [_replay_run(load_run(folder, Settings()), options) for folder in options.runs]
        report = _Replayed(found).report()
    if options.out is not None:
        report.write(options.out, options.command_line)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        for table in report.tables:
            sys.stdout.write(f"{table.title}\n\n{table.markdown()}\n")
    return 0


def _has_early_stops(folders: Sequence[Path]) -> bool:
    """Return whether all runs have early stops, or none.

    Raises:
        InputError: they differ, or a folder is no run folder.
    """
    has = [StopRule.of(SampleStore(folder).config()) is not None for folder in folders]
    if any(has) and not all(has):
        with_stops, without = folders[has.index(True)], folders[has.index(False)]
        stop(
            f"{with_stops} was drawn with early stops and {without} without: report one kind at a "
            f"time, or compare them with thinkfast-eval adaptive {with_stops} --against {without}"
        )
    return all(has)


def _refuse_equal_names(folders: Sequence[Path]) -> None:
    """Refuse runs that tables could not tell apart, and whose figures would have one file name.

    Raises:
        InputError: two runs have one name, or a folder is no run folder.
    """
    names = [SampleStore(folder).config()["name"] for folder in folders]
    files = list(map(_file_name, names))
    for name, file in zip(names, files, strict=True):
        if files.count(file) > 1:
            stop(f"two runs are named {name}; give one another name in its config.json")


def _file_name(name: str) -> str:
    return f"adaptive-{name.replace('/', '-')}"


def _replay_run(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    problems = list(run.samples.values())
    if not any(one.cost_s > 0 for drawn in problems for one in drawn):
        stop(f"{run.folder}: its samples took no time, so there is none to save")
    levels = []
    for error in options.error:
        found = replay(problems, error, options.orders, options.least_votes, options.seed)
        levels.append(
            {
                "error": error,
                "savings": savings(found, draws=options.draws),
                "reallocation": reallocation(found, draws=options.draws),
            }
        )
    return {
        "run": run.name,
        "folder": str(run.folder),
        "config": run.config,
        "sessions": run.sessions,
        "grading": run.grading,
        "facts": run.facts,
        "orders": options.orders,
        "draws": options.draws,
        "least_votes": options.least_votes,
        "levels": levels,
    }


@dataclass(frozen=True)
class _Replayed:
    """The text and the figures of replays."""

    runs: Sequence[dict[str, Any]]

    def report(self) -> "_Report":
        """Return what is printed and written."""
        title = "What stopping decided votes early saves"
        return _Report(self.runs, self.tables(), self.figures(), title)

    def tables(self) -> list[Table]:
        """Return what stopping saves, what the saved time buys, and what it was replayed on."""
        facts = [{"name": run["run"], "facts": run["facts"]} for run in self.runs]
        regimes = {run["config"]["regime"] for run in self.runs}
        regime = "latency" if "latency" in regimes else "saturated"
        return [self._stopping(), self._equal_accuracy(), what_was_run(regime, facts)]

    def _stopping(self) -> Table:
        rows = []
        for run in self.runs:
            for level in run["levels"]:
                s = level["savings"]
                rows.append(
                    [
                        run["run"],
                        f"{level['error']:g}",
                        *(_range(s[name], 100, 1) for name in ("samples_saved", "seconds_saved")),
                        _range(s["accuracy_all"], 100, 1),
                        _range(s["accuracy_change"], 100, 2),
                        _range(s["changed_votes"], 100, 2),
                    ]
                )
        header = ["run", "error level", "samples saved", "seconds saved", "accuracy of all"]
        header += ["change by stopping", "votes changed"]
        note = (
            "In percent and percentage points, majority vote; in brackets 95% paired bootstrap "
            "intervals over problems, mean over random orders of the stored samples. The error "
            "level is a posterior probability for one look; the last column is what happened."
        )
        return Table("Stopping decided votes", header, rows, note)

    def _equal_accuracy(self) -> Table:
        rows = []
        for run in self.runs:
            for level in run["levels"]:
                for target in level["reallocation"]["targets"]:
                    never = "not reached"
                    saved = target["saved"]
                    ends = [target["low"], target["high"]]
                    share = never if saved is None else f"{100 * saved:.0f} %"
                    low, high = (never if e is None else f"{100 * e:.0f}" for e in ends)
                    rows.append(
                        [
                            run["run"],
                            f"{level['error']:g}",
                            f"{100 * target['accuracy']:.1f} %",
                            f"{target['uniform_s']:.4g}",
                            never if saved is None else f"{target['adaptive_s']:.4g}",
                            f"{share} ({low} to {high})",
                            f"{100 * target['share_not_reached']:.0f} %",
                        ]
                    )
        header = ["run", "error level", "accuracy", "uniform [s]", "adaptive [s]", "time saved"]
        header.append("draws that miss it")
        note = (
            "Seconds per problem in which each policy reaches the accuracy that uniform sampling "
            "has at a quarter, half, three quarters and all of its time. The adaptive policy gives "
            "the time of decided problems to the others, as far as stored samples reach."
        )
        return Table("Time for equal accuracy", header, rows, note)

    def figures(self) -> list[Figure]:
        """Return one figure per run: both policies against time."""
        found = []
        for run in self.runs:
            lines = []
            for i, level in enumerate(run["levels"]):
                curves = level["reallocation"]
                if not i:
                    lines.append(_series("uniform", curves["x"], curves["uniform"], 6))
                name = f"error {level['error']:g}"
                lines.append(_series(name, curves["x"], curves["adaptive"], i % 6))
            found.append(
                Figure(
                    _file_name(run["run"]),
                    f"{run['run']}: majority vote with early stops",
                    "server seconds per problem",
                    "majority within the time [%]",
                    lines,
                    note=f"95% bootstrap bands over {run['facts']['num_problems']} problems, "
                    f"{run['orders']} random orders of the samples",
                )
            )
        return found


@dataclass(frozen=True)
class _Report:
    """What the command prints and writes."""

    runs: Sequence[dict[str, Any]]
    tables: Sequence[Table]
    figures: Sequence[Figure]
    title: str

    def write(self, folder: Path, command: str) -> None:
        """Write text, page, figures and numbers."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            stop(f"--out {folder}: cannot be made ({error.strerror}); give another folder")
        title, tables, figures = self.title, self.tables, self.figures
        numbers = {"command": command, "runs": list(self.runs)}
        write_atomically(folder / "adaptive.json", json.dumps(numbers, indent=1) + "\n")
        drawn = [figure_html(figure, i) for i, figure in enumerate(figures)]
        sections = ["<div class=charts>", *drawn, "</div>", *map(table_html, tables)]
        runs = [one for run in self.runs for one in (run, run.get("against")) if one]
        commands = [*commands_of(runs), command]
        sections.append(details_html("Commands", "\n".join(commands)))
        for run in runs:
            sections += settings_html(run["run"], run)
        write_atomically(folder / "adaptive.html", page(title, sections, figures))
        text = [f"# {title}\n", f"`{command}`\n"]
        text += [f"![{figure.title}]({figure.name}.png)\n" for figure in figures]
        for table in tables:
            text += [f"## {table.title}\n", table.markdown()]
        text += ["## Commands\n", "```text", *commands, "```\n", "## Settings of the runs\n"]
        for run in runs:
            text += settings_markdown(run["run"], run)
        write_atomically(folder / "adaptive.md", "\n".join(text))
        draw_figures(figures, folder)


def _range(interval: dict[str, float], scale: float, digits: int) -> str:
    value, low, high = (f"{scale * interval[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _series(name: str, x: list[float], curve: dict[str, list[float]], colour: int) -> Series:
    return Series(name, x, curve["y"], curve["low"], curve["high"], colour)
