"""``thinkfast-eval report``: tables, figures, settings and commands of scored runs.

Needs the run folders only: neither models nor data sets, no torch, no vllm.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from lm_eval_tasks.analysis import Settings
from lm_eval_tasks.errors import stop
from lm_eval_tasks.report import build_results, write_report
from lm_eval_tasks.rewards.aggregation import AGGREGATIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="scored run folders; others are compared with the first of their task",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder to write (%(default)s)"
    )
    parser.add_argument("--title", default="Evaluation report")
    add_analysis_arguments(parser)
    parser.add_argument("--no-png", action="store_true", help="without matplotlib: no PNG files")


def add_analysis_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that decide how numbers are computed; `settings_of` reads them."""
    default = Settings()
    how = parser.add_argument_group("how to compute")
    how.add_argument(
        "--reward", metavar="NAME", help="with Best-of-N by these scores (files in RUN/scores)"
    )
    how.add_argument(
        "--aggregation", choices=AGGREGATIONS, help=f"of step scores ({default.aggregation})"
    )
    how.add_argument(
        "--reward-time",
        action="store_true",
        help="count the reward model's seconds in what uses it",
    )
    how.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="seconds between which areas are taken (what all runs have)",
    )
    how.add_argument("--level", type=float, help=f"of the intervals ({default.level})")
    how.add_argument("--draws", type=int, help=f"bootstrap ({default.draws})")
    how.add_argument(
        "--orders",
        type=int,
        metavar="R",
        help=f"random orders of the samples of a problem ({default.num_orders})",
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings given on the command line, and the defaults of the others.

    Raises:
        InputError: a value is out of range.
    """
    given = {
        field: getattr(options, name)
        for name, field in (
            ("aggregation", "aggregation"),
            ("level", "level"),
            ("draws", "draws"),
            ("orders", "num_orders"),
        )
        if getattr(options, name) is not None
    }
    settings = replace(Settings(), **given)
    if not 0 < settings.level < 1:
        stop(f"--level {settings.level}: need a number between 0 and 1")
    if settings.draws < 100:
        stop(f"--draws {settings.draws}: need at least 100 for percentiles")
    if settings.num_orders < 2:
        stop(f"--orders {settings.num_orders}: need at least 2 for an error")
    if options.reward_time and options.reward is None:
        stop("--reward-time needs the scores whose seconds count; name them with --reward")
    window = None
    if options.window is not None:
        window = (options.window[0], options.window[1])
        if not 0 < window[0] < window[1]:
            stop(f"--window {window[0]:g} {window[1]:g}: need two ascending times above 0")
    return replace(
        settings,
        reward=options.reward,
        with_reward_time=options.reward_time,
        window=window,
    )


def given_analysis_options(options: argparse.Namespace) -> list[str]:
    """Return those of the options of `add_analysis_arguments` that the command line has."""
    names = ("reward", "aggregation", "reward_time", "window", "level", "draws", "orders")
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if getattr(options, name) not in (None, False)
    ]


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    Raises:
        InputError: see the modules it calls.
    """
    settings = settings_of(options)
    results = build_results(options.runs, settings, options.command_line)
    write_report(results, options.out, options.title, with_png=not options.no_png)
    sys.stdout.write(f"{options.out / 'report.md'}\n{options.out / 'report.html'}\n")
    return 0
