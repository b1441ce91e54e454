"""``make tiny``: trains the embedded models from nothing, with the shipped recipes.

First the teacher; then both students and the reward model, two at a time with one thread each
(which is faster for models of this size than one after the other with two). Every run continues
where it was killed, and a finished one is only exported.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from demo.settings import file_hash

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RECIPES = ROOT / "distill" / "recipes"
TEACHER = ("llama-tiny", "arith-teacher-tiny.yaml")
FROM_TEACHER = (
    ("mambainllama-tiny", "arith-mambainllama-tiny.yaml", "teacher.model"),
    ("llamba-tiny", "arith-llamba-tiny.yaml", "teacher.model"),
    ("prm-tiny", "arith-prm-tiny.yaml", "student.weights"),
)
"""Folder, recipe, and the recipe's key for the teacher's folder; those that take longest first."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # For vLLM on a CPU: a GiB of cache instead of most of the memory, threads not pinned to cores.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
PAUSE_S = 30.0
"""Between two lines of progress."""


class TrainingError(Exception):
    """A command failed; the text says which, and where its output is."""


def train(recipe: Path, run: Path, overrides: list[str], max_steps: int | None = None) -> None:
    """Runs ``thinkfast-distill run`` and prints how far it is now and then.

    Args:
        recipe: YAML file.
        run: run folder; its output goes to ``<run>.log``.
        overrides: ``key=value``.
        max_steps: stop, saved, after this many steps of the run.

    Raises:
        TrainingError: the exit code is not 0.
    """
    log = run.with_name(run.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(BIN / "thinkfast-distill"), "run", _shown(recipe), "--run-dir", _shown(run)]
    if max_steps is not None:
        command += ["--max-steps", str(max_steps)]
    call([*command, *overrides], log, run.name)


def call(
    command: list[str], log: Path, name: str, environment: dict[str, str] | None = None
) -> None:
    """Runs a command in the checkout with one thread; its output is appended to a file.

    Args:
        command: program and arguments.
        log: the file; its last line is shown now and then.
        name: what is shown before it.
        environment: variables beside ENVIRONMENT.

    Raises:
        TrainingError: the exit code is not 0.
    """
    with (
        log.open("a", encoding="utf-8") as out,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | (environment or {}),
            stdout=out,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        while True:
            try:
                code = process.wait(PAUSE_S)
                break
            except subprocess.TimeoutExpired:
                say(f"{name}: {_last_line(log)}")
    if code:
        raise TrainingError(
            f"{name}: {command[0]} ended with code {code}: {_last_line(log)} ({log})"
        )


def export(run: Path, out: Path) -> None:
    """Exports the newest checkpoint of a run; the folder is complete or absent."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [str(BIN / "thinkfast-distill"), "export", _shown(run), _shown(part)]
    call(command, run.with_name(run.name + ".log"), run.name)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def model_hash(model: Path) -> str:
    """A short hash of a model folder's configuration and weights."""
    return file_hash(model / "config.json", model / "model.safetensors")[:16]


def say(text: str) -> None:
    """One line with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _shown(path: Path) -> str:
    """Relative to the checkout where possible: model cards quote the command."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def make(out: Path, runs: Path) -> None:
    """Trains and exports all models.

    Args:
        out: folder of the model folders.
        runs: folder of the run folders.

    Raises:
        TrainingError: a command failed.
    """
    begin = time.monotonic()

    def one(name: str, recipe: str, changes: list[str], run: str) -> None:
        train(RECIPES / recipe, runs / run, changes)
        export(runs / run, out / name)
        say(f"{name}: trained and exported")

    out.mkdir(parents=True, exist_ok=True)
    one(*TEACHER, [], TEACHER[0])
    teacher = _shown(out / TEACHER[0])
    # The recipes name the usual folder already; a model card quotes the command as it was.
    is_usual = teacher == "thinkfast/llama-tiny"
    # Another teacher, another run: the recipes name only its folder.
    of_teacher = model_hash(out / TEACHER[0])[:8]

    def overrides(key: str) -> list[str]:
        return [] if is_usual else [f"{key}={teacher}"]

    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(one, name, recipe, overrides(key), f"{name}-{of_teacher}")
            for name, recipe, key in FROM_TEACHER
        ]
        wait(jobs, return_when=FIRST_EXCEPTION)
        for job in jobs:
            job.result()
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    minutes = (time.monotonic() - begin) / 60
    say(f"{out}: {1 + len(FROM_TEACHER)} models, {size / 1e6:.1f} MB, {minutes:.1f} minutes")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tiny_models", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "thinkfast", help="model folders")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tiny", help="run folders")
    options = parser.parse_args(arguments)
    try:
        make(options.out.resolve(), options.runs.resolve())
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
