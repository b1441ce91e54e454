"""``thinkfast-eval compare``: sample several models in turns, measure speeds, score, report."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.commands.report import add_analysis_arguments, settings_of
from lm_eval_tasks.commands.sample import (
    DEFAULT_SEED,
    NO_ENGINE_ARGS,
    UNSEEDED,
    add_speed_arguments,
)
from lm_eval_tasks.compare import Model, Plan, parse_model, read_plan, run_plan
from lm_eval_tasks.errors import stop
from lm_eval_tasks.option_words import COMPARE
from lm_eval_tasks.report import build_results, write_report
from lm_eval_tasks.rewards.scores import reward_names
from lm_eval_tasks.sampling.runner import REGIMES

DEFAULT_ROUNDS = 3
#: Arguments of vLLM's EngineArgs that decide how much memory a model has; equal for all models.
MEMORY_ARGUMENTS = (
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "cpu_offload_gb",
    "kv_offloading_size",
)
_PASSED_ON = ("temperature", "top_p", "max_tokens", "seed", "data_file", "chat_template")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="PATH[,name=NAME][,KEY=VALUE...]",
        help="folder or hub name; give it twice or more, the first is the baseline; tokenizer=, "
        "revision=, trust_remote_code= and vLLM's EngineArgs for this model alone, for example "
        "max_num_seqs=64; arguments of memory are the same for all",
    )
    parser.add_argument("--task", required=True, help="as in thinkfast-eval sample")
    parser.add_argument("--num-samples", type=int, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument("--limit", type=int, help="only the first problems (all)")
    parser.add_argument(
        "--regime",
        choices=REGIMES,
        nargs="+",
        default=[REGIMES[0]],
        help="how time is spent: all problems at once, or one after the other; one or both "
        f"({REGIMES[0]})",
    )
    parser.add_argument(
        "--latency-limit",
        type=int,
        metavar="P",
        help="only the first problems in the regime latency (as --limit)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="turns in which the models take their parts, in alternating order; each starts the "
        "engine anew; reports show how far their speeds differ (that of the folder, if it holds "
        f"this comparison, else {DEFAULT_ROUNDS})",
    )
    parser.add_argument("--out", type=Path, default=Path("compare"), help="folder (%(default)s)")
    parser.add_argument("--title", default="Comparison")

    how = parser.add_argument_group("how to sample, the same for all (defaults are the task's)")
    how.add_argument("--temperature", type=float)
    how.add_argument("--top-p", type=float)
    how.add_argument("--max-tokens", type=int)
    how.add_argument(
        "--seed",
        type=int,
        help="of the runs: their samples can be drawn again, at the price of speeds that lie "
        "closer together (-1: without seeds; a folder goes on as it began)",
    )
    how.add_argument("--data-file")
    how.add_argument("--chat-template", choices=("auto", "off"))
    how.add_argument("--engine-args", nargs="+", default=[], metavar="KEY=VALUE")

    add_speed_arguments(parser)

    parser.add_argument(
        "--reward-model",
        action="append",
        default=[],
        metavar="SPEC",
        help="score the samples with this reward model, as --reward of thinkfast-eval reward; the "
        "report uses the first one unless --reward names another",
    )
    add_analysis_arguments(parser)
    parser.add_argument("--no-png", action="store_true", help="without matplotlib: no PNG files")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    Raises:
        InputError: an option, a step or a folder; what was finished is kept.
    """
    rewards = _reward_names(options.reward_model)
    if rewards and options.reward is None:
        options.reward = rewards[0]
    settings = settings_of(options)
    plan = _plan(options)
    _check_reward(options.reward, rewards, plan)
    if options.dry_run:
        sys.stdout.writelines(f"{step.line}\n" for step in plan.steps())
        return 0
    run_plan(plan)
    sys.stderr.write("computing tables and figures\n")
    results = build_results(plan.run_folders(), settings, options.command_line, [_note(plan)])
    results["steps"] = [step.line for step in plan.steps()]
    write_report(results, plan.folder / "report", options.title, with_png=not options.no_png)
    sys.stdout.write(f"{plan.folder / 'report' / 'report.md'}\n")
    sys.stdout.write(f"{plan.folder / 'report' / 'report.html'}\n")
    return 0


