"""Breaks guarantees on purpose, each in a copy of the checkout, and shows which test notices.

    python -m scripts.broken_guarantees
    python -m scripts.broken_guarantees new-sequence pickles
    python -m scripts.broken_guarantees --list

Of every guarantee the test is run twice in the copy: as it is, where it has to pass, and with one
piece of the code replaced, where it has to fail with a failed assertion or an error of the test's
own, not because the test cannot be found. Exit code 0 if every test noticed, 1 if one did not, 2
for a name that there is not. ``docs/trust.md`` has the table of the last run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("vllm_thinkfast", "lm_eval_tasks", "tests", "distill", "scripts", "pyproject.toml")
"""What the tests named below import, and pytest's settings."""
TIMEOUT_S = 1800
_SUMMARY = re.compile(r"\b(?:(\d+) failed|(\d+) passed|(\d+) errors?)\b")


@dataclass(frozen=True)
class Guarantee:
    """A promise, a way to break it, and the test that has to notice."""

    name: str
    promise: str
    broken: str
    """What the replacement does."""
    file: str
    text: str
    """Occurs once in ``file``."""
    replacement: str
    test: str
    """What pytest is given."""


_CONV = "vllm_thinkfast/ops/causal_conv/cpu.py"
_PROPERTY = "tests/vllm_thinkfast/trust/test_scheduling_property.py"

GUARANTEES: tuple[Guarantee, ...] = (
    Guarantee(
        "new-sequence",
        "a new sequence starts from an empty state, whatever its slot held before",
        "the SSM state of a new sequence is what the slot's last user left",
        "vllm_thinkfast/layers/recurrent_mixer.py",
        "            initial.masked_fill_(~has_state.view(-1, *[1] * (initial.dim() - 1)), 0.0)\n",
        "",
        f"{_PROPERTY}::test_prefixes_are_shared[llamba]",
    ),
    Guarantee(
        "chunk-border",
        "a prompt in chunks gives what it gives at once",
        "the convolution forgets its last inputs at the border of a chunk",
        _CONV,
        "    tails = state[slots].float().masked_fill_(is_fresh[:, None, None], 0.0)\n",
        "    tails = torch.zeros_like(state[slots], dtype=torch.float32)\n",
        "tests/vllm_thinkfast/ops/test_causal_conv.py::test_prefill_split_equals_whole",
    ),
    Guarantee(
        "fork",
        "samples of a prompt start from the state at its end",
        "a sample keeps what its slot held; the state at the prompt's end is not copied there",
        "vllm_thinkfast/compat.py",
        "        copy(longest.values(), num_blocks, kv_cache_block_copies)\n",
        "        wrong = [(pair[1], pair[1]) for pair in kv_cache_block_copies]\n"
        "        copy(longest.values(), num_blocks, wrong)\n",
        f"{_PROPERTY}::test_prefixes_are_shared[llamba]",
    ),
    Guarantee(
        "pickles",
        "a weight file cannot run code",
        ".bin files are opened as any pickle (weights_only=False)",
        "vllm_thinkfast/checkpoints/folder.py",
        'torch.load(file, map_location="cpu", weights_only=True, mmap=True)',
        'torch.load(file, map_location="cpu", weights_only=False, mmap=True)',
        "tests/vllm_thinkfast/checkpoints/test_reader.py::test_pickle_with_code_is_refused",
    ),
    Guarantee(
        "index",
        "a folder's weights come from the folder",
        "an index may name any file",
        "vllm_thinkfast/checkpoints/folder.py",
        "        if not is_name or not file.endswith(suffix):\n",
        "        if not isinstance(file, str):\n",
        "tests/vllm_thinkfast/trust/test_mended.py::test_index_outside_of_the_folder",
    ),
    Guarantee(
        "weights",
        "the model's tensors are the file's",
        "the parts of a fused projection are put together in another order",
        "vllm_thinkfast/checkpoints/key_map.py",
        "    ordered = [parts[name] for name in rule.published]\n",
        "    ordered = [parts[name] for name in sorted(rule.published)]\n",
        "tests/vllm_thinkfast/trust/test_fuzz.py::test_bases_are_valid",
    ),
    Guarantee(
        "seeds",
        "every sample of a run has a seed of its own",
        "equally numbered samples of all problems share a seed",
        "lm_eval_tasks/samples.py",
        '    key = f"{run_seed}\\x1f{problem}\\x1f{index}".encode()\n',
        '    key = f"{run_seed}\\x1f{index}".encode()\n',
        "tests/lm_eval_tasks/test_samples.py::test_sample_seed_is_reproducible_and_distinct",
    ),
)


