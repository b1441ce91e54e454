"""``thinkfast-eval sample``: draw N samples per problem into a run folder, and go on after a kill.

With ``--stop-error`` a problem gets no more samples when its vote is decided. With
``--batch-sizes`` the same engine then measures its generation speed. Everything is checked
that can be checked before the engine starts: options, data, prompts, and whether the folder holds
samples of other settings.
"""

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import stop, why_not_loaded
from lm_eval_tasks.jury import VoteJury
from lm_eval_tasks.leftovers import forget_missing
from lm_eval_tasks.samples import SEED_FIELDS, SampleStore, config_hash
from lm_eval_tasks.sampling.backend import Backend, SamplingSettings
from lm_eval_tasks.sampling.openai_backend import APIS
from lm_eval_tasks.sampling.problems import TaskProblems, load_problems, task_names
from lm_eval_tasks.sampling.runner import REGIMES, draw_session
from lm_eval_tasks.sampling.waves import Waves
from lm_eval_tasks.stopping import DEFAULT_EVERY, HIGHEST_ERROR, STOP_FIELDS, StopRule
from lm_eval_tasks.throughput import check_fits, measure, missing_batch_sizes

DEFAULT_NUM_SAMPLES = 64
DEFAULT_SEED = 1234
"""lm-eval's."""
UNSEEDED = -1
"""Value of ``--seed`` that draws without seeds, as in lm-eval and vLLM."""

#: vLLM's EngineArgs that are not taken, and what is given instead. The first five decide which
#: checkpoint is drawn and how its prompts are made, which config.json records from the options.
NO_ENGINE_ARGS = {
    "model": "give --model",
    "tokenizer": "give --tokenizer",
    "revision": "give --revision",
    "tokenizer_revision": "give --revision, or --tokenizer with a folder of that revision",
    "trust_remote_code": "give --trust-remote-code",
    "disable_log_stats": "leave it out: they stamp the first tokens of the samples",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_argument_group("what to sample")
    what.add_argument("--model", required=True, help="folder or hub name; with --server its name")
    what.add_argument("--task", required=True, help=f"one of {', '.join(task_names())}")
    what.add_argument(
        "--num-samples",
        type=int,
        default=DEFAULT_NUM_SAMPLES,
        metavar="N",
        help="samples per problem, with --stop-error at most; a larger number later adds to the "
        "same folder (%(default)s)",
    )
    what.add_argument("--limit", type=int, help="only the first problems; can be raised later")
    what.add_argument("--data-file", help="JSON lines instead of the task's data set")
    what.add_argument("--out", type=Path, help="run folder (runs/NAME)")
    what.add_argument("--name", help="of the run (model, task, temperature)")

    how = parser.add_argument_group("how to sample (defaults are the task's)")
    how.add_argument("--temperature", type=float)
    how.add_argument("--top-p", type=float)
    how.add_argument("--max-tokens", type=int, help="longest sample")
    how.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="of the run (%(default)s, as lm-eval); -1 draws without seeds: the samples cannot be "
        "drawn again, but vLLM draws a whole batch at once, which is what a timing should see",
    )
    how.add_argument(
        "--regime",
        choices=REGIMES,
        default=REGIMES[0],
        help="all problems at once, or one after the other with all its samples (%(default)s)",
    )
    how.add_argument("--chat-template", choices=("auto", "off"), default="auto")
    how.add_argument(
        "--chat-template-args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="variables of the template, for example date_string=2024-07-26",
    )

    early = parser.add_argument_group("early stops (only in the regime saturated)")
    early.add_argument(
        "--stop-error",
        type=float,
        metavar="LEVEL",
        help="draw no more samples of a problem when its vote is decided: when the second answer "
        "would overtake the first with at most this posterior probability, or (the only reason at "
        "level 0) the remaining samples cannot change the vote. How many samples a problem has "
        "then depends on its answers: thinkfast-eval adaptive reports such a run, all other "
        "estimates refuse it (all samples are drawn)",
    )
    early.add_argument(
        "--stop-every",
        type=int,
        metavar="M",
        help=f"samples of a problem between two looks at its vote ({DEFAULT_EVERY})",
    )

    speed = add_speed_arguments(parser)
    speed.add_argument(
        "--speed-round",
        type=int,
        default=0,
        help="number of the measurement; what was measured under it is not repeated (%(default)s)",
    )

    engine = parser.add_argument_group("vLLM in this process")
    engine.add_argument(
        "--engine-args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of vLLM's EngineArgs: dtype=bfloat16 max_model_len=4096 max_num_seqs=256 ...",
    )
    engine.add_argument("--tokenizer", help="folder or hub name, where the model has none")
    engine.add_argument("--revision", help="of a hub model; with --server, of --tokenizer")
    engine.add_argument("--trust-remote-code", action="store_true")

    server = parser.add_argument_group("a server instead")
    server.add_argument("--server", metavar="URL", help="OpenAI-compatible, with /v1")
    server.add_argument(
        "--api",
        choices=APIS,
        default=APIS[0],
        help="chat: the server applies its chat template; completions: the prompt is made here, "
        "with the chat template of --tokenizer, and bare without one (%(default)s)",
    )
    server.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable with the key; may be unset (%(default)s)",
    )
    server.add_argument("--max-retries", type=int, default=8, help="per sample (%(default)s)")
    server.add_argument(
        "--timeout", type=float, default=600.0, help="longest silence, in s (%(default)s)"
    )

    parser.add_argument(
        "--max-in-flight",
        type=int,
        help="saturated: unfinished requests at a time (twice max_num_seqs; 64 with --server)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the settings and stop")
    parser.add_argument("--json", action="store_true", help="print the session's facts as JSON")


