"""``thinkfast-eval plot``: the figures of runs, or of an earlier report, without the text."""

import argparse
import sys
from pathlib import Path

from lm_eval_tasks.commands.report import (
    add_analysis_arguments,
    given_analysis_options,
    settings_of,
)
from lm_eval_tasks.errors import stop
from lm_eval_tasks.report import build_results, read_results, write_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="scored run folders; or one results.json of a report, whose numbers are drawn again",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), help="folder to write (%(default)s)"
    )
    parser.add_argument("--title", default="Figures")
    add_analysis_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    Raises:
        InputError: see the modules it calls.
    """
    files = [path for path in options.runs if path.is_file()]
    if files and len(options.runs) > 1:
        stop(f"{files[0]}: give either one results.json or run folders")
    if files:
        given = given_analysis_options(options)
        if given:
            stop(
                f"{given[0]}: {files[0]} holds numbers that are computed already; make them anew "
                f"with thinkfast-eval report RUN {given[0]} ..., or leave the option out"
            )
        results = read_results(files[0])
    else:
        results = build_results(options.runs, settings_of(options), options.command_line)
    write_figures(results, options.out, options.title)
    sys.stdout.write(f"{options.out / 'report.html'}\n{options.out / 'figures'}\n")
    return 0