class UnknownGuaranteeError(ValueError):
    """A name on the command line that no guarantee has."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m scripts.broken_guarantees"
    )
    parser.add_argument("names", nargs="*", help="guarantees to break; default: all")
    parser.add_argument("--list", action="store_true", help="show them and stop")
    options = parser.parse_args(arguments)
    try:
        chosen = choose(options.names)
    except UnknownGuaranteeError as error:
        print(f"broken_guarantees: {error}", file=sys.stderr)
        return 2
    if options.list:
        for guarantee in chosen:
            print(f"{guarantee.name:14} {guarantee.promise}: {guarantee.broken}")
        return 0
    was_noticed = {guarantee.name: is_noticed(guarantee) for guarantee in chosen}
    print()
    print("\n".join(table(chosen)))
    missed = [name for name, noticed in was_noticed.items() if not noticed]
    if missed:
        print(f"broken_guarantees: not noticed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def choose(names: Sequence[str]) -> list[Guarantee]:
    """The guarantees of these names; all of them for none."""
    known = [guarantee.name for guarantee in GUARANTEES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownGuaranteeError(
            f"{', '.join(unknown)}: no such guarantee; accepted: {', '.join(known)}"
        )
    return [guarantee for guarantee in GUARANTEES if not names or guarantee.name in names]


def is_noticed(guarantee: Guarantee) -> bool:
    """Whether the test passes as things are and fails once the guarantee is broken."""
    with tempfile.TemporaryDirectory(prefix="broken-guarantee-") as name:
        folder = Path(name)
        copy_checkout(folder)
        before = run_test(guarantee.test, folder)
        print(f"{guarantee.name}: as it is: {before}", flush=True)
        break_it(guarantee, folder)
        after = run_test(guarantee.test, folder)
        print(f"{guarantee.name}: {guarantee.broken}: {after}", flush=True)
    return before.is_pass and after.is_failure


def copy_checkout(folder: Path) -> None:
    """Copies what the tests need, without caches and without anything git does not know."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy2(source, target)


def break_it(guarantee: Guarantee, folder: Path) -> None:
    """Replaces the text in a copy.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    file = folder / guarantee.file
    code = file.read_text(encoding="utf-8")
    if code.count(guarantee.text) != 1:
        raise ValueError(
            f"{guarantee.name}: {guarantee.file} has {code.count(guarantee.text)} times, not once: "
            f"{guarantee.text.strip()!r}; mend GUARANTEES in scripts/broken_guarantees.py."
        )
    file.write_text(code.replace(guarantee.text, guarantee.replacement), encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """What pytest said."""

    exit_code: int
    num_failed: int
    num_passed: int
    num_errors: int

    @property
    def is_pass(self) -> bool:
        """Something ran, and nothing failed."""
        return self.exit_code == 0 and self.num_passed > 0

    @property
    def is_failure(self) -> bool:
        """The test itself failed; an error while collecting it does not count."""
        return self.exit_code == 1 and self.num_failed > 0

    def __str__(self) -> str:
        counts = {
            "failed": self.num_failed,
            "passed": self.num_passed,
            "errors": self.num_errors,
        }
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return shown or f"nothing ran (exit code {self.exit_code})"


def run_test(test: str, folder: Path) -> Run:
    """Runs a test on the copy's code, whatever is installed."""
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'distill'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    finished = subprocess.run(
        command,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    lines = finished.stdout.strip().splitlines()
    counts = [0, 0, 0]
    for found in _SUMMARY.findall(lines[-1] if lines else ""):
        counts = [old + int(new or 0) for old, new in zip(counts, found, strict=True)]
    return Run(finished.returncode, *counts)


def table(guarantees: Iterable[Guarantee]) -> Iterable[str]:
    """Markdown for docs/trust.md."""
    yield "| guarantee | what was broken | test that noticed |"
    yield "| --- | --- | --- |"
    for guarantee in guarantees:
        file, _, test = guarantee.test.partition("::")
        broken = f"{guarantee.broken} (`{guarantee.file}`)"
        yield f"| {guarantee.promise} | {broken} | `{file}::{test}` |"


if __name__ == "__main__":
    sys.exit(main())