def add_speed_arguments(parser: argparse.ArgumentParser) -> Any:
    """Declare what is measured besides the samples; return the group of options."""
    speed = parser.add_argument_group("generation speed against batch size")
    speed.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[], metavar="B", help="(not measured)"
    )
    speed.add_argument(
        "--speed-tokens",
        type=int,
        nargs=2,
        default=[512, 512],
        metavar=("PROMPT", "NEW"),
        help="tokens of every sequence (%(default)s)",
    )
    return speed


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code.

    Raises:
        InputError: see the module.
    """
    started = time.monotonic()
    _check(options)
    engine_args = _pairs("--engine-args", options.engine_args)
    template_args = _pairs("--chat-template-args", options.chat_template_args)
    task = load_problems(
        options.task,
        _model_args(options, template_args),
        data_file=options.data_file,
        limit=options.limit,
        chat_template=options.chat_template,
        messages=bool(options.server) and options.api == "chat",
    )
    if template_args and task.prompt["chat_template_applied_by"] == "nobody":
        stop(
            f"--chat-template-args {' '.join(options.chat_template_args)}: no chat template is "
            "applied to these prompts; leave them out, or name a tokenizer that has one with "
            "--tokenizer"
        )
    settings = _settings(options, task)
    config = _config(options, task, settings, engine_args)
    if options.dry_run:
        _print_json(config)
        return 0
    tokenizer = _tokenizer(options)
    folder: Path = options.out or Path("runs") / config["name"]
    problems = task.problems
    records = [problem.record() for problem in problems]
    with SampleStore(folder).open(config, records) as store, ExitStack() as opened:
        if store.dropped_bytes:
            _say(f"{folder}: cut off a torn last line of {store.dropped_bytes} bytes")
        have = store.have()
        num_forgotten = forget_missing(folder, have)
        if num_forgotten:
            _say(f"{folder}: dropped {num_forgotten} verdicts and scores of samples that are gone")
        wanted = range(options.num_samples)
        settings = replace(settings, run_key=store.run_key)
        rule, waves = StopRule.of(config), None
        if rule is None:
            missing = sum(
                len(set(wanted) - have.get(problem.problem_id, set())) for problem in problems
            )
            total = len(problems) * options.num_samples
            _say(f"{folder}: {total - missing} of {total} samples are there")
        else:
            cap = store.config()["num_samples"]
            if options.num_samples < cap:
                stop(
                    f"--num-samples {options.num_samples}: {folder} was begun with at most {cap} "
                    "samples of a problem, which decides when a vote cannot change any more; give "
                    f"{cap} or more, or another folder with --out"
                )
            jury = opened.enter_context(VoteJury(folder, rule, cap, options.command_line))
            waves = opened.enter_context(Waves(problems, settings, rule, cap, have, jury))
            stored = sum(len(have.get(problem.problem_id, ())) for problem in problems)
            missing = waves.bound - stored
            _say(
                f"{folder}: {stored} samples are there, {waves.num_open} of {len(problems)} "
                "problems are open"
            )
        lengths = (options.speed_tokens[0], options.speed_tokens[1])
        sizes = missing_batch_sizes(folder, options.batch_sizes, options.speed_round, lengths)
        if not missing and not sizes:
            if options.json:
                _print_json({"folder": str(folder), "drawn": 0})
            return 0
        _warn_of_changes(store, config)
        seed = _engine_seed(store) if settings.seed is None else None
        own_seed = {} if seed is None else {"seed": seed}
        backend = _start(options, engine_args | own_seed, template_args, tokenizer)
        facts: dict[str, Any] = {"drawn": 0}
        try:
            startup_s = time.monotonic() - started
            if sizes:
                check_fits(backend, sizes, *lengths)
            if missing:
                facts = draw_session(
                    store,
                    backend,
                    problems,
                    settings,
                    num_samples=options.num_samples,
                    regime=options.regime,
                    session_facts={"startup_s": startup_s}
                    | {n: config[n] for n in ("command", "versions", "hardware", "git_commit")}
                    | {"started": _now(), "limit": options.limit}
                    | ({} if seed is None else {"engine_seed": seed}),
                    stream=sys.stderr,
                    waves=waves,
                )
            if sizes:
                measure(
                    backend,
                    folder,
                    config_hash=store.config_hash,
                    round_number=options.speed_round,
                    batch_sizes=sizes,
                    num_prompt_tokens=lengths[0],
                    num_tokens=lengths[1],
                )
        finally:
            backend.close()
    if options.json:
        _print_json({"folder": str(folder)} | facts)
    elif missing:
        rate = facts["tokens"] / facts["wall_s"]
        if waves is not None:
            total = waves.bound  # no problem is open any more
        sys.stdout.write(
            f"{folder}: {total} samples of {len(problems)} problems; this session drew "
            f"{facts['drawn']} in {facts['wall_s']:.1f} s, {rate:.0f} tokens/s\n"
        )
    return 0


# -- options --------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    """Refuse values that no run can have."""
    for flag, value, least in (
        ("--num-samples", options.num_samples, 1),
        ("--limit", options.limit, 1),
        ("--max-tokens", options.max_tokens, 1),
        ("--max-in-flight", options.max_in_flight, 1),
        ("--max-retries", options.max_retries, 0),
        ("--seed", options.seed, -1),
        ("--stop-every", options.stop_every, 1),
        ("--speed-round", options.speed_round, 0),
        *(("--batch-sizes", size, 1) for size in options.batch_sizes),
        *(("--speed-tokens", count, 1) for count in options.speed_tokens),
    ):
        if value is not None and value < least:
            stop(f"{flag} {value}: need a whole number of at least {least}")
    if options.temperature is not None and not 0 <= options.temperature < float("inf"):
        stop(f"--temperature {options.temperature}: need 0 or more")
    if options.temperature == 0 and options.num_samples > 1:
        stop(
            f"--temperature 0 draws the same text {options.num_samples} times; give a temperature "
            "above 0, or --num-samples 1"
        )
    _check_stops(options)
    if options.top_p is not None and not 0 < options.top_p <= 1:
        stop(f"--top-p {options.top_p}: need more than 0 and at most 1")
    if not options.timeout > 0:
        stop(f"--timeout {options.timeout}: need more than 0 seconds")
    if options.data_file is not None and not Path(options.data_file).is_file():
        stop(f"--data-file {options.data_file}: there is no such file")
    given = [pair.partition("=")[0].strip().replace("-", "_") for pair in options.engine_args]
    for key in given:
        if key in NO_ENGINE_ARGS and not options.server:
            stop(f"--engine-args {key}=...: not accepted; {NO_ENGINE_ARGS[key]}")
    if options.seed == UNSEEDED and "seed" in given:
        stop(
            "--engine-args seed=...: with --seed -1 the engine gets another seed in every session, "
            "so that none repeats the random numbers of an earlier one; leave it out"
        )
    if options.server:
        if options.seed == UNSEEDED:
            stop(
                "--seed -1: a server may repeat its random numbers after a restart, and samples "
                "would be drawn twice; give a --seed of 0 or more with --server"
            )
        if not options.server.startswith(("http://", "https://")):
            stop(f"--server {options.server}: need a URL such as http://localhost:8000/v1")
        if options.batch_sizes:
            stop("--batch-sizes measures vLLM in this process; leave it out with --server")
        if options.engine_args:
            stop("--engine-args belong to vLLM in this process; give them to the server instead")
        key = os.environ.get(options.api_key_env) or ""
        if not (key.isascii() and key.isprintable()):
            stop(
                f"--api-key-env {options.api_key_env}: its value has a line break or another "
                "character that no HTTP header can have; set the variable without it"
            )
        if options.api == "chat" and options.tokenizer:
            stop("--tokenizer is for --api completions; with chat the server makes the prompt")
        if options.revision and not options.tokenizer:
            stop(
                f"--revision {options.revision}: a server has its model; it is that of --tokenizer"
            )
        if options.api == "chat" and options.chat_template == "off":
            stop("--chat-template off needs --api completions; chat servers always apply one")
    elif options.api != APIS[0]:
        stop(f"--api {options.api} is for a server; name it with --server URL")


def _check_stops(options: argparse.Namespace) -> None:
    """Refuse early stops that no run can have; fill in the default."""
    if options.stop_error is None:
        if options.stop_every is not None:
            stop(f"--stop-every {options.stop_every}: needs the level of --stop-error LEVEL")
        return
    if not 0 <= options.stop_error < HIGHEST_ERROR:
        stop(f"--stop-error {options.stop_error:g}: need 0 or more and below {HIGHEST_ERROR:g}")
    if options.regime != REGIMES[0]:
        stop(
            f"--stop-error needs --regime {REGIMES[0]}: one problem at a time has no others to "
            "give its time to"
        )
    if options.stop_every is None:
        options.stop_every = DEFAULT_EVERY


def _pairs(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE arguments; values are JSON where they can be, else text."""
    pairs: dict[str, Any] = {}
    for pair in given:
        key, mark, value = pair.partition("=")
        if not mark or not key.strip():
            stop(f"{flag} {pair}: need KEY=VALUE")
        key = key.strip().replace("-", "_")
        if key in pairs:
            stop(f"{flag} {key}: given twice")
        lowered = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        try:
            pairs[key] = json.loads(lowered)
        except ValueError:
            pairs[key] = value
        except RecursionError:
            stop(f"{flag} {key}: the value is nested too deeply for JSON; give a flatter one")
    return pairs


