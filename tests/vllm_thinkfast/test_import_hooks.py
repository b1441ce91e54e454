"""Actions that wait for a module to be imported by somebody else."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_thinkfast import import_hooks
from vllm_thinkfast.import_hooks import when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module that can be imported and has not been."""
    name = "thinkfast_test_module"
    (tmp_path / f"{name}.py").write_text("value = 1\nreader = lambda: value\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)
    import_hooks._finder.waiting.pop(name, None)


def test_waits_for_the_import(module: str) -> None:
    def patch() -> None:
        sys.modules[module].value = 2

    when_imported(module, patch)
    assert module not in sys.modules
    imported = importlib.import_module(module)
    assert imported.reader() == 2
    assert imported.__spec__.loader.get_source(module).startswith("value = 1")


def test_all_actions_in_order_and_once(module: str) -> None:
    calls: list[str] = []
    when_imported(module, lambda: calls.append("first"))
    when_imported(module, lambda: calls.append("second"))
    imported = importlib.import_module(module)
    assert calls == ["first", "second"]
    importlib.reload(imported)
    assert calls == ["first", "second"]


def test_imported_before(module: str) -> None:
    importlib.import_module(module)
    calls: list[str] = []
    when_imported(module, lambda: calls.append("now"))
    assert calls == ["now"]
    assert module not in import_hooks._finder.waiting


def test_exception_fails_the_import(module: str) -> None:
    def fail() -> None:
        raise RuntimeError("cannot patch")

    when_imported(module, fail)
    with pytest.raises(RuntimeError, match="cannot patch"):
        importlib.import_module(module)
    assert module not in sys.modules


def test_absent_module_stays_absent() -> None:
    when_imported("thinkfast_no_such_module", lambda: None)
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("thinkfast_no_such_module")
    finally:
        import_hooks._finder.waiting.pop("thinkfast_no_such_module")
