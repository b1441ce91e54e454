"""What the pages on training say, against the code, the result files and the models' cards."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "2026-11-21-distillation"
MODELS = ("llama-tiny", "llamba-tiny", "mambainllama-tiny")


def _passk(name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((RESULTS / f"passk-{name}.json").read_text())
    return found


@pytest.mark.parametrize("student", MODELS[1:])
def test_students_reach_what_was_asked_for(student):
    """At least 85% of the teacher's sampled pass@1, and 98% of its pass@64."""
    teacher, found = _passk(MODELS[0]), _passk(student)
    assert found["sample_len"] == teacher["sample_len"] == 300
    assert found["pass@1"] >= 0.85 * teacher["pass@1"]
    assert found["pass@64"] >= 0.98 * teacher["pass@64"]


@pytest.mark.parametrize("page", ["README.md", "docs/distillation.md"])
def test_tables_of_pass_at_k_are_the_result_files(page):
    rows = re.findall(r"^\| (pass@\d+) \[%\] \|(.*)\|$", (ROOT / page).read_text(), re.MULTILINE)
    assert {"pass@1", "pass@64"} <= {key for key, _ in rows}
    for key, cells in rows:
        for model, cell in zip(MODELS, cells.split("|"), strict=True):
            shown = [float(number) for number in cell.split("±")]
            found = [100 * _passk(model)[name] for name in (key, f"{key}_stderr")]
            assert shown == pytest.approx(found, abs=0.0501), (key, model)


@pytest.mark.parametrize("student", MODELS[1:])
def test_cards_have_the_losses_of_the_logs(student):
    """Each stage's own, which in stages 1 and 2 is not the end-to-end one."""
    log = (RESULTS / f"log-{student}.jsonl").read_text().splitlines()
    evals = [r for r in map(json.loads, log) if r["event"] == "eval"]
    facts = json.loads((ROOT / "thinkfast" / student / "thinkfast_export.json").read_text())
    for stage in facts["stages"][1:]:
        of_stage = [r for r in evals if r["stage"] == stage["name"]]
        prefix = "" if stage["kind"] == "end_to_end" else f"{stage['kind']}_"
        for key, record in (("loss before", of_stage[0]), ("loss", of_stage[-1])):
            assert stage["metrics"][key] == pytest.approx(record[f"{prefix}loss"]), stage["name"]


def test_quoted_messages_exist():
    """The table of docs/distillation.md, up to the values that stand in for dots."""
    page = (ROOT / "docs" / "distillation.md").read_text()
    rows = re.findall(r"^\| `(.*?)` \|", page.partition("## When something is wrong")[2], re.M)
    package = (ROOT / "distill" / "thinkfast_distill").rglob("*.py")
    # Without what cuts a message into several literals, or puts values into it.
    code = re.sub(r'"\s+f?"', "", "\n".join(path.read_text() for path in package))
    quoted = [part.strip(" .") for row in rows for part in row.split("...")]
    texts = [text for text in quoted if text and "FILE" not in text]
    assert len(texts) >= 6
    for text in texts:
        assert text in code, text
