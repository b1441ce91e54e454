"""Verdicts and scores of samples that are gone do not go over to the samples drawn instead."""

import json
from pathlib import Path

import pytest
from run_folders import write_run, write_scores

from lm_eval_tasks.errors import InputError
from lm_eval_tasks.leftovers import forget_missing
from lm_eval_tasks.locks import exclusive
from lm_eval_tasks.rewards.scores import read_scores
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.scored import load_scored
from lm_eval_tasks.verdicts import read_verdicts, score_run

GOLDS = {"gsm8k/0": "18", "gsm8k/1": "7"}
TEXTS = {"gsm8k/0": ["#### 18", "#### 3"], "gsm8k/1": ["#### 7", "#### 7"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run", GOLDS, TEXTS)
    score_run(folder)
    for name in ("prm", "other"):
        write_scores(folder, name, lambda text: [0.25] if "3" in text else [0.75])
    return folder


def _delete_sample(folder: Path, problem: str, index: int) -> None:
    path = folder / "samples.jsonl"
    rows = map(json.loads, path.read_text().splitlines())
    kept = [row for row in rows if (row["problem_id"], row["sample_index"]) != (problem, index)]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_a_text_drawn_instead_is_judged_anew(folder: Path) -> None:
    assert forget_missing(folder, SampleStore(folder).have()) == 0
    _delete_sample(folder, "gsm8k/0", 1)
    assert forget_missing(folder, SampleStore(folder).have()) == 3
    keys = {("gsm8k/0", 0), ("gsm8k/1", 0), ("gsm8k/1", 1)}
    assert {verdict.key for verdict in read_verdicts(folder)} == keys
    assert {score.key for score in read_scores(folder, "prm")} == keys
    write_run(folder, GOLDS, TEXTS | {"gsm8k/0": ["#### 18", "#### 18.0"]})
    with pytest.raises(InputError, match="1 of 4 samples have no verdict"):
        load_scored(folder)
    assert score_run(folder) == (4, 1)
    assert [sample.correct for sample in load_scored(folder)["gsm8k/0"]] == [True, True]
    with pytest.raises(InputError, match="1 of 4 samples are not scored by other"):
        load_scored(folder, "other")


def test_a_file_that_is_written_meanwhile_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever scores holds the lock; the rows stay until he is done."""

    def refuse(path: Path, guarded: Path) -> object:
        raise InputError(f"{guarded} is being written")

    _delete_sample(folder, "gsm8k/1", 0)
    before = (folder / "verdicts.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval_tasks.leftovers.exclusive", refuse)
        with pytest.raises(InputError, match=r"verdicts\.jsonl is being written"):
            forget_missing(folder, SampleStore(folder).have())
    assert (folder / "verdicts.jsonl").read_bytes() == before
    locked: list[Path] = []

    def lock(path: Path, guarded: Path) -> object:
        locked.append(path)
        return exclusive(path, guarded)

    monkeypatch.setattr("lm_eval_tasks.leftovers.exclusive", lock)
    forget_missing(folder, SampleStore(folder).have())
    scores = folder / "scores"
    assert locked == [folder / ".score.lock", scores / "other.lock", scores / "prm.lock"]
    assert (folder / "verdicts.jsonl").read_bytes() != before
