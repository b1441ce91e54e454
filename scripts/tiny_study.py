"""``make tiny-study``: what each stage and each choice of the students' recipes pays for.

Trains the students' recipes with one thing changed each, stops at the borders of stages, exports
what is there, and samples the task ``arith_passk`` from every export in vLLM. Needs the embedded
teacher, ``thinkfast/llama-tiny``. Everything is kept in the run folder, so a killed call continues;
``--share 0.1`` is a quick look with a tenth of the tokens. Writes ``study.json``, ``tables.md`` and
``study.png``.
"""

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from demo.settings import code_hash, folder_hash
from scripts.figures import COLOURS, pyplot
from scripts.tiny_models import (
    BIN,
    RECIPES,
    ROOT,
    TrainingError,
    call,
    export,
    model_hash,
    say,
    train,
)
from vllm_thinkfast.bench.environment import git_commit
from vllm_thinkfast.bench.store import write_atomically

LLAMBA, HYBRID = "arith-llamba-tiny.yaml", "arith-mambainllama-tiny.yaml"
STAGES = ("matrix_mixing", "hidden_state", "end_to_end_forward", "end_to_end_reverse")
BATCH_TOKENS = 2048
METRICS = ("reverse_kl", "forward_kl", "top1_agreement")
DIGITS = {"reverse_kl": ".3g", "forward_kl": ".3g", "top1_agreement": ".4f"}
NUM_PROBLEMS, NUM_SAMPLES = 200, 16
TEACHER = ROOT / "thinkfast" / "llama-tiny"


@dataclass(frozen=True)
class Variant:
    """A recipe with one thing changed."""

    name: str
    recipe: str
    tokens: dict[str, int]
    """Stage -> budget; stages that are not named are left out."""
    init: str = "qkvo"
    losses: dict[str, str] = field(default_factory=dict)
    """Stage -> kind of its loss, where it is not the recipe's."""
    with_stages: bool = False
    """Whether pass@k is measured at every border of stages, not only at the end."""

    def write(self, path: Path, seed: int) -> list[str]:
        """Writes the recipe; returns the names of its stages."""
        recipe = yaml.safe_load((RECIPES / self.recipe).read_text(encoding="utf-8"))
        recipe["name"], recipe["seed"] = path.stem, seed
        recipe["student"]["init"] = self.init
        stages = []
        for stage in recipe["stages"]:
            name = stage.setdefault("name", stage["kind"])
            if name in self.tokens:
                stage["tokens"] = self.tokens[name]
                if name in self.losses:
                    stage["loss"] = {"kind": self.losses[name]}
                stages.append(stage)
        recipe["stages"] = stages
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return [stage["name"] for stage in stages]


def variants(share: float) -> list[Variant]:
    """The recipe of each kind, then the recipe with one thing changed.

    Within a kind all have the same number of tokens: what a left-out stage had goes to the next.

    Args:
        share: of the recipes' tokens, above 0.
    """
    one, two, forward, reverse = STAGES
    pure, hybrid = _budgets(LLAMBA, share), _budgets(HYBRID, share)
    return [
        Variant("Llamba", LLAMBA, pure, with_stages=True),
        Variant("Llamba, init random", LLAMBA, pure, init="random"),
        Variant("Llamba, without stage 1", LLAMBA, _moved(pure, one, two)),
        Variant(
            "Llamba, without stages 1 and 2", LLAMBA, _moved(_moved(pure, one, two), two, forward)
        ),
        Variant("Llamba, forward KL only", LLAMBA, pure, losses={reverse: "forward_kl"}),
        Variant("Llamba, reverse KL only", LLAMBA, pure, losses={forward: "reverse_kl"}),
        Variant("hybrid", HYBRID, hybrid, with_stages=True),
        Variant("hybrid, reverse KL only", HYBRID, hybrid, losses={forward: "reverse_kl"}),
    ]


def _named(of_study: list[Variant], names: list[str] | None) -> list[Variant]:
    """Those with one of the names; all without names.

    Raises:
        TrainingError: no variant has one of the names.
    """
    known = [variant.name for variant in of_study]
    for name in names or []:
        if name not in known:
            raise TrainingError(f"--only {name!r}: the variants are {'; '.join(known)}")
    return [variant for variant in of_study if variant.name in (names or known)]


def _budgets(recipe: str, share: float) -> dict[str, int]:
    """Stage -> a share of its tokens, in whole batches, at least one."""
    stages = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))["stages"]
    return {
        stage.get("name", stage["kind"]): BATCH_TOKENS
        * max(1, math.ceil(share * stage["tokens"] / BATCH_TOKENS))
        for stage in stages
    }


