"""Breaks guarantees on purpose, each in a copy of the checkout, and shows which test notices.

    python -m scripts.broken_guarantees
    python -m scripts.broken_guarantees new-sequence pickles
    python -m scripts.broken_guarantees --list

Of every guarantee the test is run twice in the copy: as it is, where it has to pass, and with one
piece of the code replaced, where every failure has to be the one that the guarantee names: an
assertion of the test, not an engine that does not start or a name that there is not. Exit code 0 if
every test noticed, 1 if one did not, 2 for a name that there is not or a list that does not fit the
code any more. ``docs/trust.md`` has the table of the last run.
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
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("vllm_thinkfast", "lm_eval_tasks", "tests", "distill", "scripts", "pyproject.toml")
"""What the tests named below import, and pytest's settings."""
TIMEOUT_S = 1800
_ASSERTION = r"AssertionError\b|assert "
_NO_SUCH_ERROR = r"Failed: DID NOT RAISE |AssertionError: Regex pattern did not match"
"""Of ``pytest.raises``: it went well, or there was another message."""


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
    failure: str
    """How the message of each failed test begins, as a regular expression."""


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
        _ASSERTION,
    ),
    Guarantee(
        "chunk-border",
        "a prompt in chunks gives what it gives at once",
        "the convolution forgets its last inputs at the border of a chunk",
        _CONV,
        "    tails = state[slots].float().masked_fill_(is_fresh[:, None, None], 0.0)\n",
        "    tails = torch.zeros_like(state[slots], dtype=torch.float32)\n",
        "tests/vllm_thinkfast/ops/test_causal_conv.py::test_prefill_split_equals_whole",
        _ASSERTION,
    ),
    Guarantee(
        "fork",
        "samples of a prompt start from the state at its end",
        "a sample keeps what its slot held; the state at the prompt's end is not copied there",
        "vllm_thinkfast/compat.py",
        "        copy(longest.values(), *others, **named)\n",
        "        num_blocks, copies = others\n"
        "        copy(longest.values(), num_blocks, [(pair[1], pair[1]) for pair in copies])\n",
        f"{_PROPERTY}::test_prefixes_are_shared[llamba]",
        _ASSERTION,
    ),
    Guarantee(
        "pickles",
        "a weight file cannot run code",
        ".bin files are opened as any pickle (weights_only=False)",
        "vllm_thinkfast/checkpoints/folder.py",
        'torch.load(file, map_location="cpu", weights_only=True, mmap=True)',
        'torch.load(file, map_location="cpu", weights_only=False, mmap=True)',
        "tests/vllm_thinkfast/checkpoints/test_reader.py::test_pickle_with_code_is_refused",
        _NO_SUCH_ERROR,
    ),
    Guarantee(
        "index",
        "a folder's weights come from the folder",
        "an index may name any file",
        "vllm_thinkfast/checkpoints/folder.py",
        "        if not is_name or not file.endswith(suffix):\n",
        "        if not isinstance(file, str):\n",
        "tests/vllm_thinkfast/trust/test_mended.py::test_index_outside_of_the_folder",
        _NO_SUCH_ERROR,
    ),
    Guarantee(
        "weights",
        "the model's tensors are the file's",
        "the parts of a fused projection are put together in another order",
        "vllm_thinkfast/checkpoints/key_map.py",
        "    ordered = [parts[name] for name in rule.published]\n",
        "    ordered = [parts[name] for name in sorted(rule.published)]\n",
        "tests/vllm_thinkfast/trust/test_fuzz.py::test_bases_are_valid",
        _ASSERTION,
    ),
    Guarantee(
        "seeds",
        "every sample of a run has a seed of its own",
        "equally numbered samples of all problems share a seed",
        "lm_eval_tasks/samples.py",
        '    key = f"{run_seed}\\x1f{problem}\\x1f{index}".encode()\n',
        '    key = f"{run_seed}\\x1f{index}".encode()\n',
        "tests/lm_eval_tasks/test_samples.py::test_sample_seed_is_reproducible_and_distinct",
        _ASSERTION,
    ),
)


class UnknownGuaranteeError(ValueError):
    """A name on the command line that no guarantee has."""


class OutdatedError(ValueError):
    """A guarantee does not fit the code any more."""


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
    try:
        was_noticed = {guarantee.name: is_noticed(guarantee) for guarantee in chosen}
    except OutdatedError as error:
        print(f"broken_guarantees: {error}", file=sys.stderr)
        return 2
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
    """Whether the test passes as things are and fails, as it has to, once it is broken.

    Raises:
        OutdatedError: the list does not fit the code any more.
    """
    with tempfile.TemporaryDirectory(prefix="broken-guarantee-") as name:
        folder = Path(name)
        copy_checkout(folder)
        before = run_test(guarantee.test, folder)
        print(f"{guarantee.name}: as it is: {before}", flush=True)
        break_it(guarantee, folder)
        after = run_test(guarantee.test, folder)
        print(f"{guarantee.name}: {guarantee.broken}: {after}", flush=True)
    return before.is_pass and after.is_failure(guarantee.failure)


def copy_checkout(folder: Path) -> None:
    """Copies what the tests need: the files that git knows or would add, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *COPIED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, folder / name
        if source.exists():  # a file that is deleted but not committed is listed too
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def break_it(guarantee: Guarantee, folder: Path) -> None:
    """Replaces the text in a copy.

    Raises:
        OutdatedError: the text does not occur exactly once.
    """
    file = folder / guarantee.file
    code = file.read_text(encoding="utf-8")
    if code.count(guarantee.text) != 1:
        raise OutdatedError(
            f"{guarantee.name}: {guarantee.file} has {code.count(guarantee.text)} times, not once: "
            f"{guarantee.text.strip()!r}; mend GUARANTEES in scripts/broken_guarantees.py."
        )
    file.write_text(code.replace(guarantee.text, guarantee.replacement), encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """What pytest said."""

    exit_code: int | None
    """None: it did not end in time."""
    num_passed: int = 0
    num_errors: int = 0
    """Tests that could not be imported or set up."""
    failures: tuple[str, ...] = ()
    """Message of each test that failed."""

    @property
    def is_pass(self) -> bool:
        """Something ran, and nothing failed."""
        return self.exit_code == 0 and self.num_passed > 0

    def is_failure(self, expected: str) -> bool:
        """Whether tests failed, and each as expected: nothing else was broken.

        Args:
            expected: regular expression for the beginning of each message.
        """
        if self.exit_code != 1 or self.num_errors or not self.failures:
            return False
        return all(re.match(expected, message) for message in self.failures)

    def __str__(self) -> str:
        if self.exit_code is None:
            return f"not done after {TIMEOUT_S} s"
        counts = {
            "failed": len(self.failures),
            "passed": self.num_passed,
            "errors": self.num_errors,
        }
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        first = "".join(f" ({text.partition(chr(10))[0]:.100})" for text in self.failures[:1])
        return shown + first or f"nothing ran (exit code {self.exit_code})"


def run_test(test: str, folder: Path) -> Run:
    """Runs a test on the copy's code, whatever is installed."""
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'distill'}"}
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    try:
        finished = subprocess.run(
            [*command, f"--junitxml={report}", test],
            cwd=folder,
            env=env,
            capture_output=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Run(None)
    if not report.exists():  # pytest itself ended early
        return Run(finished.returncode)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [case.find("failure") for case in cases]
    return Run(
        finished.returncode,
        num_passed=sum(len(case.findall("*[@message]")) == 0 for case in cases),
        num_errors=sum(case.find("error") is not None for case in cases),
        failures=tuple(found.get("message", "") for found in failures if found is not None),
    )


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
