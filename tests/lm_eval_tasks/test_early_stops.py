"""Runs with early stops: the report against hand computation, and who refuses them."""

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run, write_scores
from synthetic_runs import make_run

from lm_eval_tasks.cli import main
from lm_eval_tasks.early_stops import figures_of, load_stopped
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.scored import load_scored, load_scored_run
from lm_eval_tasks.verdicts import score_run

GOLDS = {"a": "1", "b": "9", "c": "5", "d": "3"}
STOPPED = {"a": "1111", "b": "2222", "c": "56565656", "d": "33343333"}
UNIFORM = {"a": "11111111", "b": "22229999", "c": "56565656", "d": "33343333"}


def write(folder: Path, answers: dict[str, str], **config: Any) -> Path:
    texts = {name: [f"#### {digit}" for digit in digits] for name, digits in answers.items()}
    settings = {"num_samples": 8, "name": folder.name} | config
    write_run(folder, {name: GOLDS[name] for name in answers}, texts, **settings)
    score_run(folder, f"thinkfast-eval score {folder}")
    return folder


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    return write(tmp_path / "stopped", STOPPED, stop_error=0.05, stop_every=4)


@pytest.fixture
def uniform(tmp_path: Path) -> Path:
    return write(tmp_path / "uniform", UNIFORM)


def cost(folder: Path) -> float:
    samples = load_scored_run(folder, with_early_stops=True).samples
    return sum(one.cost_s for drawn in samples.values() for one in drawn)


# -- numbers --------------------------------------------------------------------------------------


def test_numbers_by_hand(stopped: Path) -> None:
    found = load_stopped(stopped, draws=200)
    # a and b are decided after 4 votes (1/32), a right and b wrong; c is a tie to the end; the lead
    # of d, 3 to 1, does not decide (6/32), 7 to 1 does (10/512).
    assert found["accuracy"]["value"] == (1 + 0 + 0.5 + 1) / 4
    assert found["accuracy"]["low"] < 0.625 < found["accuracy"]["high"]
    assert (found["num_problems"], found["num_samples"], found["cap"]) == (4, 24, 8)
    assert found["samples_per_problem"]["value"] == 6
    assert found["ends"] == {"level": 3, "certain": 0, "cap": 1}
    assert found["stops"] == [
        {"samples": 4, "problems": 2, "accuracy": 0.5, "level": 2, "certain": 0, "cap": 0},
        {"samples": 8, "problems": 2, "accuracy": 0.75, "level": 1, "certain": 0, "cap": 1},
    ]
    assert found["seconds"] == pytest.approx(cost(stopped))
    assert found["idle_s"] is None


def test_figure_is_a_step_down_to_the_undecided(stopped: Path) -> None:
    (figure,) = figures_of([load_stopped(stopped, draws=200)])
    (line,) = figure.series
    assert line.x == [1.0, 4.0, 4.0, 8.0, 8.0]
    assert line.y == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_seconds_include_waiting_for_decisions(stopped: Path) -> None:
    busy = cost(stopped)
    row = {"session": 0, "idle_s": 0.5, "unfilled_s": 1.5, "grading_s": 0.75}
    (stopped / "sessions.jsonl").write_text(json.dumps(row) + "\n")
    found = load_stopped(stopped, draws=200)
    assert found["seconds"] == pytest.approx(busy + 0.5)
    assert found["seconds_per_problem"]["value"] == pytest.approx((busy + 0.5) / 4)
    assert (found["idle_s"], found["unfilled_s"], found["grading_s"]) == (0.5, 1.5, 0.75)


def test_certain_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"a": "111111", "c": "56565656"}, stop_error=0.0, stop_every=3)
    # 6 to 0 with 2 left; the tie has the borders 3, 6 and 8.
    assert load_stopped(folder, draws=200)["ends"] == {"level": 0, "certain": 1, "cap": 1}


def test_against_uniform_by_hand(stopped: Path, uniform: Path) -> None:
    found = load_stopped(stopped, uniform, draws=500)["against"]
    # All 8 votes: a right, b and c tied, d right.
    assert found["k"] == 8
    assert found["accuracy"]["value"] == 0.75
    assert found["difference"]["value"] == -0.125
    assert found["difference"]["low"] < -0.125 < found["difference"]["high"] + 1e-9
    assert found["samples_saved"]["value"] == 1 - 24 / 32
    assert found["seconds_saved"]["value"] == pytest.approx(1 - cost(stopped) / cost(uniform))
    # One uniform sample is right with (1 + 1/2 + 1/2 + 7/8) / 4 = 0.72, more than 0.625.
    assert found["equal"]["k"]["value"] == 1
    assert found["equal"]["samples_saved"]["value"] == 1 - 6 / 1
    expected = 1 - cost(stopped) / (cost(uniform) / 8)
    assert found["equal"]["seconds_saved"]["value"] == pytest.approx(expected)
    assert found["equal"]["share_not_reached"] < 0.5
    assert found["differences"] == []


def test_against_a_worse_uniform_run(stopped: Path, tmp_path: Path) -> None:
    answers = {"a": "2222111", "b": "2222222", "c": "6666666", "d": "4444333"}
    folder = write(tmp_path / "worse", answers, num_samples=7)
    found = load_stopped(stopped, folder, draws=200)["against"]
    assert found["k"] == 7, "as many samples as it has"
    assert found["equal"]["k"]["value"] is None
    assert found["equal"]["samples_saved"]["value"] is None
    assert found["equal"]["share_not_reached"] > 0.5


