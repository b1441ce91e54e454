"""The list of scripts/broken_guarantees.py fits the code; breaking itself is done by hand."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts import broken_guarantees
from scripts.broken_guarantees import GUARANTEES, ROOT, Guarantee, OutdatedError, Run

PASSED = Run(0, num_passed=3)
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
    with pytest.raises(OutdatedError, match="0 times, not once"):
        broken_guarantees.break_it(guarantee, tmp_path)


def test_outdated_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and no verdict."""
    monkeypatch.setattr(broken_guarantees, "copy_checkout", copy_nothing)
    monkeypatch.setattr(broken_guarantees, "run_test", lambda test, folder: PASSED)
    assert broken_guarantees.main(["seeds"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("broken_guarantees: seeds: lm_eval_tasks/samples.py has 0 times")
    assert len(error.splitlines()) == 1


def copy_nothing(folder: Path) -> None:
    """A checkout in which every file that is broken is empty."""
    for guarantee in GUARANTEES:
        (folder / guarantee.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / guarantee.file).touch()


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (PASSED, Run(1, 2, failures=("assert 1 == 2",)), 0),
        (PASSED, Run(1, 2, failures=("AssertionError: why\nassert 1 == 2",)), 0),
        (PASSED, PASSED, 1),  # not noticed
        (PASSED, Run(1, 2, failures=("NameError: name 'x' is not defined",)), 1),
        (PASSED, Run(1, 2, failures=("RuntimeError: no engine; assert nothing",)), 1),
        (PASSED, Run(1, 1, failures=("assert 1 == 2", "NameError: x")), 1),
        (PASSED, Run(1, 1, 1, ("assert 1 == 2",)), 1),  # another one could not be set up
        (PASSED, Run(None), 1),  # not done in time
        (Run(None), Run(1, 2, failures=("assert 1 == 2",)), 1),
        (*[Run(1, 2, failures=("assert 1 == 2",))] * 2, 1),  # fails anyway
        (PASSED, Run(2, num_errors=1), 1),  # cannot be imported any more
        (Run(5), Run(5), 1),  # no such test
    ],
)
def test_exit_code(
    before: Run, after: Run, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = iter([before, after])
    monkeypatch.setattr(broken_guarantees, "run_test", lambda test, folder: next(runs))
    assert broken_guarantees.main(["seeds"]) == code


_TESTS = """
import pytest

def test_fine(): pass

def test_with_text(): assert 1 == 2, "why"

def test_without_text(): assert 1 == 2

def test_of_an_error():
    with pytest.raises(ValueError, match="x"):
        pass

def test_of_its_text():
    with pytest.raises(ValueError, match="x"):
        raise ValueError("y")

def test_with_another_error(): raise RuntimeError("assert")

def test_skipped(): pytest.skip("no GPU")

@pytest.fixture
def broken(): raise OSError

def test_not_set_up(broken): pass
"""


def test_what_pytest_says(tmp_path: Path) -> None:
    """pytest's own words, which the guarantees are compared with."""
    (tmp_path / "test_it.py").write_text(_TESTS)
    found = broken_guarantees.run_test("test_it.py", tmp_path)
    assert (found.exit_code, found.num_passed, found.num_errors) == (1, 1, 1)
    kinds = (broken_guarantees._ASSERTION, broken_guarantees._NO_SUCH_ERROR)
    begins = [[bool(re.match(kind, message)) for kind in kinds] for message in found.failures]
    yes, no = True, False
    assert begins == [[yes, no], [yes, no], [no, yes], [yes, yes], [no, no]]
    assert str(found).startswith("5 failed, 1 passed, 1 errors (AssertionError: why")
    assert broken_guarantees.run_test("test_absent.py", tmp_path).num_passed == 0


def test_timeout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(broken_guarantees, "TIMEOUT_S", 0.2)
    found = broken_guarantees.run_test("test_it.py", tmp_path)
    assert (found, str(found)) == (Run(None), "not done after 0.2 s")


def test_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What git knows or would add is copied as it is now; the rest is not."""
    root, folder = tmp_path / "root", tmp_path / "copy"
    (root / "tests").mkdir(parents=True)
    for command in (["init", "-q"], ["add", "."]):
        (root / "tests" / "known.py").write_text("old")
        (root / "tests" / "gone.py").touch()
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "tests" / "known.py").write_text("new")
    (root / "tests" / "gone.py").unlink()
    (root / "tests" / "untracked.py").touch()
    (root / "tests" / "ignored.txt").touch()
    (root / ".gitignore").write_text("*.txt")
    monkeypatch.setattr(broken_guarantees, "ROOT", root)
    broken_guarantees.copy_checkout(folder)
    assert {p.name for p in (folder / "tests").iterdir()} == {"known.py", "untracked.py"}
    assert (folder / "tests" / "known.py").read_text() == "new"
