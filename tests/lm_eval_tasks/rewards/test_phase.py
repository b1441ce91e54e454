"""The command ``thinkfast-eval reward``: resumable, never mixed, clear on what has no score."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from oracles import rlhflow
from run_folder import write_run

from lm_eval_tasks.cli import main
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.rewards.phase import ScorePhase
from lm_eval_tasks.rewards.reward import Scored
from lm_eval_tasks.rewards.scores import ScoreRecord, read_scores, reward_names, score_path
from lm_eval_tasks.rewards.spec import parse_spec
from lm_eval_tasks.rewards.steps import split_steps

TEXTS = {
    "a": ["1+1=2\n2+5=7\n#### 7", "1+1=3\n\n#### 8\n\n", "", " \n "],
    "b": ["#### 7", "3+4=7\n" * 400 + "#### 7", "7-0=7\n#### 7", "3+4=8\n#### 8"],
}


def scores_of(folder: Path, name: str = "prm-tiny") -> dict[tuple[str, int], ScoreRecord]:
    return {record.key: record for record in read_scores(folder, name)}


def step_scores_of(folder: Path) -> dict[tuple[str, int], list[float]]:
    return {key: record.step_scores for key, record in scores_of(folder).items()}


def assert_same_scores(one: Path, other: Path) -> None:
    """Equal but for the last digits, which follow from how the batches are padded."""
    left, right = step_scores_of(one), step_scores_of(other)
    assert left.keys() == right.keys()
    for key, scores in left.items():
        assert scores == pytest.approx(right[key], abs=1e-5)


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, reward_folders: dict[str, Path]
) -> tuple[Path, list[dict[str, Any]], str]:
    """A scored run, what the command printed as JSON, and the reward's string."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, TEXTS)
    spec = str(reward_folders["prm-tiny"])
    assert main(["reward", str(folder), "--reward", spec, "--batch-size", "3"]) == 0
    result = _json(["reward", str(folder), "--reward", spec])
    return folder, result, spec