def _moved(tokens: dict[str, int], source: str, target: str) -> dict[str, int]:
    """Budgets without one stage, whose tokens another gets."""
    moved = tokens | {target: tokens[target] + tokens[source]}
    del moved[source]
    return moved


def sample(model: Path, work: Path, num_problems: int, num_samples: int) -> dict[str, float]:
    """Samples ``arith_passk`` with lm-eval and vLLM; the result is kept in ``work``.

    It is kept under hashes of the model, with tokenizer and chat template, and of the sources: a
    folder of the same name may hold another one later, and tasks and models may change.

    Args:
        model: exported folder.
        work: folder for the results of this model.
        num_problems: first problems of the test split.
        num_samples: N for each.

    Returns:
        lm-eval's metrics: ``pass@1``, ``pass@1_stderr``, ...
    """
    kept = work / f"passk-{num_problems}x{num_samples}-{folder_hash(model)}-{code_hash()}.json"
    if not kept.is_file():
        work.mkdir(parents=True, exist_ok=True)
        found = work / "lm_eval"
        arguments = f"pretrained={model},dtype=float32,enforce_eager=True,max_model_len=512"
        call(
            [
                *(str(BIN / "lm_eval"), "--model", "vllm", "--tasks", "arith_passk"),
                *("--model_args", f"{arguments},max_num_seqs=256"),
                *("--metadata", f"num_samples={num_samples}", "--limit", str(num_problems)),
                *("--gen_kwargs", "seed=-1", "--output_path", str(found)),
            ],
            work / "lm_eval.log",
            work.name,
        )
        newest = max(found.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
        results = json.loads(newest.read_text())["results"]["arith_passk"]
        metrics = {
            key.replace(",all", ""): value
            for key, value in results.items()
            if isinstance(value, int | float)
        }
        write_atomically(kept, json.dumps(metrics, indent=1) + "\n")
    loaded: dict[str, float] = json.loads(kept.read_text())
    return loaded


def run_variant(variant: Variant, runs: Path, seed: int) -> dict[str, Any]:
    """Trains, exports and samples one variant.

    Args:
        variant: what to train.
        runs: folder of the study's run folders.
        seed: of new weights and data order.

    Returns:
        ``start``: held-out metrics before the first step. ``stages``: per stage its budget,
        held-out metrics at its end and, where measured, pass@k. ``curve``: metrics against tokens.
    """
    # Another teacher, another run: the recipe names only its folder.
    short = f"{variant.name.replace(', ', '-').replace(' ', '-').lower()}-{seed}"
    run = runs / f"{short}-{model_hash(TEACHER)[:8]}"
    recipe = run.with_name(run.name + ".yaml")
    names = variant.write(recipe, seed)
    steps = 0
    passk: dict[str, dict[str, float]] = {}
    for name in names:
        steps += math.ceil(variant.tokens[name] / BATCH_TOKENS)
        if name != names[-1] and not variant.with_stages:
            continue
        work = run / "export" / name
        # Returns at once if that is done, and refuses a run of another recipe.
        train(recipe, run, [], max_steps=steps)
        if not (work / "model").is_dir():
            work.mkdir(parents=True, exist_ok=True)
            export(run, work / "model")
        passk[name] = sample(work / "model", work, NUM_PROBLEMS, NUM_SAMPLES)
    records = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    evals = [record for record in records if record["event"] == "eval"]
    stages = []
    for name in names:
        at_end = [record for record in evals if record["stage"] == name][-1]
        stages.append(
            {"name": name, "tokens": variant.tokens[name], "passk": passk.get(name)}
            | {key: at_end[key] for key in METRICS}
        )
    say(f"{run.name}: pass@1 {passk[names[-1]]['pass@1']:.3f}")
    return {
        "name": variant.name,
        "seed": seed,
        "start": {key: evals[0][key] for key in METRICS},
        "stages": stages,
        "curve": [[record["tokens"], *(record[key] for key in METRICS)] for record in evals],
    }


def tables(study: dict[str, Any]) -> str:
    """The study as two Markdown tables: stages, and choices."""
    lines = [
        "| model | after | tokens | reverse KL | forward KL | top-1 agreement | pass@1 | pass@16 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    teacher = study["teacher"]
    lines.append(f"| teacher | | | | | | {_passk(teacher, 1)} | {_passk(teacher, 16)} |")
    for result in study["variants"]:
        if any(stage["passk"] is None for stage in result["stages"]):
            continue
        who = f"{result['name']}, seed {result['seed']}"
        lines.append(f"| {who} | start | 0 | {_figures(result['start'])} | | |")
        for stage in result["stages"]:
            shown = f"{_passk(stage['passk'], 1)} | {_passk(stage['passk'], 16)}"
            lines.append(
                f"| | {stage['name']} | {stage['tokens']:,} | {_figures(stage)} | {shown} |"
            )
    lines += [
        "",
        "| variant | seeds | reverse KL | top-1 agreement | pass@1 | pass@16 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(result["name"] for result in study["variants"]):
        ends = [r["stages"][-1] for r in study["variants"] if r["name"] == name]
        cells = [
            *(
                _spread([end[key] for end in ends], DIGITS[key])
                for key in ("reverse_kl", "top1_agreement")
            ),
            *(_spread([end["passk"][f"pass@{k}"] for end in ends]) for k in (1, 16)),
        ]
        lines.append(f"| {name} | {len(ends)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(values: dict[str, Any]) -> str:
    return " | ".join(f"{values[key]:{DIGITS[key]}}" for key in METRICS)


def _passk(metrics: dict[str, float], k: int) -> str:
    return f"{metrics[f'pass@{k}']:.3f} ± {metrics[f'pass@{k}_stderr']:.3f}"


def _spread(values: list[float], form: str = ".3f") -> str:
    """Mean, and the range where there are several."""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def draw(study: dict[str, Any], path: Path) -> None:
    """Held-out reverse KL against tokens, and pass@1 at the end, one panel row per kind."""
    with pyplot() as plt:
        figure, rows = plt.subplots(
            2, 2, figsize=(7.4, 5.6), layout="constrained", width_ratios=[1.3, 1]
        )
        for kind, (left, right) in zip(("Llamba", "hybrid"), rows, strict=True):
            of_kind = [r for r in study["variants"] if r["name"].split(",")[0] == kind]
            names = list(dict.fromkeys(r["name"] for r in of_kind))
            for name, colour in zip(names, COLOURS, strict=False):
                label = name.partition(", ")[2] or "recipe"
                for i, result in enumerate(r for r in of_kind if r["name"] == name):
                    tokens, values = zip(*((c[0], c[1]) for c in result["curve"]), strict=True)
                    left.plot(
                        [t / 1e6 for t in tokens], values, color=colour,
                        lw=1.8 if name == kind else 1.1, label=label if i == 0 else None,
                    )  # fmt: skip
                at = len(names) - 1 - names.index(name)
                ends = [r["stages"][-1]["passk"]["pass@1"] for r in of_kind if r["name"] == name]
                right.barh(at, statistics.mean(ends), 0.6, color=colour, alpha=0.35)
                right.plot(ends, [at] * len(ends), "o", color=colour, ms=4)
            right.set_yticks(
                range(len(names)),
                [n.partition(", ")[2] or "recipe" for n in reversed(names)],
            )
            right.axvline(study["teacher"]["pass@1"], color="#666666", ls="--", lw=1)
            right.annotate(
                "teacher", (study["teacher"]["pass@1"], len(names) - 0.45), ha="center", fontsize=8
            )
            right.set_xlim(0, 1.1 * study["teacher"]["pass@1"])
            right.set_xlabel("pass@1 (a dot per seed)")
            left.set_yscale("log")
            left.set_ylabel(f"{kind}: held-out KL(student || teacher)")
            left.set_xlabel("training tokens [millions]")
            left.grid(alpha=0.25, lw=0.6)
            left.legend(frameon=False, fontsize=7.5)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tiny_study", description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", help="run folders")
    parser.add_argument("--out", type=Path, help="default: results, or chosen with --only, there")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every variant")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipes' tokens")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a variant; may be repeated; default: all"
    )
    options = parser.parse_args(arguments)
    runs = options.runs.resolve()
    # A part of the study does not replace the whole one.
    out = (options.out or runs / ("chosen" if options.only else "results")).resolve()
    try:
        if options.seeds < 1:
            raise TrainingError(f"--seeds {options.seeds}: need at least 1")
        if not 0 < options.share <= 1:
            raise TrainingError(f"--share {options.share}: give a number above 0, at most 1")
        if not TEACHER.is_dir():
            raise TrainingError(f"{TEACHER}: no such folder; make it with: make tiny")
        of_share = runs / f"share-{options.share:g}"
        chosen = _named(variants(options.share), options.only)
        jobs = [(variant, seed) for seed in range(options.seeds) for variant in chosen]
        with ThreadPoolExecutor(max_workers=2) as pool:
            found = list(pool.map(lambda job: run_variant(job[0], of_share, job[1]), jobs))
        study = {
            "git_commit": git_commit(),
            "teacher": sample(TEACHER, runs / "teacher", NUM_PROBLEMS, NUM_SAMPLES),
            "share": options.share,
            "num_problems": NUM_PROBLEMS,
            "num_samples": NUM_SAMPLES,
            "variants": found,
        }
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    (out / "tables.md").write_text(tables(study), encoding="utf-8")
    draw(study, out / "study.png")
    say(f"{out}: study.json, tables.md, study.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
