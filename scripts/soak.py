"""Soak test: random traffic against ``vllm serve`` for a while, and what became of the server.

    python -m scripts.soak --model thinkfast/llamba-tiny --minutes 20 --out runs/soak-llamba

Starts the server (CPU, float32, a cache so small that requests are preempted), sends requests of
every kind (``soak_traffic.py``) with clients that leave in the middle and malformed ones, and fails
if one of these is not so:

* every well-formed request is answered rightly, every malformed one with a status 400 to 499;
* the greedy answers of a fixed set of probes are the same before, during and after the traffic;
* memory does not grow (`soak_server.judge_growth` says what that means);
* in the end nothing runs or waits, no block of the cache is in use, and the server ends when told;
* the server logged no error before it was told to end. (vLLM 0.32 may log that its engine died when
  it is told to end; what it logs then is in the results.)

Writes results.json, summary.md, progress.jsonl and server.log. Exit code 0: all is well; 1: not;
2: a wrong argument.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from demo.errors import InputError
from demo.store import make_folder
from scripts.soak_client import Probes, new_session, outcome, problems, send
from scripts.soak_server import (
    AT_REST,
    MIB,
    Growth,
    Server,
    ServerError,
    bad_records,
    judge_growth,
)
from scripts.soak_traffic import Traffic
from scripts.tiny_models import ROOT
from vllm_thinkfast.bench.environment import git_commit, hardware, versions

NUM_SAMPLES, MAX_SAMPLE_S = 120, 5.0
"""Of memory: so many over the traffic, but not more than MAX_SAMPLE_S apart."""
CACHE_MIB, LLAMBA_CACHE_MIB = 6, 1
"""With the embedded models: so little that requests are preempted, enough for the longest one."""
REST_S = 60.0
"""Within which everything must have ended after the last request."""
LINE_S = 30.0
"""Between two lines of progress where there is no terminal."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""That end the run and the server. SIGINT is named since a shell's background jobs ignore it."""
MAX_KEPT = 200
"""Failures in the results; all are counted."""


@dataclass(frozen=True)
class Check:
    """One thing that had to be so."""

    name: str
    found: str
    passed: bool | None
    """None: this run was too short to say."""