def _json(arguments: list[str]) -> list[dict[str, Any]]:
    """What the command prints with ``--json``."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(printed.getvalue())
    return found


def test_scores_and_samples_without_one(
    scored: tuple[Path, list[dict[str, Any]], str], reward_folders: dict[str, Path]
) -> None:
    folder, (result,), _ = scored
    records = scores_of(folder)
    assert len(records) == 8
    assert {key: r.unscored for key, r in records.items() if r.unscored} == {
        ("a", 2): "empty",
        ("a", 3): "empty",
        ("b", 1): "too_long",
    }
    for (problem, index), record in records.items():
        assert record.num_tokens is not None
        assert (record.num_tokens > 0) == (record.unscored is None)
        if record.unscored is None:
            steps = split_steps(TEXTS[problem][index], "line")
            expected = rlhflow(reward_folders["prm-tiny"], f"question {problem}", steps)
            assert record.step_scores == pytest.approx(expected, abs=2e-5)
            assert record.seconds > 0
        else:
            assert record.step_scores == []
            assert record.score("last") is None
            assert record.seconds == 0
    assert (result["num_scored"], result["num_samples"], result["num_new"]) == (8, 8, 0)
    assert (result["num_empty"], result["num_too_long"]) == (2, 1)
    assert result["steps_per_solution"] == pytest.approx((3 + 2 + 1 + 2 + 2) / 5)
    assert result["seconds"] == pytest.approx(sum(r.seconds for r in records.values()))
    assert reward_names(folder) == ["prm-tiny"]
    description = json.loads((folder / "scores" / "prm-tiny.json").read_text())
    assert description["reward"]["protocol"] == "rlhflow-deepseek"
    assert description["reward"]["split"] == "line"
    assert description["reward"]["resolved"]["dtype"] == "float32"
    assert len(description["sessions"]) == 1
    assert description["sessions"][0]["command"].startswith("thinkfast-eval reward")


def test_more_samples_later(scored: tuple[Path, list[dict[str, Any]], str], tmp_path: Path) -> None:
    folder, _, spec = scored
    write_run(tmp_path, {name: texts[:2] for name, texts in TEXTS.items()})
    assert _json(["reward", str(tmp_path), "--reward", spec])[0]["num_new"] == 4
    write_run(tmp_path, TEXTS)
    dry = _json(["reward", str(tmp_path), "--reward", spec, "--dry-run"])[0]
    assert (dry["num_scored"], dry["num_samples"]) == (4, 8)
    assert _json(["reward", str(tmp_path), "--reward", spec])[0]["num_new"] == 4
    assert_same_scores(tmp_path, folder)


def test_resumes_after_kill_9_and_a_torn_line(
    tmp_path: Path, reward_folders: dict[str, Path]
) -> None:
    texts = {f"p{i}": [f"{i}+{j}={i + j}\n#### {i + j}" for j in range(20)] for i in range(20)}
    write_run(tmp_path / "killed", texts)
    write_run(tmp_path / "whole", texts)
    drawn = tmp_path / "whole" / "samples.jsonl"
    lines = drawn.read_text().splitlines(keepends=True)
    drawn.write_text("".join(reversed(lines)))  # they finished in another order
    spec = str(reward_folders["prm-tiny"])
    path = tmp_path / "killed" / "scores" / "prm-tiny.jsonl"
    command = [sys.executable, "-m", "lm_eval_tasks.cli", "reward", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [*command, "--reward", spec, "--batch-size", "7"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    complete = kept.count(b"\n")
    assert 3 <= complete < 400
    with path.open("ab") as torn:
        torn.write(b'{"problem_id": "p1", "sam')
    options = ["--reward", spec, "--batch-size", "7"]
    result = _json(["reward", str(path.parents[1]), *options])[0]
    assert (result["num_new"], result["num_scored"]) == (400 - complete, 400)
    assert path.read_bytes().startswith(kept), "finished scores stay as they are"
    _json(["reward", str(tmp_path / "whole"), *options])
    assert step_scores_of(tmp_path / "killed") == step_scores_of(tmp_path / "whole"), "to the digit"
    sessions = json.loads(path.with_suffix(".json").read_text())["sessions"]
    assert [session["done"] for session in sessions] == [0, complete]


def test_scores_of_another_reward_are_refused(
    scored: tuple[Path, list[dict[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, spec = scored
    before = (folder / "scores" / "prm-tiny.jsonl").read_bytes()
    other = f"{spec},split=paragraph,name=prm-tiny"
    assert main(["reward", str(folder), "--reward", other]) == 2
    message = capsys.readouterr().err
    assert "holds scores of another reward" in message
    assert "split 'line' there, 'paragraph' now" in message
    assert "name=" in message
    assert message.count("\n") == 1
    assert (folder / "scores" / "prm-tiny.jsonl").read_bytes() == before


def test_scores_of_other_numerics_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, {"a": ["#### 7"]})
    plain = parse_spec("o/prm-tiny,backend=vllm")
    fp8 = parse_spec("o/prm-tiny,backend=vllm,engine.quantization=fp8,engine.max_num_seqs=8")
    path = score_path(tmp_path, "prm-tiny")
    path.parent.mkdir()
    for stored, now, difference in (
        (plain, fp8, "engine None there, {'quantization': 'fp8'} now"),
        (fp8, plain, "engine {'quantization': 'fp8'} there, None now"),
    ):
        record = ScoreRecord("a", 0, [0.5], 0.1, stored.hash())
        path.write_text(json.dumps(record.as_dict()) + "\n")
        path.with_suffix(".json").write_text(json.dumps({"reward": stored.identity()}))
        assert ScorePhase(tmp_path, stored).counts().num_scored == 1
        with pytest.raises(InputError):
            ScorePhase(tmp_path, now).counts()
        assert difference in capsys.readouterr().err


class _HalfReward:
    """Scores every solution 0.5 and keeps nothing; counts the texts it was given."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def score_batch(self, solutions: Any) -> list[list[float]]:
        return [[0.5] for _ in solutions]

    def score_texts(self, samples: Any) -> list[Scored]:
        self.lengths += [len(text) for _, text in samples]
        return [Scored([0.5], 1, None) for _ in samples]

    def facts(self) -> dict[str, Any]:
        return {"resolved": {"dtype": "float32"}}


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """500 problems x 256 samples are hundreds of MB of text; a batch is held at a time."""
    lengths = [100_000 + i for i in range(200)]
    write_run(tmp_path, {"a": ["x" * length for length in lengths]})
    reward = _HalfReward()
    phase = ScorePhase(tmp_path, parse_spec("prm-tiny,url=http://h"))
    tracemalloc.start()
    try:
        counts = phase.run(reward, 4, {}, io.StringIO())  # type: ignore[arg-type]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (counts.num_new, reward.lengths) == (200, lengths)
    assert peak_bytes < sum(lengths) / 4