def _reward_names(specs: Sequence[str]) -> list[str]:
    """Return the names of the reward models; hours later would be late for a misspelt one."""
    from lm_eval_tasks.rewards.spec import parse_spec

    names = [parse_spec(text).name for text in specs]
    for name in names:
        if names.count(name) > 1:
            stop(f"--reward-model: two are named {name}; tell them apart with name=")
    return names


def _check_reward(reward: str | None, made: Sequence[str], plan: Plan) -> None:
    """Refuse a reward that neither the steps make nor the run folders have from before.

    Raises:
        InputError: a run folder will have no scores of this name.
    """
    if reward is None or reward in made:
        return
    for folder in plan.run_folders():
        if reward not in reward_names(folder):
            stop(
                f"--reward {reward}: no --reward-model has this name (there: "
                f"{', '.join(made) or 'none'}), and {folder} has no such scores"
            )


def _plan(options: argparse.Namespace) -> Plan:
    """Check the options that the steps cannot check before the first engine runs."""
    models = [parse_model(text) for text in options.model]
    if len(models) < 2:
        stop("--model: need at least two to compare; for one use thinkfast-eval sample and report")
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            stop(f"--model: two models are named {name}; tell them apart with ,name=...")
    begun = read_plan(options.out)
    rounds = _rounds(options.rounds, begun)
    for flag, value in (
        ("--num-samples", options.num_samples),
        ("--rounds", rounds),
        ("--limit", options.limit),
        ("--latency-limit", options.latency_limit),
        *(("--batch-sizes", size) for size in options.batch_sizes),
        *(("--speed-tokens", count) for count in options.speed_tokens),
    ):
        if value is not None and value < 1:
            stop(f"{flag} {value}: need a whole number of at least 1")
    engine_args: dict[str, str] = {}
    for pair in options.engine_args:
        key, mark, value = pair.partition("=")
        if not mark or not key:
            stop(f"--engine-args {pair}: need KEY=VALUE")
        engine_args[key] = value
    _check_engine_args(models, engine_args)
    _check_memory(models, engine_args)
    num_problems = _num_problems(options, models[0])
    if rounds > options.num_samples and "saturated" in num_problems:
        count = options.num_samples
        stop(
            f"--rounds {rounds}: more than the {count} samples to divide; give --rounds {count} or "
            "fewer"
        )
    if rounds > num_problems.get("latency", rounds):
        count = num_problems["latency"]
        stop(
            f"--rounds {rounds}: more than the {count} problems to divide; give --rounds {count} "
            "or fewer"
        )
    options.seed = _seed(options.seed, begun)
    sampling: list[str] = []
    for name in _PASSED_ON:
        value = getattr(options, name)
        if value is not None:
            sampling += [f"--{name.replace('_', '-')}", str(value)]
    return Plan(
        models=models,
        task=options.task,
        num_samples=options.num_samples,
        num_problems=num_problems,
        rounds=rounds,
        sampling=sampling,
        engine_args=engine_args,
        rewards=list(options.reward_model),
        batch_sizes=sorted(set(options.batch_sizes)),
        speed_tokens=(options.speed_tokens[0], options.speed_tokens[1]),
        folder=options.out,
    )


def _rounds(given: int | None, begun: Mapping[str, Any] | None) -> int:
    """Return the number of rounds; a comparison that was begun with another default keeps it."""
    if given is not None:
        return given
    stored = (begun or {}).get("rounds")
    return stored if isinstance(stored, int) else DEFAULT_ROUNDS


