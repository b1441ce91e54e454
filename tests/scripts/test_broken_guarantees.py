"""The list of scripts/broken_guarantees.py fits the code; breaking itself is done by hand."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts import broken_guarantees
from scripts.broken_guarantees import GUARANTEES, ROOT, Guarantee, Run

ALL = pytest.mark.parametrize("guarantee", GUARANTEES, ids=lambda guarantee: guarantee.name)


@ALL
def test_text_occurs_once(guarantee: Guarantee) -> None:
    code = (ROOT / guarantee.file).read_text(encoding="utf-8")
    assert code.count(guarantee.text) == 1
    broken = code.replace(guarantee.text, guarantee.replacement)
    assert broken != code
    compile(broken, guarantee.file, "exec")  # it must not be the syntax that the test notices


@ALL
def test_test_exists(guarantee: Guarantee) -> None:
    file, _, test = guarantee.test.partition("::")
    name = test.partition("[")[0]
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


@ALL
def test_it_is_copied(guarantee: Guarantee) -> None:
    for path in (guarantee.file, guarantee.test):
        assert Path(path).parts[0] in broken_guarantees.COPIED


def test_names_and_promises() -> None:
    assert len({guarantee.name for guarantee in GUARANTEES}) == len(GUARANTEES) >= 4


def test_documented() -> None:
    """docs/trust.md has the table."""
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    for line in broken_guarantees.table(GUARANTEES):
        assert line in text, line


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert broken_guarantees.main(["no-such"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("broken_guarantees: no-such: no such guarantee; accepted: new-seq")
    assert len(error.splitlines()) == 1


def test_text_that_is_gone(tmp_path: Path) -> None:
    """A change of the code that the list missed is no passed demonstration."""
    guarantee = GUARANTEES[0]
    (tmp_path / guarantee.file).parent.mkdir(parents=True)
    (tmp_path / guarantee.file).write_text("nothing\n")
    with pytest.raises(ValueError, match="0 times, not once"):
        broken_guarantees.break_it(guarantee, tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (Run(0, 0, 3, 0), Run(1, 1, 2, 0), 0),
        (Run(0, 0, 3, 0), Run(0, 0, 3, 0), 1),  # not noticed
        (Run(1, 1, 2, 0), Run(1, 1, 2, 0), 1),  # fails anyway
        (Run(0, 0, 3, 0), Run(2, 0, 0, 1), 1),  # cannot be imported any more
        (Run(5, 0, 0, 0), Run(5, 0, 0, 0), 1),  # no such test
    ],
)
def test_exit_code(
    before: Run, after: Run, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = iter([before, after])
    monkeypatch.setattr(broken_guarantees, "run_test", lambda test, folder: next(runs))
    assert broken_guarantees.main(["seeds"]) == code


def test_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pytest's last line, whatever it holds."""
    line = "1 failed, 12 passed, 3 warnings, 2 errors in 4.00s"
    finished = subprocess.CompletedProcess([], 1, f"...\n{line}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: finished)
    assert broken_guarantees.run_test("x", tmp_path) == Run(1, 1, 12, 2)