def _model_args(options: argparse.Namespace, template_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's names for the checkpoint whose chat template makes the prompts."""
    found: dict[str, Any] = {"chat_template_args": dict(template_args)}
    if options.tokenizer:
        found["tokenizer"] = options.tokenizer
    if not options.server:  # a server's model name is no checkpoint
        found["pretrained"] = options.model
    if options.revision:
        found["tokenizer_revision" if options.server else "revision"] = options.revision
    if options.trust_remote_code:
        found["trust_remote_code"] = True
    return found


def _settings(options: argparse.Namespace, task: TaskProblems) -> SamplingSettings:
    def chosen(name: str) -> Any:
        value = getattr(options, name)
        return task.defaults[name] if value is None else value

    return SamplingSettings(
        temperature=float(chosen("temperature")),
        top_p=float(chosen("top_p")),
        max_tokens=int(chosen("max_tokens")),
        seed=None if options.seed == UNSEEDED else options.seed,
        stop=task.stop,
    )


def _config(
    options: argparse.Namespace,
    task: TaskProblems,
    settings: SamplingSettings,
    engine_args: Mapping[str, Any],
) -> dict[str, Any]:
    """Return config.json: everything resolved, and where it ran."""
    from lm_eval_tasks.sampling import environment

    engine: dict[str, Any] = {"max_in_flight": options.max_in_flight}
    if options.server:
        engine |= {"backend": "server", "api": options.api}
        if options.api == "chat" and options.chat_template_args:
            # Runs of earlier versions name the variables in "prompt" and did not send them.
            engine["chat_template_args"] = "sent"
        identity = f"server:{options.model}"
    else:
        engine |= {"backend": "vllm"} | dict(engine_args)
        identity = environment.model_id(options.model, options.revision)
    if options.tokenizer:
        revision = options.revision if options.server else None  # else it is the model's
        engine["tokenizer"] = environment.model_id(options.tokenizer, revision)
    base = Path(options.model).name or Path(options.model).resolve().name
    regime = "" if options.regime == REGIMES[0] else f"-{options.regime}"
    stops: dict[str, Any] = {}
    if options.stop_error is not None:
        stops = dict(zip(STOP_FIELDS, (options.stop_error, options.stop_every), strict=True))
        regime = f"-stop{options.stop_error:g}"
    config = {
        "name": options.name or f"{base}-{task.task}-t{settings.temperature:g}{regime}",
        "model": options.model,
        "model_id": identity,
        "server": options.server,
        "task": task.task,
        "task_version": task.version,
        "data_file": options.data_file,
        "data_sha256": task.data_sha256,
        "limit": options.limit,
        "num_samples": options.num_samples,
        "prompt": dict(task.prompt) | {"stop": list(task.stop)},
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "seed_fields": list(SEED_FIELDS),
        "regime": options.regime,
        "engine": engine,
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "git_commit": environment.git_commit(),
        "command": options.command_line,
        "created": _now(),
    }
    config |= stops  # a run without early stops has no such fields
    return config | {"config_hash": config_hash(config)}


def _start(
    options: argparse.Namespace,
    engine_args: Mapping[str, Any],
    template_args: Mapping[str, Any],
    tokenizer: Any,
) -> Backend:
    """Connect to the server or load the model."""
    if options.server:
        from lm_eval_tasks.sampling.openai_backend import OpenAIBackend, ServerOptions

        server = ServerOptions(
            url=options.server,
            model=options.model,
            api=options.api,
            chat_template_args=template_args if options.api == "chat" else {},
            api_key=os.environ.get(options.api_key_env),
            max_retries=options.max_retries,
            timeout_s=options.timeout,
        )
        return OpenAIBackend(server, options.max_in_flight or 64, tokenizer)
    # Its lines would tear the progress line and spoil --json; what the user chose stays.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # The engine in this very process: one of its own survives a kill -9 of this one for ever, with
    # all the memory that the resumed run needs.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from lm_eval_tasks.sampling.vllm_backend import start_vllm

    extra: dict[str, Any] = {}
    for name in ("tokenizer", "revision"):
        if getattr(options, name):
            extra[name] = getattr(options, name)
    if options.trust_remote_code:
        extra["trust_remote_code"] = True
    return start_vllm(options.model, extra | dict(engine_args), options.max_in_flight)


def _engine_seed(store: SampleStore) -> int:
    """Return a seed for an engine that draws without seeds: another one in every run and session.

    With vLLM's default of 0, or any fixed one, a resumed session would begin with the random
    numbers with which the first one began, and draw some of its samples again.
    """
    used = {session.get("engine_seed") for session in store.sessions()}
    while (seed := secrets.randbits(31)) in used:
        pass
    return seed


def _tokenizer(options: argparse.Namespace) -> Any:
    """Load the tokenizer of the prompts that a server gets; vLLM in this process loads its own."""
    if not (options.server and options.tokenizer):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            options.tokenizer,
            revision=options.revision or "main",
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:  # a damaged file: of any class
        stop(f"--tokenizer {options.tokenizer}: cannot be loaded ({why_not_loaded(error)})")


def _warn_of_changes(store: SampleStore, config: Mapping[str, Any]) -> None:
    """Times of different machines and versions do not belong into one curve; say so."""
    for session in store.sessions()[-1:]:
        for name in ("versions", "hardware"):
            if session.get(name) != config[name]:
                _say(
                    f"warning: {name} have changed since session {session['session']}; compare "
                    f"times only within a session (both are in {store.folder / 'sessions.jsonl'})"
                )


def _print_json(found: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