class Soak:
    """The traffic against one server, and what is seen meanwhile."""

    def __init__(self, server: Server, traffic: Traffic, options: argparse.Namespace) -> None:
        """``options``: of the command line."""
        self.server = server
        self.traffic = traffic
        self.options = options
        self.probes = Probes(traffic.probes())
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.refusals: dict[str, str] = {}
        """The first refusal of each kind."""
        self.failures: Counter[str] = Counter()
        self.kept_failures: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.metrics: dict[str, float] = {}
        self.at_rest = False
        self.traffic_s = 0.0
        self._indices = count()
        self._begin = 0.0

    async def run(self) -> None:
        """Probes, traffic with probes, probes.

        Raises:
            ServerError: the server died, or has no metrics that we know.
        """
        async with new_session(self.server.url) as session:
            await self._probe(session)
            await self._probe(session)  # from the prefix cache, if there is one
            self._begin = time.monotonic()
            deadline = self._begin + 60 * self.options.minutes
            parts = [
                self._watch(deadline),
                self._probe_often(session, deadline),
                *(self._client(session, deadline) for _ in range(self.options.requests_in_flight)),
            ]
            tasks = [asyncio.create_task(part) for part in parts]
            try:
                await asyncio.gather(*tasks)
            finally:  # the server died: the others must not outlive the session
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self.traffic_s = time.monotonic() - self._begin
            await self._probe(session)
            await self._wait_for_rest()

    async def _client(self, session: Any, deadline: float) -> None:
        """One client: a request after the other."""
        while time.monotonic() < deadline:
            index = next(self._indices)
            request = self.traffic.request(index)
            await asyncio.sleep(min(request.pause_s, deadline - time.monotonic()))
            answer = await send(session, self.server.url, request)
            self.outcomes[request.kind, outcome(request, answer)] += 1
            if request.kind not in self.refusals and answer.status not in (None, 200):
                self.refusals[request.kind] = answer.error
            for what in problems(request, answer):
                self._fail("request", f"request {index}, {request.kind}: {what}")

    async def _probe(self, session: Any) -> None:
        for what in await self.probes.run(session, self.server.url):
            self._fail("probe", what)

    async def _probe_often(self, session: Any, deadline: float) -> None:
        pause_s = self.options.probe_every
        while time.monotonic() + pause_s < deadline:
            await asyncio.sleep(pause_s)
            await self._probe(session)

    async def _watch(self, deadline: float) -> None:
        """Writes down memory and metrics, and says how far it is."""
        progress = self.options.out / "progress.jsonl"
        pause_s = min(MAX_SAMPLE_S, 60 * self.options.minutes / NUM_SAMPLES)
        said_s = 0.0
        while time.monotonic() < deadline:
            self.server.check_alive()
            resident = await asyncio.to_thread(self.server.resident_bytes)
            num_bytes = sum(resident.values())
            # A server that is busy may be late with its metrics; if it hangs, requests say so.
            with contextlib.suppress(OSError):
                self.metrics = await asyncio.to_thread(self.server.metrics)
            seconds = time.monotonic() - self._begin
            self.memory.append((seconds, num_bytes))
            record = {
                "seconds": round(seconds, 2),
                "requests": self.outcomes.total(),
                "failures": self.failures.total(),
                "probe_rounds": self.probes.num_rounds,
                "resident_mib": round(num_bytes / MIB, 1),
                "processes_mib": {name: round(b / MIB, 1) for name, b in resident.items()},
                **self.metrics,
            }
            with progress.open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
            line = (
                f"soak: {seconds / 60:.1f} of {self.options.minutes:g} minutes, "
                f"{record['requests']} requests, {record['failures']} failures, "
                f"{record['probe_rounds']} rounds of probes, {record['resident_mib']:.0f} MiB, "
                f"{self.metrics.get('running', 0):.0f} running, "
                f"{self.metrics.get('preemptions', 0):.0f} preemptions"
            )
            if sys.stderr.isatty():
                print(f"\r{line}", end="", file=sys.stderr, flush=True)
            elif seconds >= said_s:
                print(line, file=sys.stderr, flush=True)
                said_s += LINE_S
            await asyncio.sleep(pause_s)
        if sys.stderr.isatty():
            print(file=sys.stderr)

    async def _wait_for_rest(self) -> None:
        deadline = time.monotonic() + REST_S
        while not self.at_rest and time.monotonic() < deadline:
            self.server.check_alive()
            with contextlib.suppress(OSError):
                self.metrics = await asyncio.to_thread(self.server.metrics)
                self.at_rest = all(self.metrics[name] == 0 for name in AT_REST)
            await asyncio.sleep(0.2)

    def _fail(self, what: str, text: str) -> None:
        self.failures[what] += 1
        if len(self.kept_failures) < MAX_KEPT:
            self.kept_failures.append(text)
            print(f"\nsoak: {text}" if sys.stderr.isatty() else f"soak: {text}", file=sys.stderr)

    def checks(self, growth: Growth, end: Sequence[str], log: Sequence[str]) -> list[Check]:
        """Everything that had to be so.

        Args:
            growth: of memory.
            end: what was wrong with how the server ended.
            log: errors in the server's log.
        """
        wrong, changed = self.failures["request"], self.failures["probe"]
        rest = ", ".join(f"{name} {self.metrics.get(name, 'unknown')}" for name in AT_REST)
        if growth.grew is None:
            memory = growth.why
        else:
            memory = (
                f"median of the second quarter {growth.second_quarter_mib:.1f} MiB, of the last "
                f"{growth.last_quarter_mib:.1f} MiB; slope {growth.slope_mib_per_hour:.1f} MiB/h"
                f"{': ' * bool(growth.why)}{growth.why}"
            )
        total = self.outcomes.total()
        rounds = f"{len(self.probes.requests)} probes, {self.probes.num_rounds} rounds"
        return [
            Check("requests end as they must", f"{total} requests, {wrong} did not", wrong == 0),
            Check("probes say the same", f"{rounds}, {changed} differences", changed == 0),
            Check("memory does not grow", memory, None if growth.grew is None else not growth.grew),
            Check("at rest in the end", rest, self.at_rest),
            Check("no errors in the log", f"{len(log)} errors", not log),
            Check("the server ends", "; ".join(end) or "when told", not end),
        ]


