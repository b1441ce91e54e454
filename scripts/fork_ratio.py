"""What one prefill for all samples of a prompt saves, against a prefill for each.

    python -m scripts.fork_ratio --out runs/fork-ratio

Per model two engines in one process, one with ``VLLM_THINKFAST_FORK=0``: the same new prompt with N
samples in each, in turns and alternating order. Weights are random and samples go on to their full
length, so that only the lengths matter. Writes ``fork.json`` and ``tables.md``: median and range of
the ratio of the seconds, unforked over forked, and the prompt tokens that were computed.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo.errors import InputError
from demo.store import make_folder
from scripts.tiny_models import ENVIRONMENT, ROOT, say
from vllm_thinkfast import envs
from vllm_thinkfast.bench.environment import git_commit, hardware, versions
from vllm_thinkfast.bench.process import CACHE_VARIABLE
from vllm_thinkfast.bench.shapes import PRESETS, write_folder

MODELS = ("Llamba", "MambaInLlama, Mamba-1", "MambaInLlama, Mamba-2")
LENGTHS = ((32, 64), (128, 64), (512, 64), (512, 256), (1500, 64))
"""Prompt and generated tokens."""
ENGINE = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 2**30,
    "disable_log_stats": True,
}


def write_model(name: str, folder: Path, preset: str) -> Path:
    """Writes the config.json of one of MODELS."""
    if name == "Llamba":
        return write_folder(folder, "llamba", preset)
    write_folder(folder, "mambainllama", preset)
    if name.endswith("Mamba-2"):
        # Heads and groups of the teacher's attention, as in the published Mamba-2 hybrids.
        shape = PRESETS[preset]
        path = folder / "config.json"
        changes = {
            "mamba_version": "mamba2",
            "mamba_num_heads": shape.num_attention_heads,
            "mamba_n_groups": shape.num_key_value_heads,
            "ssm_state_size": shape.head_dim,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
    return folder


def start(folder: Path, num_samples: int, is_forking: bool) -> Any:
    """Starts an engine."""
    from vllm import LLM

    os.environ[envs.FORK] = "1" if is_forking else "0"
    return LLM(str(folder), max_num_seqs=num_samples, **ENGINE)


def generate(llm: Any, prompt: list[int], num_samples: int, num_tokens: int) -> dict[str, float]:
    """Draws the samples of one prompt as requests of their own, as lm-eval's tasks do.

    Returns:
        ``wall_s`` and ``process_s``, seconds; ``prefilled``, prompt tokens that were computed.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    params.detokenize = False
    prompts = [{"prompt_token_ids": prompt}] * num_samples
    wall, process = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    wall, process = time.perf_counter() - wall, time.process_time() - process
    assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
    prefilled = sum(len(prompt) - (output.num_cached_tokens or 0) for output in outputs)
    return {"wall_s": wall, "process_s": process, "prefilled": prefilled}


def measure(name: str, folder: Path, num_samples: int, repeats: int) -> list[dict[str, Any]]:
    """Measures one model.

    Returns:
        a row per pair of lengths, with the seconds of every repeat, unforked and forked.
    """
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    engines = {way: start(folder, num_samples, way == "forked") for way in ("unforked", "forked")}
    chance = random.Random(0)
    rows = []
    for prompt_tokens, num_tokens in LENGTHS:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in engines}
        for turn in range(repeats + 1):
            # A new prompt: an old one would be in the prefix cache. The first turn warms up.
            prompt = [chance.randrange(vocabulary) for _ in range(prompt_tokens)]
            for way in sorted(engines, reverse=bool(turn % 2)):
                one = generate(engines[way], prompt, num_samples, num_tokens if turn else 2)
                if turn:
                    found[way].append(one)
        rows.append({"model": name, "prompt": prompt_tokens, "generated": num_tokens} | found)
        say(f"{name}, {prompt_tokens} + {num_tokens}: {_ratio(rows[-1], 'wall_s')}")
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()
    return rows


def _ratio(row: dict[str, Any], clock: str) -> str:
    """Median of the repeats' ratios, and the range."""
    pairs = zip(row["unforked"], row["forked"], strict=True)
    ratios = sorted(unforked[clock] / forked[clock] for unforked, forked in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def table(rows: list[dict[str, Any]]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| model | prompt + generated | wall time | CPU time | prefilled, unforked | forked |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        prefilled = (f"{row[way][0]['prefilled']:,}" for way in ("unforked", "forked"))
        lines.append(
            f"| {row['model']} | {row['prompt']} + {row['generated']} | {_ratio(row, 'wall_s')} | "
            f"{_ratio(row, 'process_s')} | {' | '.join(prefilled)} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="fork_ratio", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fork-ratio")
    parser.add_argument("--preset", choices=[*PRESETS], default="30m", help="shape (%(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="of a prompt (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args(arguments)
    for flag, value in (("--samples", options.samples), ("--repeats", options.repeats)):
        if value < 1:
            print(f"error: {flag} {value}: need a whole number of at least 1", file=sys.stderr)
            return 2
    try:
        make_folder(options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.update(ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    os.environ.pop(CACHE_VARIABLE)  # it would win over ENGINE, which the record shows
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(MODELS):
            model = write_model(name, Path(folder) / str(i), options.preset)
            rows += measure(name, model, options.samples, options.repeats)
    found = {
        "git_commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "preset": options.preset,
        "num_samples": options.samples,
        "engine": ENGINE,
        "rows": rows,
    }
    (options.out / "fork.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "tables.md").write_text(table(rows), encoding="utf-8")
    say(f"{options.out}: fork.json, tables.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
