"""Command line: ``thinkfast doctor | convert | bench | state-size``.

Exit codes: 0 when everything asked for was done, 1 when ``doctor`` found a problem or something
failed that is not the user's doing, 2 for a mistake that the message says how to mend.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_thinkfast import __version__
from vllm_thinkfast.bench.command import add_options as add_bench_options
from vllm_thinkfast.bench.command import run as run_bench
from vllm_thinkfast.bench.settings import parse_gib

_DTYPES = ("float32", "bfloat16", "float16")
_SSM_DTYPES = (*_DTYPES, "int8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"thinkfast {options.verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # disk full, permissions
        print(f"thinkfast {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"thinkfast {options.verb}: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="thinkfast", description="Serve Llamba and MambaInLlama models with vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    doctor = verbs.add_parser("doctor", help="show versions, backends and problems")
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    doctor.set_defaults(run=_doctor)

    convert = verbs.add_parser(
        "convert", help="write one modern Hugging Face folder from a published checkpoint"
    )
    convert.add_argument("src", type=Path, help="Llamba, MambaInLlama or M1 folder")
    convert.add_argument("dst", type=Path, help="folder to write")
    convert.add_argument(
        "--tokenizer", help="folder or hub name of the tokenizer, for checkpoints without one"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace what DST holds")
    convert.add_argument("--json", action="store_true", help="machine-readable output")
    convert.set_defaults(run=_convert)

    bench = verbs.add_parser(
        "bench",
        help="speed and memory next to a Llama of equal size",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_bench_options(bench)
    bench.set_defaults(run=_bench)

    size = verbs.add_parser(
        "state-size",
        help="memory of one sequence",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    size.add_argument("folder", type=Path, help="checkpoint folder; config files are enough")
    size.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the model")
    size.add_argument(
        "--ssm-dtype",
        choices=_SSM_DTYPES,
        default="float32",
        help="of the SSM state; int8 counts its scales (VLLM_THINKFAST_SSM_STATE=int8)",
    )
    size.add_argument("--num-tokens", type=int, default=4096, help="length of the sequence")
    size.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks")
    size.add_argument(
        "--memory-gib", type=float, help="of cache on each rank: also say how many sequences fit"
    )
    size.add_argument("--json", action="store_true", help="machine-readable output")
    size.set_defaults(run=_state_size)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from vllm_thinkfast import doctor

    found = doctor.diagnose()
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print("\n".join(doctor.render(found)))
    return 1 if found.problems else 0


def _convert(options: argparse.Namespace) -> int:
    from vllm_thinkfast.checkpoints.convert import convert_checkpoint

    report = convert_checkpoint(
        options.src, options.dst, tokenizer=options.tokenizer, overwrite=options.overwrite
    )
    if options.json:
        fields = {**report.__dict__, "destination": str(report.destination)}
        print(json.dumps(fields, indent=2))
        return 0
    what = "already there" if report.was_done_before else f"written from {report.weight_layout}"
    print(
        f"{report.destination}: {what}, {report.num_tensors} tensors, "
        f"{report.num_bytes / 1e6:.1f} MB; serve it with: vllm serve {report.destination}"
    )
    return 0


def _bench(options: argparse.Namespace) -> int:
    return run_bench(options, print)


def _state_size(options: argparse.Namespace) -> int:
    import torch

    from vllm_thinkfast.checkpoints.config_reader import read_config
    from vllm_thinkfast.state_cache import bytes_per_sequence

    for name in ("num_tokens", "tensor_parallel_size"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(options, name)}: must be at least 1")
    memory_bytes = parse_gib(options.memory_gib, "--memory-gib")
    size = bytes_per_sequence(
        read_config(options.folder),
        dtype=getattr(torch, options.dtype),
        ssm_dtype=getattr(torch, options.ssm_dtype),
        tp_size=options.tensor_parallel_size,
    )
    total = size.total(options.num_tokens)
    fitting = None
    if memory_bytes is not None:
        fitting = size.max_sequences(memory_bytes, options.num_tokens)
    if options.json:
        fields = {**size.__dict__, "num_tokens": options.num_tokens, "total_bytes": total}
        if fitting is not None:
            fields["max_sequences"] = fitting
        print(json.dumps(fields, indent=2))
        return 0
    print(f"convolution state    {size.conv_bytes / 2**20:10.3f} MiB per sequence")
    print(f"SSM state            {size.ssm_bytes / 2**20:10.3f} MiB per sequence")
    print(f"keys and values      {size.kv_bytes_per_token / 2**10:10.3f} KiB per token")
    print(f"{options.num_tokens} tokens in all {total / 2**20:14.3f} MiB")
    if fitting is not None:
        bound = " at most, before vLLM's padding" if size.kv_bytes_per_token else ""
        print(f"{options.memory_gib:g} GiB of cache: {fitting} sequences decode at once{bound}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
