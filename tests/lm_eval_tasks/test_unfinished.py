"""Runs that are not finished: what every problem has is used, and that is said."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import make_run

from lm_eval_tasks.analysis import Settings, load_run
from lm_eval_tasks.cli import main
from lm_eval_tasks.scored import load_scored, load_scored_run

NUM_PROBLEMS, NUM_SAMPLES = 40, 16


def cut(folder: Path, share: float) -> dict[str, dict[int, bool]]:
    """Keep what finished first, as a kill does; return the verdicts of it by problem and index."""
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines = lines[: int(len(lines) * share)]
    path.write_text("".join(lines))
    kept = {(row["problem_id"], row["sample_index"]) for row in map(json.loads, lines)}
    for name in ("verdicts.jsonl", "scores/prm.jsonl"):
        rows = list(map(json.loads, (folder / name).read_text().splitlines()))
        rows = [row for row in rows if (row["problem_id"], row["sample_index"]) in kept]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[str, dict[int, bool]] = defaultdict(dict)
    for row in map(json.loads, (folder / "verdicts.jsonl").read_text().splitlines()):
        found[row["problem_id"]][row["sample_index"]] = row["correct"]
    return found


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, int, float]:
    """Half of a run; how many samples of each problem are complete; pass@1 of these."""
    folder = make_run(
        tmp_path / "run",
        num_problems=NUM_PROBLEMS,
        num_samples=NUM_SAMPLES,
        slots=64,
        reward="prm",
        seed=3,
    )
    found = cut(folder, 0.5)
    assert len(found) == NUM_PROBLEMS
    used = min(next(i for i in range(99) if i not in drawn) for drawn in found.values())
    assert 1 < used < NUM_SAMPLES
    right = [drawn[i] for drawn in found.values() for i in range(used)]
    everything = [sum(drawn.values()) / len(drawn) for drawn in found.values()]
    # What finished first is shorter, and shorter is right more often.
    assert sum(everything) / len(everything) > sum(right) / len(right) + 0.01
    return folder, used, sum(right) / len(right)


def test_score(run: tuple[Path, int, float], capsys: pytest.CaptureFixture[str]) -> None:
    folder, used, expected = run
    assert main(["score", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    (found,) = json.loads(out)["runs"]
    assert found["num_samples"] == used
    assert found["metrics"]["pass@1"]["mean"] == pytest.approx(expected)
    assert f"used are the first {used} of each problem, which all have" in found["unfinished"]
    assert err.count(f"{folder}: not finished, ") == 1
    assert main(["score", str(folder)]) == 0
    assert f"\nnot finished: {found['unfinished']}" in capsys.readouterr().out


def test_other_commands(
    run: tuple[Path, int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report, a reward study and a replay of early stops have the samples of `score`."""
    folder, used, expected = run
    said = f"{folder}: not finished, "
    note = f"run is not finished: {load_run(folder, Settings()).facts['unfinished']}."
    capsys.readouterr()
    out = tmp_path / "report"
    fast = ["--draws", "100", "--orders", "8", "--no-png"]
    assert main(["report", str(folder), "--out", str(out), "--reward", "prm", *fast]) == 0
    assert capsys.readouterr().err.count(said) == 1
    (group,) = json.loads((out / "results.json").read_text())["groups"]
    assert group["runs"][0]["metrics"]["pass@1"]["value"] == pytest.approx(expected)
    assert note in (out / "report.md").read_text()

    assert main(["prm-study", str(folder), "--no-figure", "--repeats", "1", "--json"]) == 0
    captured = capsys.readouterr()
    (study,) = json.loads(captured.out)["runs"]
    assert study["num_samples"] == [used, used]
    assert study["pass@1"]["value"] == pytest.approx(expected)
    assert captured.err.count(said) == 1
    assert note in (folder / "prm-study" / "prm_study.md").read_text()

    assert main(["adaptive", str(folder), "--error", "0.05", "--draws", "100"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(said) == 1
    assert note in captured.out


def test_costs_are_those_of_all_that_ran(run: tuple[Path, int, float]) -> None:
    """A sample shared the server with those that are left out."""
    folder, used, _ = run
    loaded = load_scored_run(folder)
    whole = load_scored_run(folder, whole=True)
    assert whole.unfinished is None
    for name, drawn in loaded.samples.items():
        assert drawn == whole.samples[name][:used]
    facts = load_run(folder, Settings()).facts
    assert facts["server_s_per_sample"] == pytest.approx(facts["busy_s"] / len(whole.records))
    assert facts["prompt_tokens_per_sample"] == 50


def test_samples_beyond_need_no_verdict(run: tuple[Path, int, float]) -> None:
    """Where sampling goes on, new samples come in between judging and reading."""
    folder, used, _ = run
    path = folder / "verdicts.jsonl"
    rows = list(map(json.loads, path.read_text().splitlines()))
    rows = [row for row in rows if row["sample_index"] < used]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {len(drawn) for drawn in load_scored(folder).values()} == {used}


@pytest.mark.parametrize(
    "command", [["score"], ["report", "--no-png"], ["prm-study", "--no-figure"], ["adaptive"]]
)
def test_nothing_that_all_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """One problem waits for its first, long sample; the others have several."""
    folder = make_run(tmp_path / "run", num_problems=4, num_samples=4, reward="prm")
    for name in ("samples.jsonl", "verdicts.jsonl", "scores/prm.jsonl"):
        rows = list(map(json.loads, (folder / name).read_text().splitlines()))
        rows = [row for row in rows if (row["problem_id"], row["sample_index"]) != ("p2", 0)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([command[0], str(folder), *command[1:]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 4 problems have no sample 0 yet (first: p2)" in error
    assert "finish thinkfast-eval sample with the same options" in error


def test_finished_runs_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", num_problems=4, num_samples=4)
    found: Any = load_run(folder, Settings())
    assert "unfinished" not in found.facts
    assert capsys.readouterr().err == ""
