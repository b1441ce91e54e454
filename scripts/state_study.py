"""What storing the SSM state in fewer bits costs: drift, greedy tokens, pass@1.

    python -m scripts.state_study --out runs/state-study

For every embedded model with states and every way to store them, one engine samples ``arith_passk``
and continues the problems greedily (``state_study_engine.py``); the recurrence of each is run for
16,384 tokens against float64 (``state_drift.py``), on inputs recorded from the model, and on random
inputs with slow decays. Writes ``study.json``, ``tables.md`` and ``drift.png``; engines that were
done before with the same sources, model and packages are not run again.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from demo.errors import InputError
from demo.store import make_folder
from scripts.figures import COLOURS, pyplot
from scripts.state_drift import (
    CHECKPOINTS,
    STORES,
    TIME_CONSTANTS,
    Inputs,
    drift,
    slow_inputs,
    time_constants,
)
from scripts.state_study_engine import identity
from scripts.tiny_models import ROOT, TrainingError, call, say
from vllm_thinkfast import envs
from vllm_thinkfast.bench.environment import git_commit, hardware, versions

MODELS = ("llamba-tiny", "mambainllama-tiny")
ENGINE_STORES = ("float32", "bfloat16", "float16", "int8")


def run_engine(name: str, store: str, out: Path, problems: int, samples: int) -> dict[str, Any]:
    """Results of one engine, in a process of its own; kept in ``out``.

    Raises:
        TrainingError: the process failed.
    """
    file = out / f"{name}-{store}-{problems}x{samples}.json"
    inputs = inputs_file(name, out, problems, samples)
    needs_inputs = store == "float32"
    model = str(Path("thinkfast") / name)
    is_done = file.is_file() and (inputs.is_file() or not needs_inputs)
    if is_done:
        made_from = json.loads(file.read_text(encoding="utf-8")).get("identity")
        is_done = made_from == identity(ROOT / model)
    if not is_done:
        say(f"{name}, {store}")
        file.unlink(missing_ok=True)  # it must not vouch for inputs that are not its own
        command = [sys.executable, "-m", "scripts.state_study_engine", model, store]
        command += [str(problems), str(samples), str(file)]
        command += [str(inputs)] if needs_inputs else []
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            envs.SSM_STATE: "int8" if store == "int8" else "",
        }
        call(command, file.with_suffix(".log"), f"{name}, {store}", environment)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def inputs_file(name: str, out: Path, problems: int, samples: int) -> Path:
    """What the recurrences of a model get, recorded by its float32 engine."""
    return out / f"{name}-{problems}x{samples}-inputs.pt"


def agreement(found: list[list[int]], wanted: list[list[int]]) -> dict[str, float]:
    """How far greedy answers are those of float32 states.

    Returns:
        ``same_answers``: share of answers without a difference; ``before_difference``: share of the
        tokens of all answers that come before the first one.
    """
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    kept = 0
    for a, b in zip(found, wanted, strict=True):
        differs = [x != y for x, y in zip(a, b, strict=False)]
        kept += differs.index(True) if True in differs else len(differs)
    return {
        "same_answers": same / len(wanted),
        "before_difference": kept / sum(map(len, wanted)),
    }


def study(out: Path, problems: int, samples: int, num_tokens: int) -> dict[str, Any]:
    """Runs everything.

    Args:
        out: folder for what is kept.
        problems: first problems of the test split.
        samples: N for each.
        num_tokens: of the recurrences, the last number that is shown; at most that of CHECKPOINTS.
    """
    engines = []
    drifts: dict[str, Any] = {}
    checkpoints = [*(n for n in CHECKPOINTS if n < num_tokens), num_tokens]
    for name in MODELS:
        of_model = [run_engine(name, store, out, problems, samples) for store in ENGINE_STORES]
        for result in of_model:
            result |= agreement(result["greedy"], of_model[0]["greedy"])
        engines += [{k: v for k, v in r.items() if k != "greedy"} for r in of_model]
        inputs = Inputs(**torch.load(inputs_file(name, out, problems, samples)))
        say(f"{name}: drift over {num_tokens} tokens")
        drifts[name] = {
            "time_constants": time_constants(inputs).tolist(),
            "errors": drift(inputs, checkpoints),
        }
    say("slow decays")
    slow = slow_inputs(num_tokens)
    drifts["slow decays"] = {
        "time_constants": time_constants(slow).tolist(),
        "errors": drift(slow, checkpoints),
    }
    return {
        "git_commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "num_problems": problems,
        "num_samples": samples,
        "num_tokens": num_tokens,
        "engines": engines,
        "drift": drifts,
    }


def tables(found: dict[str, Any]) -> str:
    """The study as three Markdown tables: engines, drift of the models, drift by decay."""
    lines = [
        "| model | SSM state | bytes | same greedy answers | tokens before a difference | pass@1 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for r in found["engines"]:
        lines.append(
            f"| {Path(r['model']).name} | {r['store']} | {r['bytes_per_state']:,} | "
            f"{r['same_answers']:.3f} | {r['before_difference']:.3f} | "
            f"{r['pass@1']:.3f} ± {r['pass@1_stderr']:.3f} |"
        )
    heads = " | ".join(STORES)
    rule = " | ".join(["---:"] * len(STORES))
    lines += [
        "",
        f"| model | tokens | error of | {heads} |",
        f"| --- | ---: | --- | {rule} |",
    ]
    for name in MODELS:
        errors = found["drift"][name]["errors"]
        for tokens in dict.fromkeys(e["tokens"] for e in errors):
            for what in ("state", "output"):
                cells = [
                    _median_and_worst(e[what])
                    for store in STORES
                    for e in errors
                    if e["store"] == store and e["tokens"] == tokens
                ]
                lines.append(f"| {name} | {tokens:,} | {what} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| time constant | error of | {heads} |",
        f"| ---: | --- | {rule} |",
    ]
    slow = found["drift"]["slow decays"]["errors"]
    last = slow[-1]["tokens"]
    for i, constant in enumerate(TIME_CONSTANTS):
        for what in ("state", "output"):
            cells = [f"{e[what][0][i]:.1e}" for e in slow if e["tokens"] == last]
            lines.append(f"| {constant:,} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _median_and_worst(errors: list[list[float]]) -> str:
    """Of [L][H] errors: the median, and the largest."""
    flat = list(chain(*errors))
    return f"{statistics.median(flat):.1e} ({max(flat):.1e})"


def draw(found: dict[str, Any], path: Path) -> None:
    """Error of the outputs against tokens for the models, and against the decay."""
    with pyplot() as plt:
        figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained", sharey=True)
        for panel, name in zip(panels, (*MODELS, "slow decays"), strict=True):
            errors = found["drift"][name]["errors"]
            for store, colour in zip(STORES, COLOURS, strict=False):
                mine = [e for e in errors if e["store"] == store]
                if name in MODELS:
                    xs: list[float] = [e["tokens"] for e in mine]
                    ys = [statistics.median(chain(*e["output"])) for e in mine]
                else:
                    xs, ys = list(TIME_CONSTANTS), mine[-1]["output"][0]
                panel.plot(xs, ys, "o-", color=colour, label=store, lw=1.3, ms=3.5)
            panel.set_xscale("log")
            panel.set_xticks(xs, [f"{x:,.0f}" for x in xs])
            panel.minorticks_off()
            panel.set_yscale("log")
            panel.grid(alpha=0.25, lw=0.6)
            is_model = name in MODELS
            panel.set_title(name if is_model else f"random inputs, {found['num_tokens']:,} tokens")
            panel.set_xlabel("tokens" if is_model else "time constant of the decay [tokens]")
        panels[0].set_ylabel("relative error of the outputs\n(median of the heads)")
        panels[0].legend(frameon=False, fontsize=7.5)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="state_study", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "state-study")
    parser.add_argument("--problems", type=int, default=150, help="first ones of the test split")
    parser.add_argument("--samples", type=int, default=8, help="of each problem")
    parser.add_argument("--tokens", type=int, default=CHECKPOINTS[-1], help="of the recurrences")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    try:
        if not CHECKPOINTS[0] <= options.tokens <= CHECKPOINTS[-1]:
            raise TrainingError(
                f"--tokens {options.tokens}: accepted are {CHECKPOINTS[0]} to {CHECKPOINTS[-1]}"
            )
        make_folder(out)
        start = time.perf_counter()
        found = study(out, options.problems, options.samples, options.tokens)
        found["seconds"] = time.perf_counter() - start
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    (out / "study.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "tables.md").write_text(tables(found), encoding="utf-8")
    draw(found, out / "drift.png")
    say(f"{options.out}: study.json, tables.md, drift.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
