"""``make demo``: a Llama against the Llamba and the MambaInLlama distilled from it, in vLLM.

Samples and scores the embedded models with the task ``arith_passk``, measures their speed side by
side, and writes a table, a figure and a result file. A run that was killed continues where it
stopped.
"""

import argparse
import json
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

from demo.errors import InputError
from demo.measure import Measurement, Progress
from demo.packages import DISTRIBUTIONS, check_packages
from demo.settings import PROBLEMS, ROOT, Contender, Settings, resolved
from demo.store import PhaseStore, lock_folder
from vllm_thinkfast.bench.environment import git_commit, hardware, versions
from vllm_thinkfast.bench.store import write_atomically

OUT = ROOT / "demo-results"
QUIET_SECONDS = 15
"""Between two progress lines where the output is not a terminal."""


class Console(Progress):
    """Progress on stdout, with the time since the start."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.is_terminal = sys.stdout.isatty()
        self.last_shown = 0.0
        self.is_line_open = False

    def say(self, text: str) -> None:
        """One line."""
        if self.is_line_open:
            print()
            self.is_line_open = False
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)

    def update(self, what: str, done: int, total: int) -> None:
        """Rewrites the line on a terminal; elsewhere a new line now and then."""
        now = time.monotonic()
        pause = 0.5 if self.is_terminal else QUIET_SECONDS
        if now - self.last_shown < pause and done != total:
            return
        self.last_shown = now
        if not self.is_terminal:
            self.say(f"{what} {done} of {total}")
            return
        minutes, seconds = divmod(int(now - self.begin), 60)
        print(f"\r[{minutes:2d}:{seconds:02d}] {what} {done} of {total} ", end="", flush=True)
        self.is_line_open = True


class _Parser(argparse.ArgumentParser):
    """One line instead of the usage text for a wrong option."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `python -m demo.run --help` lists the options")


def parse(arguments: list[str]) -> tuple[Settings, Path, bool]:
    """Resolves the command line.

    Returns:
        (settings, output folder, whether stored results are to be forgotten).

    Raises:
        InputError: an unknown option or a value that is not accepted.
    """
    d = Settings()
    parser = _Parser(prog="demo", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--data", default=str(PROBLEMS), metavar="FILE",
        help="word problems in GSM8K's field layout, one JSON object per line; default: the "
        "test problems of the task arith_passk")  # fmt: skip
    add("--limit", type=_whole, default=d.limit, metavar="P",
        help=f"use only the first P problems, default {d.limit}")  # fmt: skip
    add("--num-samples", type=_whole, default=d.num_samples, metavar="N",
        help=f"samples per problem, default {d.num_samples}")  # fmt: skip
    add("--max-tokens", type=_whole, default=d.max_tokens, metavar="T",
        help=f"longest answer in tokens, default {d.max_tokens}")  # fmt: skip
    add("--speed-rounds", type=_whole, default=d.speed_rounds, metavar="R",
        help=f"rounds of the speed measurement, at least 3, default {d.speed_rounds}")  # fmt: skip
    add("--seed", type=int, default=d.seed, help=f"default {d.seed}")
    add("--out", type=Path, default=OUT, metavar="DIR",
        help="folder for results and logs, default demo-results")  # fmt: skip
    add("--fresh", action="store_true", help="measure again, even what an earlier run finished")
    chosen = parser.parse_args(arguments)
    if chosen.speed_rounds < 3:
        raise InputError(f"--speed-rounds {chosen.speed_rounds}: at least 3 show a spread")
    if not 0 <= chosen.seed < 2**31:
        raise InputError(f"--seed {chosen.seed}: need a whole number from 0 to 2147483647")
    if chosen.max_tokens > d.max_model_len // 2:
        raise InputError(
            f"--max-tokens {chosen.max_tokens}: at most {d.max_model_len // 2}, prompt and answer "
            f"share {d.max_model_len} tokens"
        )
    settings = Settings(
        data=str(Path(chosen.data).resolve()),
        limit=chosen.limit,
        num_samples=chosen.num_samples,
        max_tokens=chosen.max_tokens,
        speed_rounds=chosen.speed_rounds,
        seed=chosen.seed,
    )
    return settings, chosen.out.resolve(), chosen.fresh


def _whole(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def check_data(path: Path) -> int:
    """Reads the data file once, before anything slow begins; returns the number of problems.

    Raises:
        InputError: the file is missing or malformed; names the file and the line.
    """
    from lm_eval_tasks.answers import parse_number
    from lm_eval_tasks.data import read_local_rows

    if not path.is_file():
        raise InputError(
            f"--data {path}: no such file; give a JSON lines file with 'question' and 'answer' "
            "(ending in '#### <number>') on each line"
        )

    def check(row: object) -> str | None:
        assert isinstance(row, dict)
        _, mark, last = row["answer"].rpartition("####")
        is_good = mark and parse_number(last) is not None
        return None if is_good else f"'answer' must end in '#### <number>': {row['answer'][-40:]!r}"

    return len(read_local_rows(str(path), {"question": str, "answer": str}, {}, check))


def run(arguments: list[str]) -> None:
    """Runs the demo.

    Raises:
        InputError: something the user can mend.
        EngineError: an engine failed.
    """
    from demo.contenders import find_contenders
    from demo.engine import EngineProcess
    from demo.figure import draw
    from demo.report import build_results, results_text, table

    settings, out, is_fresh = parse(arguments)
    check_packages()
    num_problems = check_data(Path(settings.data))
    contenders = find_contenders()
    console = Console()
    lock = lock_folder(out)
    log = out / "engines.log"
    store = PhaseStore(out / "phases")
    if is_fresh:
        store.clear()
    num_problems = min(num_problems, settings.limit or num_problems)
    console.say(
        f"{num_problems} problems from {settings.data}, {settings.num_samples} samples each"
    )
    console.say(f"messages of vLLM and lm-eval: {log}")
    values = resolved(settings)
    environment = {"versions": versions(*DISTRIBUTIONS), "hardware": hardware()}

    def start(contender: Contender) -> EngineProcess:
        return EngineProcess(contender.folder, values, log)

    measured = Measurement(settings, contenders, store, environment, console, start).run()
    results = build_results(
        contenders,
        measured,
        {
            "settings": values,
            **environment,
            "git_commit": git_commit() or "unknown",
            "command": shlex.join([sys.executable, "-m", "demo.run", *arguments]),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "this_call_s": round(time.monotonic() - console.begin, 1),
        },
    )
    text = table(results)
    write_atomically(out / "results.json", results_text(results))
    write_atomically(out / "table.txt", text + "\n")
    for name, result in measured["passk"].items():
        lines = [json.dumps(sample) for sample in result["samples"]]
        write_atomically(out / f"samples-{name}.jsonl", "\n".join(lines) + "\n")
    draw(results, out / "figure.png")
    console.say("done")
    print(f"\n{text}\n")
    print(f"figure:  {out / 'figure.png'}")
    print(f"table:   {out / 'table.txt'}")
    print(f"numbers: {out / 'results.json'}, samples: {out / 'samples-*.jsonl'}")
    lock.close()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failed engine, 2 for a user's mistake."""
    from demo.engine import EngineError
    from lm_eval_tasks.errors import InputError as TaskInputError

    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TaskInputError:  # has printed its line already
        return 2
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the next call continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
