"""Makes the tables of docs/compatibility.md from what the tests showed: feature, model, version.

    pytest tests/vllm_thinkfast/features --compatibility docs/compatibility.json
    python -m scripts.compatibility

The first command records the outcome of every test with the marker ``feature`` (and of those in
ELSEWHERE) under the version of vLLM that ran; ``scripts/engine_tests.py`` does that for other
versions. The second one puts the tables between the markers of the page; ``--check`` only compares.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN = "<!-- tables made by scripts/compatibility.py: begin -->"
END = "<!-- tables made by scripts/compatibility.py: end -->"

MODELS = {
    "llamba": "Llamba",
    "mambainllama_mamba1": "MambaInLlama, Mamba-1",
    "mambainllama_mamba2": "MambaInLlama, Mamba-2",
}
"""Family of the test checkpoints -> column."""

_SCHEDULING = "tests/vllm_thinkfast/models/test_scheduling.py"
_FORK = "tests/vllm_thinkfast/test_fork.py"
ELSEWHERE = {
    f"{_SCHEDULING}::test_alone_batched_chunked_preempted_random": (
        "continuous batching",
        "chunked prefill",
        "preemption",
    ),
    f"{_SCHEDULING}::test_prefix_caching": ("prefix caching, mode align",),
    f"{_FORK}::test_n_samples": ("one prefill for N samples",),
}
"""Tests outside of the features folder -> features that they show."""

WORKS, REFUSED, FAILS = "works", "refused", "fails"

Results = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""vLLM version -> feature -> model -> {state, test, why, failed}."""


def add_option(parser: Any) -> None:
    """Adds ``--compatibility`` to pytest."""
    parser.addoption(
        "--compatibility", type=Path, default=None, help="JSON file to record features in"
    )


def configure(config: Any) -> None:
    """Starts recording if ``--compatibility`` was given."""
    path = config.getoption("--compatibility", None)
    if path is not None and not config.pluginmanager.has_plugin("thinkfast-compatibility"):
        config.pluginmanager.register(Recorder(path), "thinkfast-compatibility")


class Recorder:
    """A pytest plugin that keeps the outcome of each feature and model."""

    def __init__(self, path: Path) -> None:
        """Records into the JSON file ``path``, under the version of vLLM that is installed."""
        self.path = path
        self.found: dict[str, dict[str, dict[str, Any]]] = {}
        self.passed: set[str] = set()
        self.features_of: dict[str, list[tuple[str, str, str | None]]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Notes which features each test is for."""
        for item in items:
            self.features_of[item.nodeid] = list(_features(item))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes an outcome; one failure outweighs every success, and skipping says nothing."""
        if not (report.failed or (report.when == "call" and report.passed)):
            return
        (self.passed.discard if report.failed else self.passed.add)(report.nodeid)
        for feature, model, why in self.features_of.get(report.nodeid, []):
            cells = self.found.setdefault(feature, {})
            test = report.nodeid.partition("[")[0]
            if report.failed:
                failed = {*cells.get(model, {}).get("failed", ()), report.nodeid}
                cells[model] = {"state": FAILS, "test": test, "failed": sorted(failed)}
            elif model not in cells:  # of several tests that pass, the first one is named
                state = {"state": REFUSED, "why": why} if why else {"state": WORKS}
                cells[model] = {**state, "test": test}

    def pytest_sessionfinish(self) -> None:
        """Adds what was found to the file."""
        from vllm_thinkfast.bench.store import write_atomically
        from vllm_thinkfast.compat import vllm_distribution

        if not self.found:
            return
        distribution = vllm_distribution()
        assert distribution is not None, "engine tests ran without vLLM"
        results = read_results(self.path)
        version = results.setdefault(distribution[1], {})
        for feature, cells in self.found.items():
            before = version.setdefault(feature, {})
            for model, cell in cells.items():
                before[model] = self._with_older_failures(model, cell, before.get(model, {}))
        write_atomically(self.path, json.dumps(results, indent=1, sort_keys=True) + "\n")

    def _with_older_failures(
        self, model: str, cell: dict[str, Any], before: dict[str, Any]
    ) -> dict[str, Any]:
        """A cell that goes on to fail until each test that failed has passed."""
        if before.get("state") != FAILS:
            return cell
        mine = {t for t in self.passed if any(m == model for _, m, _ in self.features_of[t])}
        passed = mine | {test.partition("[")[0] for test in mine}
        # Cells of old records name the test without its parameters.
        failed = set(before.get("failed", [before["test"]])) - passed
        failed.update(cell.get("failed", ()))
        if not failed:
            return cell
        test = sorted(failed)[0].partition("[")[0]
        return {"state": FAILS, "test": test, "failed": sorted(failed)}


def _features(item: Any) -> Iterator[tuple[str, str, str | None]]:
    """(feature, model, why it is refused) of a collected test."""
    values = getattr(item, "callspec", None)
    models = (
        [v for v in values.params.values() if isinstance(v, str) and v in MODELS] if values else []
    )
    if not models:
        return
    for marker in item.iter_markers("feature"):
        yield marker.args[0], models[0], marker.kwargs.get("refused")
    for feature in ELSEWHERE.get(item.nodeid.partition("[")[0], ()):
        yield feature, models[0], None


def read_results(path: Path) -> Results:
    """What was recorded so far; nothing if there is no file."""
    if not path.exists():
        return {}
    results: Results = json.loads(path.read_text("utf-8"))
    return results


def render(results: Results) -> str:
    """One table per vLLM version, newest first, and the reasons of refusals below it."""
    from packaging.version import Version

    parts = []
    for version in sorted(results, key=Version, reverse=True):
        parts += [f"### vLLM {version}", "", *_table(results[version]), ""]
    return "\n".join(parts).strip()


def _table(features: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    lines = [
        f"| feature | {' | '.join(MODELS.values())} | shown by |",
        f"| --- |{' --- |' * (len(MODELS) + 1)}",
    ]
    reasons = {}
    # Rows of tests outside of the features folder are there also before these were recorded.
    elsewhere = {feature: test for test, found in ELSEWHERE.items() for feature in found}
    rows = {**{feature: {} for feature in elsewhere}, **features}
    for feature, cells in sorted(rows.items(), key=lambda item: item[0].lower()):
        states = [cells.get(model, {}).get("state", "not run") for model in MODELS]
        tests = sorted({cell["test"] for cell in cells.values()}) or [elsewhere[feature]]
        shown = ", ".join(f"`{test}`" for test in tests)
        lines.append(f"| {feature} | {' | '.join(states)} | {shown} |")
        reasons[feature] = next((c["why"] for c in cells.values() if "why" in c), "")
    refused = [f"* {feature}: {why}" for feature, why in sorted(reasons.items()) if why]
    if refused:
        lines += ["", "Refused, and why:", "", *refused]
    return lines


def with_tables(page: str, tables: str) -> str:
    """The page with other tables between its markers.

    Raises:
        ValueError: the page lacks a marker.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"{PAGE}: the lines {BEGIN!r} and {END!r} must be there.")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if ``--check`` finds other tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m scripts.compatibility"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    options = parser.parse_args(arguments)
    page = PAGE.read_text("utf-8")
    wanted = with_tables(page, render(read_results(RESULTS)))
    if options.check:
        if page == wanted:
            return 0
        print(f"compatibility: {PAGE} differs; run python -m scripts.compatibility")
        return 1
    PAGE.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