def test_unfinished_uniform_run_is_refused(stopped: Path, tmp_path: Path) -> None:
    """Of its last samples those are there that finished first."""
    uniform = write(tmp_path / "part", UNIFORM | {"b": "222299"})
    with pytest.raises(ValueError, match=r"1 of 4 problems do not have their 8 samples .*b, 6\)"):
        load_stopped(stopped, uniform, draws=50)


def test_uniform_run_beyond_the_cap(stopped: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "long", {n: 2 * a for n, a in UNIFORM.items()}, num_samples=16)
    found = load_stopped(stopped, folder, draws=200)["against"]
    assert (found["num_samples"], found["k"]) == (16, 8)
    # The vote of 8 of 16, not of the first 8: a and d are right, b and c by symmetry in half.
    assert found["accuracy"]["value"] == pytest.approx(0.75)
    assert found["samples_saved"]["value"] == 1 - 24 / 32


@pytest.mark.parametrize(
    ("answers", "num_open"),
    [(STOPPED | {"d": "3334"}, 1), (STOPPED | {"c": "56565"}, 1), (STOPPED | {"a": "11"}, 1)],
)
def test_unfinished_run_is_refused(tmp_path: Path, answers: dict[str, str], num_open: int) -> None:
    folder = write(tmp_path / "run", answers, stop_error=0.05, stop_every=4)
    with pytest.raises(ValueError, match=f"{num_open} of 4 problems are still open; finish"):
        load_stopped(folder)


# -- the commands ---------------------------------------------------------------------------------


def test_adaptive_command(
    stopped: Path, uniform: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["adaptive", str(stopped), "--against", str(uniform), "--draws", "100"]
    assert main([*arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| accuracy of the vote at its stop [%] | 62.5 (" in shown
    assert "| samples | 24 of at most 32 (75.0 %) |" in shown
    assert "| stopped | difference of the stopped votes [points] | -12.50 (" in shown
    assert "| stopped | samples saved against all 8 [%] | 25.0 (" in shown
    assert "| stopped | samples saved at equal accuracy [%] | -500.0 (" in shown
    assert "cut at the token limit" in shown
    names = sorted(path.name for path in out.iterdir())
    assert names == ["adaptive.html", "adaptive.json", "adaptive.md", "early-stops.png"]
    written = (out / "adaptive.md").read_text()
    for folder in (stopped, uniform):
        assert f"thinkfast-eval score {folder}" in written, "commands of both runs"
        assert f"{folder.name} (`{folder}`):" in written, "settings of both runs"
        assert f"Sessions of {folder.name}" in (out / "adaptive.html").read_text()
    assert "pass@k" not in shown.replace("there is no pass@k", "")
    numbers = json.loads((out / "adaptive.json").read_text())["runs"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers
    assert numbers[0]["against"]["difference"]["value"] == -0.125


def test_score_command(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "verdicts.jsonl").unlink()
    assert main(["score", str(stopped)]) == 0
    said = capsys.readouterr()
    assert "24 of 24 samples judged now" in said.err
    assert "accuracy of the votes at their stops 0.6250 (" in said.out
    assert "24 of at most 32 (75.0 %) samples" in said.out
    assert "3 problems decided at the level, 0 because" in said.out
    assert main(["score", str(stopped), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["num_samples"] == 24


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "RUN", "--k", "1,2"],
        ["score", "RUN", "--reward", "prm"],
        ["report", "RUN"],
        ["report", "UNIFORM", "RUN"],
        ["plot", "RUN"],
        ["prm-study", "RUN", "--reward", "prm"],
        ["prm-study", "RUN", "--reward", "no-such-model"],
        ["adaptive", "RUN", "--against", "RUN"],
    ],
)
def test_estimates_refuse_it(
    stopped: Path,
    uniform: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(stopped.parent)
    for folder in (stopped, uniform):
        write_scores(folder, "prm", lambda text: [0.5])
    names = {"RUN": str(stopped), "UNIFORM": str(uniform)}
    assert main([names.get(word, word) for word in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"{stopped} was drawn with early stops (--stop-error 0.05)" in lines[0]
    assert f"thinkfast-eval adaptive {stopped}" in lines[0]


def test_loading_refuses_it_by_default(stopped: Path, uniform: Path) -> None:
    for load in (load_scored, load_scored_run):
        with pytest.raises(ValueError, match="was drawn with early stops"):
            load(stopped)
        load(uniform)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--error", "0.1"], "--error is for the replay of runs without early stops"),
        (["RUN", "--least-votes", "2"], "--least-votes is for the replay"),
        (["RUN", "UNIFORM"], "report one kind at a time, or compare them with thinkfast-eval"),
        (["UNIFORM", "--against", "UNIFORM"], "UNIFORM was drawn without early stops; give a run"),
        (["RUN", "--against", "OTHER"], "model_id is 'another' there and 'scripted' in RUN"),
        (["RUN", "--against", "FEWER"], "1 of 4 problems are not in it (first: d)"),
        (["RUN", "--against", "NOWHERE"], "NOWHERE"),
        (["RUN", "--draws", "5"], "--draws 5: need a whole number of at least 100"),
    ],
)
def test_adaptive_command_refuses(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("RUN"), STOPPED, stop_error=0.05, stop_every=4)
    write(Path("UNIFORM"), UNIFORM)
    write(Path("OTHER"), UNIFORM, model_id="another")
    write(Path("FEWER"), {name: UNIFORM[name] for name in "abc"})
    assert main(["adaptive", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_old_runs_are_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "old")
    assert "stop_error" not in SampleStore(folder).config()
    assert main(["score", str(folder)]) == 0
    assert "pass@k" in capsys.readouterr().out
    assert main(["adaptive", str(folder), "--error", "0.1", "--orders", "4", "--draws", "100"]) == 0
    assert "Stopping decided votes" in capsys.readouterr().out
