"""``thinkfast-eval score`` on run folders: verdicts, classes, resuming, tables, and mistakes."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run, write_scores

from lm_eval_tasks import verdicts
from lm_eval_tasks.cli import main
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.samples import SampledText, SampleRecord
from lm_eval_tasks.scored import finish_times, load_scored, load_scored_run
from lm_eval_tasks.scoring import NUMBER
from lm_eval_tasks.verdicts import read_classes, read_verdicts, score_run

GOLDS = {"gsm8k/0": "18", "gsm8k/1": "7"}
TEXTS = {
    "gsm8k/0": ["\\boxed{18}", "it is 18 dollars", "\\boxed{19}", "no idea"],
    "gsm8k/1": ["#### 8", "#### 8.0", "#### 7", SampledText("#### 7", 64, "length")],
}
VERSION = NUMBER.version_of("1.0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", GOLDS, TEXTS)


def test_score_run_writes_verdicts_and_classes(folder: Path) -> None:
    assert score_run(folder) == (8, 8)
    found = {v.key: v for v in read_verdicts(folder)}
    assert {key: v.correct for key, v in found.items() if v.correct} == {
        ("gsm8k/0", 0): True,
        ("gsm8k/0", 1): True,
        ("gsm8k/1", 2): True,
        ("gsm8k/1", 3): True,
    }
    silent = found["gsm8k/0", 3]
    assert (silent.answer, silent.source, silent.correct) == (None, None, False)
    assert silent.task_version == VERSION == "1.0+number/3/boxed-hash-phrase-number/2"
    classes = read_classes(folder, VERSION)
    assert sorted(map(sorted, classes["gsm8k/1"].classes)) == [["7"], ["8", "8.0"]]


def test_score_run_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score_run(folder)
    path = folder / "verdicts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # killed while writing
    monkeypatch.setattr(
        verdicts, "_group", lambda *_: pytest.fail("the classes are complete, nothing to group")
    )
    assert score_run(folder) == (8, 3)
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    assert score_run(folder) == (8, 0)


def test_more_samples_later(folder: Path) -> None:
    score_run(folder)
    more = {"gsm8k/1": [*TEXTS["gsm8k/1"], "#### 7.00", "seven"]}
    write_run(folder, GOLDS, more)
    with pytest.raises(InputError, match=r"2 of 10 samples have no verdict.*thinkfast-eval score"):
        load_scored(folder)
    assert score_run(folder) == (10, 2)
    samples = load_scored(folder)["gsm8k/1"]
    assert [sample.correct for sample in samples] == [False, False, True, True, True, False]
    labels = [sample.answer_class for sample in samples]
    assert labels[0] == labels[1] != labels[2] == labels[3] == labels[4]
    assert labels[5] is None


def test_known_answers_are_not_compared_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_run(folder)
    asked: list[Any] = []

    def grade(gold: str, answers: list[str]) -> list[bool]:
        asked.extend(answers)
        return [False] * len(answers)

    monkeypatch.setattr(
        "lm_eval_tasks.verdicts.grading_of",
        lambda task: type(NUMBER)(NUMBER.name, NUMBER.extract, grade, NUMBER.group),
    )
    write_run(folder, GOLDS, {"gsm8k/0": [*TEXTS["gsm8k/0"], "\\boxed{18}", "\\boxed{20}"]})
    score_run(folder)
    assert asked == ["20"]
    assert [sample.correct for sample in load_scored(folder)["gsm8k/0"]][4:] == [True, False]


def test_load_scored(folder: Path) -> None:
    score_run(folder)
    write_scores(folder, "prm", lambda text: [0.5, 0.75] if "18" in text or "7" in text else [])
    problems = load_scored(folder, "prm", "min")
    assert list(problems) == ["gsm8k/0", "gsm8k/1"]
    first, *_, last = problems["gsm8k/0"]
    assert (first.score, first.reward_s, last.score) == (0.5, 0.25, None)
    assert problems["gsm8k/1"][3].is_truncated
    assert [sample.finish_s for sample in problems["gsm8k/0"]] == [2, 3, 4, 5]
    total = sum(sample.cost_s for drawn in problems.values() for sample in drawn)
    assert total == pytest.approx(5), "the session's wall time"
    # A second beside three others, then one beside the other problem's last sample.
    assert problems["gsm8k/1"][3].cost_s == pytest.approx(1 / 4 + 1 / 2)
    assert load_scored(folder)["gsm8k/0"][0].score is None
    assert load_scored(folder, "prm")["gsm8k/0"][0].score == 0.75


def _record(problem: str, index: int, session: int, submit: float, finish: float) -> SampleRecord:
    return SampleRecord(
        problem, index, 0, "", 10, 5, None, "stop", session, submit, None, finish, ""
    )


def test_finish_times_of_both_regimes() -> None:
    records = [
        _record("a", 0, 0, 1.0, 3.0),
        _record("b", 0, 0, 2.0, 6.0),
        _record("b", 1, 1, 0.5, 4.5),
    ]
    saturated = finish_times(records, "saturated")
    assert saturated == {("a", 0): 2.0, ("b", 0): 5.0, ("b", 1): 9.0}, "sessions joined"
    latency = finish_times(records, "latency")
    assert latency == {("a", 0): 2.0, ("b", 0): 4.0, ("b", 1): 8.0}


def test_score_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scores(folder, "prm", lambda text: [0.5] if "7" in text else [0.25])
    assert main(["score", str(folder), "--reward", "prm", "--k", "1,4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"{folder}: 8 of 8 samples judged now" in err
    found = json.loads(out)
    (run,) = found["runs"]
    assert found["command"].startswith("thinkfast-eval score")
    assert (run["num_problems"], run["num_samples"], run["task"]) == (2, 4, "gsm8k")
    assert run["metrics"]["pass@4"]["mean"] == 1.0
    assert run["metrics"]["maj@1"]["mean"] == pytest.approx(0.5)
    assert run["metrics"]["maj@4"]["mean"] == pytest.approx(0.75), "won, and a tie"
    assert run["metrics"]["weighted_bon@4[prm=prm,last]"]["mean"] == 1.0
    assert run["no_answer"] == pytest.approx(1 / 8)
    assert run["truncated"] == pytest.approx(1 / 8)
    assert main(["score", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "0 of 8 samples judged now" in err
    assert "no answer 12.5%, truncated 12.5%" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["4", "1.0000", "+-", "0.0000", "0.7500", "+-", "0.2500"] in lines


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """500 problems x 256 samples are hundreds of MB of text, of which only the number counts."""
    texts = [f"{'x' * 100_000}\n#### {i // 2}" for i in range(200)]
    folder = write_run(tmp_path / "run", {"gsm8k/0": "7", "gsm8k/1": "8"},
                       {"gsm8k/0": texts, "gsm8k/1": ["#### 0", "#### \ud800"]})  # fmt: skip
    score_run(folder)
    tracemalloc.start()
    try:
        run = load_scored_run(folder)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < sum(map(len, texts)) / 4
    assert len(run.records) == 202
    assert run.num_distinct_texts == 102


def test_score_when_answers_cannot_be_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without math-verify, or where a worker or the sandbox does not start."""
    errors = iter(
        [ModuleNotFoundError("needs math-verify"), RuntimeError("the sandbox ended with code 1")]
    )

    def grade(gold: str, answers: list[str]) -> list[bool]:
        if answers:
            raise next(errors)
        return []

    monkeypatch.setattr(
        "lm_eval_tasks.verdicts.grading_of",
        lambda task: type(NUMBER)(NUMBER.name, NUMBER.extract, grade, NUMBER.group),
    )
    for reason in ("needs math-verify", "the sandbox ended with code 1"):
        assert main(["score", str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"error: {reason}; {folder} cannot be judged: mend that, then run the same command "
            "again, it resumes\n"
        )
    monkeypatch.undo()
    assert main(["score", str(folder)]) == 0
    assert "8 of 8 samples judged now" in capsys.readouterr().err


def _break_gold(folder: Path, gold: str) -> None:
    path = folder / "problems.jsonl"
    path.write_text(path.read_text().replace('"gold": "18"', f'"gold": "{gold}"'))


def _empty_problem(folder: Path) -> None:
    write_run(folder, GOLDS | {"gsm8k/2": "3"}, {})


def _edit_verdicts(folder: Path, line: str) -> None:
    score_run(folder)
    with (folder / "verdicts.jsonl").open("a") as opened:
        opened.write(line + "\n")


DUPLICATE = json.dumps(
    {
        "problem_id": "gsm8k/0",
        "sample_index": 0,
        "answer": "18",
        "source": "boxed",
        "correct": True,
        "task_version": VERSION,
    }
)


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda f: None, ["--k", "8"], "--k 8: gsm8k/0 in "),
        (lambda f: None, ["--k", "0"], "need whole numbers of at least 1"),
        (lambda f: None, ["--k", "1,two"], "need whole numbers of at least 1"),
        (lambda f: None, ["--reward", "prm"], "make it with thinkfast-eval reward"),
        (lambda f: _break_gold(f, ""), [], "gold is empty"),
        (lambda f: _break_gold(f, "many"), [], "gsm8k/0: the gold answer 'many' is no number"),
        (_empty_problem, [], "1 of 3 problems have no sample yet (first: gsm8k/2)"),
        (lambda f: _edit_verdicts(f, '{"a": 1}'), [], "verdicts.jsonl, line 9: fields missing"),
        (lambda f: _edit_verdicts(f, DUPLICATE), [], "line 9: sample 0 of gsm8k/0 stands twice"),
        (lambda f: (f / "config.json").unlink(), [], "is no run folder (no config.json)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    folder: Path,
    prepare: Any,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(folder)
    assert main(["score", str(folder), *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_unknown_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", GOLDS, TEXTS, task="gsm9k")
    assert main(["score", str(folder)]) == 2
    assert "task 'gsm9k' is unknown; accepted are arith" in capsys.readouterr().err


def test_partial_scores_and_wrong_aggregation(folder: Path) -> None:
    score_run(folder)
    write_scores(folder, "prm", lambda text: [0.5])
    path = folder / "scores" / "prm.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(InputError, match=r"5 of 8 samples are not scored by prm.*it resumes"):
        load_scored(folder, "prm")
    with pytest.raises(InputError, match="aggregation 'max': accepted are min, prod"):
        load_scored(folder, "prm", "max")


def test_verdicts_of_another_version_do_not_count(folder: Path) -> None:
    old = json.loads(DUPLICATE) | {"task_version": "0.9+number/old", "correct": False}
    (folder / "verdicts.jsonl").write_text(json.dumps(old) + "\n")
    assert score_run(folder) == (8, 8)
    assert load_scored(folder)["gsm8k/0"][0].correct
