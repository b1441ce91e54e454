"""The command line of scripts/engine_tests.py; environments take minutes and are not made here."""

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

    monkeypatch.setattr(engine_tests, "make_environment", lambda folder, version: folder)
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


def test_default_tests_exist() -> None:
    assert all((engine_tests.ROOT / test).exists() for test in engine_tests.DEFAULT_TESTS)