def summary(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    config = results["config"]
    settings = (
        f"{results['traffic_s'] / 60:.1f} minutes, seed {config['seed']}, "
        f"{config['requests_in_flight']} requests in flight."
    )
    lines = [
        f"# Soak of {config['model']}: {'passed' if results['passed'] else 'FAILED'}",
        "",
        settings,
        "",
        "| check | found | |",
        "| --- | --- | --- |",
    ]
    words = {True: "passed", False: "FAILED", None: "not judged"}
    lines += [f"| {c['name']} | {c['found']} | {words[c['passed']]} |" for c in results["checks"]]
    metrics = results["metrics"]
    measured = (
        f"{metrics.get('preemptions', 0):.0f} preemptions, "
        f"{metrics.get('prompt_tokens', 0):,.0f} prompt tokens, "
        f"{metrics.get('generated_tokens', 0):,.0f} generated tokens. "
        "Largest change of a probe's log-probability: "
        f"{results['probes']['max_logprob_change']:.2g} nats."
    )
    if not metrics.get("preemptions"):
        measured += " Nothing was preempted: a smaller --cache-mib would change that."
    lines += ["", measured, "", "| kind of request | how it ended |", "| --- | --- |"]
    for kind, outcomes in results["outcomes"].items():
        shown = ", ".join(f"{what}: {number}" for what, number in outcomes.items())
        lines.append(f"| {kind} | {shown} |")
    for title, found in (("Failures", results["failures"]), ("Log", results["log"])):
        if found:
            lines += ["", f"## {title}", "", "```text", *found, "```"]
    return "\n".join(lines) + "\n"


def soak(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """Does everything; whether all is well.

    Args:
        options: of the command line.
        arguments: the command line itself, for the results.

    Raises:
        InputError: a wrong argument.
        ServerError: the server did not start.
    """
    _check(options)
    traffic = traffic_for(options.seed, options.model)
    make_folder(options.out)
    log = options.out / "server.log"
    server = Server(
        options.vllm,
        options.model,
        log,
        options.cache_mib,
        options.max_num_seqs,
        shlex.split(options.serve_args),
    )
    run = Soak(server, traffic, options)
    death = []
    try:
        server.wait_until_ready()
        try:
            asyncio.run(_until_interrupted(run))
        except ServerError as error:
            death.append(str(error))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            _interrupt_on_signals()  # the loop's handlers are gone with it
    finally:
        log_bytes = log.stat().st_size
        end = server.stop()
    growth = judge_growth(run.memory)
    errors, errors_at_end = bad_records(log, log_bytes)
    checks = run.checks(growth, end, errors)
    by_kind: dict[str, dict[str, int]] = {}
    for (kind, what), number in sorted(run.outcomes.items()):
        by_kind.setdefault(kind, {})[what] = number
    results = {
        "passed": all(check.passed is not False for check in checks),
        "checks": [vars(check) for check in checks],
        "traffic_s": run.traffic_s,
        "outcomes": by_kind,
        "refusals": run.refusals,
        "num_failures": dict(run.failures),
        "failures": death + run.kept_failures,
        "probes": run.probes.as_json(),
        "memory": growth.as_json() | {"samples": run.memory},
        "metrics": run.metrics,
        "log": errors[:MAX_KEPT],
        "log_at_end": errors_at_end[:MAX_KEPT],
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "command": shlex.join(["python", "-m", "scripts.soak", *arguments]),
        "serve_command": shlex.join(server.command),
        "versions": versions(),
        "hardware": hardware(),
        "git_commit": git_commit(),
    }
    # Paths are relative to the checkout: results are kept in other places than they were made.
    shown = json.dumps(results, indent=1).replace(f"{ROOT}/", "")
    text = summary(json.loads(shown))
    (options.out / "results.json").write_text(shown + "\n", "utf-8")
    (options.out / "summary.md").write_text(text, "utf-8")
    print(text)
    return bool(results["passed"])


def _check(options: argparse.Namespace) -> None:
    """Checks the arguments, and fills in the cache's size.

    Raises:
        InputError: one is wrong.
    """
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in ("minutes", "probe_every") and not value > 0:
            raise InputError(f"{flag}: give a number above 0")
        is_count = name in ("requests_in_flight", "max_num_seqs", "cache_mib")
        if is_count and value is not None and value < 1:
            raise InputError(f"{flag}: give at least 1")
    try:
        shlex.split(options.serve_args)
    except ValueError as error:
        raise InputError(
            f"--serve-args {options.serve_args!r}: {error}; quote it as a shell wants it"
        ) from None
    model = options.model
    if not (options.vllm.is_file() and os.access(options.vllm, os.X_OK)):
        raise InputError(f"--vllm {options.vllm}: no such program; give the path of vllm")
    if any((options.out / name).exists() for name in ("results.json", "progress.jsonl")):
        raise InputError(f"--out {options.out}: holds a run already; give another folder")
    for name in ("config.json", "tokenizer.json"):
        if not (model / name).is_file():
            raise InputError(f"--model {model}: has no {name}; give a model's folder")
    settings = model / "tokenizer_config.json"
    if not (model / "chat_template.jinja").is_file() and not (
        settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    ):
        raise InputError(
            f"--model {model}: has no chat template; convert it with --tokenizer of an instruct "
            "model"
        )
    if options.cache_mib is None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        is_llamba = config.get("model_type") == "llamba"
        options.cache_mib = LLAMBA_CACHE_MIB if is_llamba else CACHE_MIB


def traffic_for(seed: int, model: Path) -> Traffic:
    """The traffic of a seed for a model's folder."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = range(tokenizer.get_vocab_size())
    partial = [token for token in tokens if "\ufffd" in tokenizer.decode([token])]
    special = tokenizer.get_added_tokens_decoder()
    return Traffic(seed, config["vocab_size"], special, partial)


async def _until_interrupted(run: Soak) -> None:
    """The run; a signal cancels it, since an exception could come up anywhere in the loop."""
    task = asyncio.current_task()
    assert task is not None
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await run.run()


def _interrupt_on_signals() -> None:
    """SIGNALS raise KeyboardInterrupt from now on."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _Parser(prog="python -m scripts.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder, with a chat template")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=20, help="of traffic (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic (%(default)s)")
    parser.add_argument("--requests-in-flight", type=int, default=8, help="(%(default)s)")
    parser.add_argument(
        "--probe-every", type=float, default=30, metavar="S", help="seconds (%(default)s)"
    )
    parser.add_argument(
        "--cache-mib",
        type=int,
        help=f"memory for states and KV ({CACHE_MIB}; {LLAMBA_CACHE_MIB} for a Llamba)",
    )
    parser.add_argument("--max-num-seqs", type=int, default=64, help="(%(default)s)")
    vllm = Path(sys.executable).with_name("vllm")
    parser.add_argument("--vllm", type=Path, default=vllm, help="the program (this Python's)")
    parser.add_argument(
        "--serve-args", default="", metavar="TEXT", help="more arguments for vllm serve"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    _interrupt_on_signals()
    try:
        return 0 if soak(options, given) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the server has ended", file=sys.stderr)
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
