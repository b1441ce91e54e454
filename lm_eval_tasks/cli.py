"""Command line ``thinkfast-eval``: draw samples, score them, count what they are worth.

Exit codes: 0 when everything asked for was done; 2 for a mistake that the message says how to mend,
and for a server or disk that gave up (what was done is kept); 130 when interrupted.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence

from lm_eval_tasks.errors import InputError

#: Subcommand -> one-line help. The module is lm_eval_tasks.commands.<name with underscores>.
COMMANDS = {
    "sample": "draw N samples per problem from vLLM or a server; resumes where it stopped",
    "score": "extract the answers of stored samples and grade them",
    "reward": "score the steps of stored samples with a process reward model",
    "prm-study": "what weighted Best-of-N loses when the reward model gets worse",
    "compare": "run or read several models: coverage and accuracy against k and seconds",
    "report": "write tables, figures and settings of runs as Markdown and HTML",
    "plot": "draw the figures of runs",
    "adaptive": "what stopping decided votes early saves: report such a run, or replay another",
}
_DISTRIBUTION = "vllm-thinkfast"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="thinkfast-eval",
        description="Samples, votes and rewards against k and against seconds.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        # Only the named command's module is imported; the others are one line in the help.
        is_named = bool(given) and given[0] == name
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", add_help=is_named
        )
        if is_named:
            module = importlib.import_module(f"lm_eval_tasks.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
            # As it is stored beside results.
            line = shlex.join([parser.prog, *given])
            command.set_defaults(run=module.run, command_line=line)
    try:
        options = parser.parse_args(given)
        code: int = options.run(options)
    except InputError:
        return 2  # the message is out already
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{parser.prog} {given[0]}: interrupted; what was finished is kept\n")
        return 130
    return code


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the version and leave."""
        from importlib.metadata import version

        sys.stdout.write(f"{version(_DISTRIBUTION)}\n")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