def test_a_retrained_model_is_another_reward(
    tmp_path: Path, reward_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = tmp_path / "prm-tiny"
    shutil.copytree(reward_folders["prm-tiny"], model)
    write_run(tmp_path / "run", {"a": ["#### 7"]})
    assert main(["reward", str(tmp_path / "run"), "--reward", str(model)]) == 0
    moved = tmp_path / "elsewhere" / "prm-tiny"
    shutil.move(model, moved)
    assert main(["reward", str(tmp_path / "run"), "--reward", str(moved)]) == 0
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert main(["reward", str(tmp_path / "run"), "--reward", str(moved)]) == 2
    assert "model_id" in capsys.readouterr().err


def test_single_step_solutions_are_pointed_out(
    tmp_path: Path, reward_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, {"a": ["1+1=2\n#### 2", "2+2=4\n#### 4"]})
    spec = f"{reward_folders['prm-tiny']},split=paragraph"
    assert main(["reward", str(tmp_path), "--reward", spec]) == 0
    assert "every solution is a single step" in capsys.readouterr().out
    assert reward_names(tmp_path) == ["prm-tiny-paragraph"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text + text.splitlines()[0] + "\n", "line 9: .* is scored twice"),
        (lambda text: "{}\n" + text, "line 1: fields are"),
        (lambda text: text.replace('"seconds"', '"second"', 1), "line 1: fields are"),
        (lambda text: text.replace('"a"', '"c"'), "which is not in samples.jsonl"),
        (lambda text: text.replace("[0.", "[1.", 1), "need a list of numbers from 0 to 1"),
    ],
)
def test_damaged_score_file(
    scored: tuple[Path, list[dict[str, Any]], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Any,
    message: str,
) -> None:
    import re

    folder, _, spec = scored
    write_run(tmp_path, TEXTS)
    (tmp_path / "scores").mkdir()
    text = (folder / "scores" / "prm-tiny.jsonl").read_text()
    spoilt = spoil(text)
    (tmp_path / "scores" / "prm-tiny.jsonl").write_text(spoilt)
    assert main(["reward", str(tmp_path), "--reward", spec]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert (tmp_path / "scores" / "prm-tiny.jsonl").read_text() == spoilt


_HOLD_LOCK = """
import fcntl, sys, time
lock = open(sys.argv[1], "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(300)
"""


def test_two_writers(scored: tuple[Path, list[dict[str, Any]], str], tmp_path: Path) -> None:
    """Locks of one process do not exclude each other, so another one holds it."""
    _, _, spec = scored
    write_run(tmp_path, {"a": ["#### 7"]})
    (tmp_path / "scores").mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _HOLD_LOCK,
            str(tmp_path / "scores" / "prm-tiny.lock"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert main(["reward", str(tmp_path), "--reward", spec]) == 2
    finally:
        holder.kill()
        holder.wait()
    assert main(["reward", str(tmp_path), "--reward", spec]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--reward", "prm-tiny"], "nowhere is no run folder"),
        (["{run}", "--reward", "my-prm"], "not one of the published models"),
        (["{run}", "--reward", "{spec}", "--batch-size", "0"], "--batch-size 0"),
        (["{run}", "--reward", "{spec}", "--reward", "{spec}"], "two rewards are named prm-tiny"),
        (["{run}", "--reward", "missing/prm-tiny,name=x"], "cannot load the tokenizer"),
        (["{run}", "--reward", "{spec},protocol=math-shepherd,name=x"], "not single tokens"),
        (["{run}", "--reward", "{spec},dtype=int8,name=x"], "dtype=int8 is not known"),
        (["{run}", "--reward", "{spec},device=tpu,name=x"], "device=tpu"),
    ],
)
def test_bad_input(
    scored: tuple[Path, list[dict[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    folder, _, spec = scored
    given = [text.format(run=folder, spec=spec) for text in arguments]
    assert main(["reward", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
