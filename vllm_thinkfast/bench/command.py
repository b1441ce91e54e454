"""``thinkfast bench``: options, and the way from them to the files of a run folder."""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_thinkfast.bench import environment
from vllm_thinkfast.bench.process import WorkerError
from vllm_thinkfast.bench.settings import (
    DTYPES,
    LOAD_FORMATS,
    Engines,
    Model,
    Settings,
    check_preset,
    find_models,
    num_usable_cores,
    parse_cells,
    parse_engine_options,
    parse_gib,
    write_models,
)
from vllm_thinkfast.bench.store import Results, write_atomically

Say = Callable[[str], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``thinkfast bench``."""
    add = parser.add_argument
    add(
        "--models",
        default="llama,llamba,mambainllama,mamba2",
        help="families of the preset (llama, llamba, mambainllama, mamba2, llamba-bare) and "
        "NAME=FOLDER for anything that vLLM loads; ratios are to the first",
    )
    add("--preset", default="30m", help="shape: tiny, 30m, 135m, 1b or 3b")
    add(
        "--load-format",
        choices=LOAD_FORMATS,
        default="dummy",
        help="dummy: random weights, a config.json is enough; auto: the folder's weights",
    )
    add("--batch-sizes", default="1,16,64", help="sequences; max: what the cache holds")
    add("--lengths", default="128+128", help="prompt+generated tokens, such as 128+128,2048+64")
    add("--num-samples", default="64", help="cells with one prompt and n=N samples; may be empty")
    add("--rounds", type=int, default=3, help="repetitions, interleaved between the models")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    add("--ssm-dtype", choices=DTYPES, default="float32", help="of recurrent states")
    add("--threads", type=int, default=num_usable_cores(), help="of each engine on a CPU")
    add(
        "--max-num-seqs",
        type=int,
        help="vLLM's limit; by default the largest batch, at least 1024 with max",
    )
    add("--max-num-batched-tokens", type=int, default=4096, help="vLLM's limit per step")
    add("--kv-cache-gib", type=float, help="memory for keys, values and states of each model")
    add(
        "--engines",
        choices=("together", "one-by-one"),
        help="keep all engines alive, or one at a time; by default together where --kv-cache-gib "
        "is given",
    )
    add("--engine-options", default="{}", help="JSON object: further arguments of vllm.LLM")
    add("--seed", type=int, default=0, help="of prompts, sampling and dummy weights")
    add("--out", type=Path, default=Path("thinkfast-bench"), help="folder of the run")
    add("--fresh", action="store_true", help="forget what an earlier run measured there")
    add("--no-figure", action="store_true", help="do without bench.png")
    add("--dry-run", action="store_true", help="print the resolved settings and stop")
    add("--json", action="store_true", help="print results.json instead of the tables")


def resolve(options: argparse.Namespace) -> Settings:
    """The settings that the options mean.

    Raises:
        ValueError: an impossible value.
    """
    for name in ("rounds", "threads", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= options.seed < 2**32:  # of numpy, which vLLM seeds too
        raise ValueError(f"--seed {options.seed}: must be from 0 to {2**32 - 1}")
    check_preset(options.preset)
    cells, max_num_seqs = parse_cells(
        options.batch_sizes, options.lengths, options.num_samples, options.max_num_seqs
    )
    if options.max_num_batched_tokens < max_num_seqs:
        raise ValueError(
            f"--max-num-batched-tokens {options.max_num_batched_tokens}: vLLM needs at least "
            f"max_num_seqs, {max_num_seqs}; raise it, or lower --max-num-seqs"
        )
    kv_cache_bytes = parse_gib(options.kv_cache_gib, "--kv-cache-gib")
    engines: Engines | None = options.engines
    if engines is None:
        engines = "one-by-one" if kv_cache_bytes is None else "together"
    if engines == "together" and kv_cache_bytes is None:
        raise ValueError(
            "--engines together: the engines share the memory, so say how much cache each gets "
            "with --kv-cache-gib, or use --engines one-by-one"
        )
    return Settings(
        cells=cells,
        rounds=options.rounds,
        load_format=options.load_format,
        dtype=options.dtype,
        ssm_dtype=options.ssm_dtype,
        threads=options.threads,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_bytes=kv_cache_bytes,
        engines=engines,
        seed=options.seed,
        engine_options=parse_engine_options(options.engine_options),
    )


def run(options: argparse.Namespace, write: Say) -> int:
    """Measures, and writes results.json, report.txt and bench.png.

    Args:
        options: of the command line.
        write: prints a line of the result.

    Returns:
        0, or 1 if a model or cell failed.

    Raises:
        ValueError: the user's mistake; the message says how to mend it.
    """
    settings = resolve(options)
    models = find_models(options.models, options.preset, options.load_format, options.out)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out}: is a file; give a folder")
    config = resolved_config(options, settings, models)
    if options.dry_run:
        write(json.dumps(config, indent=2))
        return 0
    # These import torch and matplotlib: not for --help, --dry-run and mistakes.
    from vllm_thinkfast.bench import figure, report
    from vllm_thinkfast.bench.run import Run

    if not options.no_figure:
        figure.check_matplotlib()
    results = Results(options.out, fresh=options.fresh)
    write_models(models, options.preset)
    with contextlib.closing(results):
        try:
            found = Run(models, settings, results, options.out / "logs", _progress).measure()
        except WorkerError as error:  # of the roofline; models that fail are part of the results
            _progress(f"thinkfast bench: roofline: {error}")
            return 1
        summary = report.summarise(found, models, settings)
        operators = {"cpu_operators": environment.cpu_operators()}
        text = json.dumps({**config, **operators, **summary}, indent=1)
        lines = list(report.render(summary, settings))
        write_atomically(options.out / "results.json", text + "\n")
        write_atomically(options.out / "report.txt", "\n".join(lines) + "\n")
        if not options.no_figure:
            figure.draw(summary, models, settings, options.out / "bench.png")
    write(text if options.json else "\n".join(lines))
    _progress(f"results in {options.out}")
    has_failed = any("error" in entry for entry in (*summary["models"], *summary["cells"]))
    return 1 if has_failed else 0


def resolved_config(
    options: argparse.Namespace, settings: Settings, models: list[Model]
) -> dict[str, Any]:
    """What results.json says about the run itself."""
    return {
        "command": shlex.join(["thinkfast", *sys.argv[1:]]),
        "preset": options.preset,
        "folders": {model.name: str(model.folder) for model in models},
        "settings": settings.as_dict(),
        "llm_options": settings.llm_options(),
        "versions": environment.versions("numba"),
        "git_commit": environment.git_commit(),
        "hardware": environment.hardware(),
        "environment": environment.environment_of_runs(settings),
    }


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
