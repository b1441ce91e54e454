"""Command line: ``thinkfast-distill run | status | plot | export``.

Exit codes: 0 when everything asked for was done; 2 when it was not, with one line that names the
cause and the fix (a mistake in the recipe or the data, no space left, a loss that is not finite);
143 after SIGTERM and 130 after an interrupt, both with the state saved.
"""

# ruff: noqa: T201  (a command line prints)

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinkfast_distill import __version__

_EPILOG = """examples:
  thinkfast-distill run distill/recipes/arith-llamba-tiny.yaml
  thinkfast-distill run distill/recipes/llama-3.2-1b-llamba.yaml --dry-run
  torchrun --nproc-per-node 8 -m thinkfast_distill.cli run distill/recipes/llama-3.2-1b-llamba.yaml
  thinkfast-distill run RECIPE --run-dir runs/try stages.end_to_end.lr=2e-5 seed=1
  thinkfast-distill status runs/arith-llamba-tiny
  thinkfast-distill export runs/arith-llamba-tiny my-model
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = _parser()
    # argparse does not find positionals that come after options; overrides may stand anywhere.
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (
        rest and options.verb != "run"
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    # Imported late: --help need not wait for torch.
    from thinkfast_distill.checkpoint import CheckpointError
    from thinkfast_distill.loop import Interrupted, TrainingError

    try:
        code: int = options.run(options)
    except (ValueError, OSError, ImportError, CheckpointError, TrainingError) as error:
        # ImportError: of an optional package, with its install line.
        return _fail(options.verb, error, 2)
    except Interrupted as request:
        return _fail(options.verb, f"stopped by {request}, state saved", 128 + request.signum)
    return code


def _fail(verb: str, error: object, code: int) -> int:
    text = " ".join(str(error).split())
    print(f"thinkfast-distill {verb}: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="thinkfast-distill",
        description="Distil Llama models into Llamba and MambaInLlama students.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    run = verbs.add_parser("run", help="start a recipe, or continue where it stopped")
    run.add_argument("recipe", type=Path, help="YAML file")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    run.add_argument("--run-dir", type=Path, help="run folder (default: runs/NAME)")
    run.add_argument("--dry-run", action="store_true", help="show recipe and costs, do nothing")
    run.add_argument("--max-steps", type=int, help="stop, saved, after this many steps of the run")
    run.add_argument("--quiet", action="store_true", help="no progress line")
    run.add_argument("--json", action="store_true", help="machine-readable output")
    run.set_defaults(run=_run)

    status = verbs.add_parser("status", help="how far a run is")
    status.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    status.add_argument("--json", action="store_true", help="machine-readable output")
    status.set_defaults(run=_status)

    plot = verbs.add_parser("plot", help="draw the held-out curves of runs")
    plot.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")
    plot.add_argument("out", type=Path, metavar="OUT", help="file to write: .png, .pdf or .svg")
    plot.set_defaults(run=_plot)

    export = verbs.add_parser("export", help="write a Hugging Face folder that vLLM serves")
    export.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    export.add_argument("--json", action="store_true", help="machine-readable output")
    export.set_defaults(run=_export)
    return parser


def _run(options: argparse.Namespace) -> int:
    from thinkfast_distill import config as config_module

    if options.max_steps is not None and options.max_steps < 1:
        raise ValueError(f"--max-steps {options.max_steps}: must be at least 1")
    config = config_module.load(options.recipe, options.overrides)
    if options.dry_run:
        from thinkfast_distill import dry_run

        report = dry_run.report(config)
        print(json.dumps(report, indent=2) if options.json else dry_run.render(config, report))
        return 0
    from thinkfast_distill import distributed, parts
    from thinkfast_distill.loop import Trainer

    folder = options.run_dir or Path("runs") / config.name
    world = distributed.start(config.compute)
    try:
        trainer = Trainer(
            config, folder, world, max_steps=options.max_steps, show_progress=not options.quiet
        )
        if world.is_main and not options.quiet:
            for line in parts.contamination_notes(config):
                print(line, file=sys.stderr)
        progress = trainer.train()
    finally:
        distributed.stop(world)
    if not world.is_main:
        return 0
    is_finished = progress.stage == len(config.stages)
    if options.json:
        result = {"run": str(folder), "is_finished": is_finished, **vars(progress)}
        print(json.dumps(result, indent=2))
    elif is_finished:
        print(f"{folder}: finished after {progress.step} steps, {progress.tokens:,} tokens")
        print(f"next: thinkfast-distill export {folder} OUT")
    else:
        print(f"{folder}: stopped after {progress.step} steps; the same command continues")
    return 0


def _status(options: argparse.Namespace) -> int:
    from thinkfast_distill import status

    found: dict[str, Any] = status.read_status(options.run_dir)
    print(json.dumps(found, indent=2) if options.json else status.render(found))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from thinkfast_distill import plot

    plot.draw(options.run_dirs, options.out)
    print(f"{options.out}: written")
    return 0


def _export(options: argparse.Namespace) -> int:
    from thinkfast_distill import export_run

    folder = export_run.export_run(options.run_dir, options.out)
    if options.json:
        print(json.dumps({"folder": str(folder)}))
    else:
        print(f"{folder}: written; serve it with: vllm serve {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