def _check_engine_args(models: Sequence[Model], engine_args: Mapping[str, str]) -> None:
    """Refuse what `sample` refuses, before the first step.

    Raises:
        InputError: an argument decides which checkpoint is drawn, or would spoil the times.
    """
    own = "tokenizer", "revision", "trust_remote_code"
    given = [(f"--engine-args {key}=...", key) for key in engine_args]
    given += [(f"--model {one.path}: {key}=...", key) for one in models for key in one.engine_args]
    for what, key in given:
        key = key.replace("-", "_")
        if key in NO_ENGINE_ARGS:
            fix = f"give --model PATH,{key}=VALUE" if key in own else NO_ENGINE_ARGS[key]
            stop(f"{what}: not accepted; {fix}")


def _check_memory(models: Sequence[Model], engine_args: Mapping[str, str]) -> None:
    """Refuse models with more memory than others: more samples would run at once.

    Raises:
        InputError: an argument of memory differs between two models.
    """
    given = []
    for model in models:
        both = {**engine_args, **model.engine_args}
        given.append({key.replace("-", "_"): value for key, value in both.items()})
    for key in MEMORY_ARGUMENTS:
        first = given[0].get(key)
        for model, arguments in zip(models, given, strict=True):
            if _number(arguments.get(key)) != _number(first):
                values = [f"{key}={v}" if v else f"no {key}" for v in (first, arguments.get(key))]
                stop(
                    f"--model {model.path}: {model.name} has {values[1]} and {models[0].name} has "
                    f"{values[0]}; all models of a comparison get the same memory: give "
                    f"{key}=VALUE once, with --engine-args"
                )


def _number(value: str | None) -> float | str | None:
    """Read a value, so that 0.5 and 0.50 are the same."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


def _seed(given: int | None, begun: Mapping[str, Any] | None) -> int | None:
    """Return the seed of the runs; a comparison that was begun with another default keeps it.

    None, which `sample` takes as its own default, stands for that seed in a comparison of an
    earlier version: its plan names none.
    """
    if begun is None:
        return UNSEEDED if given is None else given
    sampling = begun.get("sampling", [])
    if "--seed" not in sampling:
        return None if given == DEFAULT_SEED else given
    at = sampling.index("--seed") + 1
    return int(sampling[at]) if given is None else given


def _num_problems(options: argparse.Namespace, model: Model) -> dict[str, int]:
    """Return how many problems each regime gets, by the options and the task's data.

    Raises:
        InputError: a limit is above what the task has; a step would say it of its share.
    """
    regimes = [regime for regime in REGIMES if regime in options.regime]
    if options.latency_limit is not None and "latency" not in regimes:
        stop("--latency-limit belongs to the regime latency; add --regime latency")
    limits = dict.fromkeys(regimes, options.limit)
    if options.latency_limit is not None:
        limits["latency"] = options.latency_limit
    from lm_eval_tasks.sampling.problems import count_problems, load_problems

    if None in limits.values():
        arguments: dict[str, Any] = {"pretrained": model.path, "chat_template_args": {}}
        if model.tokenizer:
            arguments["tokenizer"] = model.tokenizer
        if model.revision:
            arguments["revision"] = model.revision
        if model.trust_remote_code:
            arguments["trust_remote_code"] = True
        task = load_problems(
            options.task,
            arguments,
            data_file=options.data_file,
            chat_template=options.chat_template or "auto",
            words=COMPARE,
        )
        count = len(task.problems)
    else:
        count = count_problems(options.task, options.data_file, COMPARE)
    for flag, limit in (("--limit", options.limit), ("--latency-limit", options.latency_limit)):
        if limit is not None and limit > count:
            stop(f"{flag} {limit}: {options.task} has {count} problems; give {count} or fewer")
    return {name: count if limit is None else limit for name, limit in limits.items()}


def _note(plan: Plan) -> str:
    """Return what a reader must know of how the runs were made."""
    parts = {"saturated": "samples of each problem", "latency": "problems"}
    divided = ", ".join(f"{regime}: of the {parts[regime]}" for regime in plan.num_problems)
    return (
        f"The models took turns on one machine; rounds: {plan.rounds}, each with its part "
        f"({divided}), in alternating order; one engine at a time, started anew for every part, "
        "start-up and warm-up outside of all times."
    )
