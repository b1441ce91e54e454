"""Tasks whose answers are programs: extraction, grading, votes, the store, lm-eval."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run
from scripted_lm import ScriptedLM, evaluate, write_jsonl

from lm_eval_tasks.answers import Extracted
from lm_eval_tasks.commands.score import evaluate_run
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.programs import grading
from lm_eval_tasks.programs.checks import Checks
from lm_eval_tasks.programs.extract import MAX_PROGRAM_CHARS, extract_program
from lm_eval_tasks.sampling.problems import load_problems
from lm_eval_tasks.scored import load_scored
from lm_eval_tasks.scoring import PROGRAM, grading_of, problem_metrics, score_problem
from lm_eval_tasks.tasks.humaneval.utils import HumanEvalPassAtK
from lm_eval_tasks.tasks.mbpp.utils import MBPPPassAtK
from lm_eval_tasks.tasks.programs.utils import TEST_FILE
from lm_eval_tasks.verdicts import CLASSES, VERDICTS, read_verdicts, score_run

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="programs are run with Linux's seccomp filters only"
)

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in TEST_FILE.read_text(encoding="utf-8").splitlines()]

SQUARE = Checks("assert f(2) == 4\nassert f(-3) == 9\n").to_gold()
RIGHT = "```python\ndef f(x):\n    return x * x\n```"
RIGHT_TOO = "```python\ndef f(x):\n    return abs(x) ** 2.0\n```"
WRONG = "```python\ndef f(x):\n    return 2 * x\n```"
WRONG_TOO = "So:\n```py\ndef f(x):\n    # twice\n    return x + x\n```\nDone."
BROKEN = "```python\ndef f(x:\n```"
BROKEN_TOO = "```python\ndef f(x::\n```"
NONE = "I do not know."


# -- extraction ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\na = 1\n```\nand\n```python\nb = 2\n```\n", ("b = 2\n", "fence")),
        ("```python\na = 1\n```\nOutput:\n```\n1\n```", ("a = 1\n", "fence")),
        ("```\na = 1\n```\n```bash\npython a.py\n```", ("a = 1\n", "fence")),
        ("```bash\nls\n```", (None, None)),
        ("```Python3\na = 1\n\nb = 2", ("a = 1\n\nb = 2\n", "fence")),
        ("~~~py\na = 1\n~~~", ("a = 1\n", "fence")),
        ("````python\na = '''\n```\n'''\n````", ("a = '''\n```\n'''\n", "fence")),
        ("  ```python\n  a = 1\n  ```", ("a = 1\n", "fence")),
        (
            "1. So:\n\n   ```python\n   def f(x):\n       return x\n\n  # shallow\n   ```\n",
            ("def f(x):\n    return x\n\n# shallow\n", "fence"),
        ),
        ("\t```\n\tif a:\n\t\tb()\n\t```", ("if a:\n\tb()\n", "fence")),
        (
            "```python\ndef f(x):\n    return x\n```\nExample:\n```python\nprint(f(3))\n```\n",
            ("def f(x):\n    return x\n", "fence"),
        ),
        ("```py\nf = lambda x: x\n```\n```py\ny = f(1)\n```", ("f = lambda x: x\n", "fence")),
        ("```\nclass A: pass\n```\n```\nA()\n```", ("class A: pass\n", "fence")),
        ("```\ndef f(): pass\n```\n```py\na = 1\n```", ("a = 1\n", "fence")),
        ("```py\ndef f(): 1\n```\n```py\ndef f(): 2\n```", ("def f(): 2\n", "fence")),
        (
            "```py\nx = 1\n```\n```py\n# def f\nif x:\n    def f(): 2\n```",
            ("# def f\nif x:\n    def f(): 2\n", "fence"),
        ),
        ("```python\n```\ndef f(): pass", ("def f(): pass\n", "code")),
        ("```python\r\na = 1\r\n```", ("a = 1\n", "fence")),
        ("    return 1\n\n\ndef other():\n    pass\n", ("    return 1\n", "body")),
        ("\n    x = 1\n\n    return x\nprint(1)", ("\n    x = 1\n\n    return x\n", "body")),
        ("Sure!\nimport math\ndef f():\n    pass", ("import math\ndef f():\n    pass\n", "code")),
        ("@cache\ndef f(): pass", ("@cache\ndef f(): pass\n", "code")),
        ("I define f.", (None, None)),
        ("", (None, None)),
        ("   \n\n", (None, None)),
        ("definitely not\nimported from a class of\nfrom what I know\n@ home", (None, None)),
        ("```python\n" + "#" * MAX_PROGRAM_CHARS + "\n```", (None, None)),
        ("```python\na = 1\n```\n" + "so\n" * MAX_PROGRAM_CHARS, ("a = 1\n", "fence")),
        ("```python `a`\n```py \tx=1 ~\na = 1\n~~~\n``` `\n```", ("a = 1\n~~~\n``` `\n", "fence")),
    ],
)
def test_extract_program(text: str, expected: tuple[str | None, str | None]) -> None:
    assert extract_program(text) == Extracted(*expected)


def test_extraction_is_linear() -> None:
    start = time.process_time()
    for text in ("```" * 300_000, "```\n" * 200_000, " " * 1_000_000, "def \n" * 200_000):
        extract_program(text)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("filler", ["a", " ", "\t", "`", "~", "`~", ".", "a "])
@pytest.mark.parametrize("begin", ["```", "~~~", "  ```py ", "def ", "class a", "from "])
def test_an_almost_fitting_line_takes_no_longer(begin: str, filler: str) -> None:
    """Repeats that overlap are tried in all their divisions: many seconds at this length."""
    text = begin + filler * (MAX_PROGRAM_CHARS // len(filler)) + " `"
    start = time.process_time()
    extract_program(text)
    assert time.process_time() - start < 1


# -- the gold answer -------------------------------------------------------------------------------


def test_checks() -> None:
    checks = Checks("def check(candidate):\n    assert candidate()\n", "f", "import math\n")
    assert Checks.from_gold(checks.to_gold()) == checks
    assert PROGRAM.check_gold(checks.to_gold()) is None
    for gold, fault in (
        ("5", "the gold answer '5' does not describe tests"),
        ('{"test": ""}', "does not describe tests"),
        (Checks("assert (").to_gold(), "tests is not Python"),
        (Checks("f(1)").to_gold(), "the tests assert nothing"),
        (Checks("assert f(1)", "f").to_gold(), "the tests define no function check"),
        (Checks("def check(f):\n    assert f(1)", "f()").to_gold(), "entry_point is 'f()'"),
        (Checks("assert 1", prompt="def f(:").to_gold(), "prompt is not Python"),
        ('{"tests": 1}', "tests is of type int"),
        ("[" * 20_000, "does not describe tests"),
    ):
        assert fault in (PROGRAM.check_gold(gold) or ""), gold


def test_a_body_continues_the_prompt_and_a_function_replaces_it() -> None:
    prompt = "from math import pi\n\n\ndef area(r: float) -> float:\n    '''Doc.'''\n"
    tests = "def check(candidate):\n    assert round(candidate(1), 2) == 3.14\n"
    gold = Checks(tests, "area", prompt).to_gold()
    programs = {
        "    return pi * r * r\n": True,
        "def area(r):\n    return pi * r ** 2\n": True,
        prompt + "    return pi * r * r\n": True,
        "def half(r):\n    return r / 2\n\narea = lambda r: pi * half(2 * r) ** 2\n": True,
        "from __future__ import annotations\ndef area(r): return pi * r * r\n": True,
        "    return 3\n": False,
        "def volume(r):\n    return pi * r * r\n": False,
        "\n": False,
    }
    assert grading.grade_programs(gold, list(programs)) == list(programs.values())


# -- grading and votes -----------------------------------------------------------------------------


def test_the_vote_is_by_behaviour() -> None:
    samples = [RIGHT, WRONG, WRONG_TOO, RIGHT_TOO, BROKEN, BROKEN_TOO, BROKEN, NONE]
    score = score_problem(samples, SQUARE, PROGRAM)
    assert score.classes == [0, 1, 1, 0, 2, 3, 2, None]
    assert score.is_correct == [True, False, False, True, False, False, False, False]
    found = problem_metrics(score, ("pass", "maj"))
    assert found["pass@1"] == pytest.approx(2 / 8)
    assert found["no_answer"] == pytest.approx(1 / 8)
    assert found["maj@8"] == pytest.approx(1 / 3), "three classes have two votes"


def test_programs_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    run = grading.run_programs

    def count(jobs: Any) -> Any:
        asked.append(len(jobs))
        return run(jobs)

    monkeypatch.setattr(grading, "_runs", grading._Runs())
    monkeypatch.setattr(grading, "run_programs", count)
    score_problem([RIGHT, RIGHT, WRONG], SQUARE, PROGRAM)
    score_problem([RIGHT, RIGHT_TOO], SQUARE, PROGRAM)
    assert sum(asked) == 3


def test_tests_at_fault_stop_the_scoring(capsys: pytest.CaptureFixture[str]) -> None:
    gold = Checks("assert f(object())").to_gold()
    with pytest.raises(InputError):
        score_problem([RIGHT], gold, PROGRAM)
    said = capsys.readouterr().err
    assert "a problem cannot be tested" in said
    assert "an argument of type object" in said
    assert "assert f(object())" in said


# -- the store -------------------------------------------------------------------------------------

GOLDS = {"programs/a": SQUARE, "programs/b": Checks("assert g() == [1]").to_gold()}
TEXTS = {
    "programs/a": [RIGHT, WRONG, RIGHT_TOO, NONE],
    "programs/b": ["def g():\n    return [1]\n", "def g():\n    return (1,)\n", BROKEN, WRONG],
}


def test_score_run_and_estimators(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", GOLDS, TEXTS, task="programs")
    assert score_run(folder) == (8, 8)
    found = load_scored(folder)
    assert [s.correct for s in found["programs/a"]] == [True, False, True, False]
    assert [s.answer_class is None for s in found["programs/a"]] == [False, False, False, True]
    assert found["programs/a"][0].answer_class == found["programs/a"][2].answer_class
    assert [s.correct for s in found["programs/b"]] == [True, False, False, False]
    assert len({s.answer_class for s in found["programs/b"]}) == 4
    scores = evaluate_run(folder)
    assert scores.metrics["pass@1"]["mean"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert scores.metrics["maj@4"]["mean"] == pytest.approx((1 + 1 / 4) / 2)
    assert scores.task_version == "1.0+program/2/fence-body-code/2"
    assert {verdict.source for verdict in read_verdicts(folder)} == {"fence", "code", None}
    # More samples later: the verdicts that are there stay.
    more = TEXTS["programs/a"] + [WRONG_TOO, RIGHT]
    write_run(folder, GOLDS, {"programs/a": more}, task="programs")
    assert score_run(folder) == (10, 2)
    classes = [s.answer_class for s in load_scored(folder)["programs/a"]]
    assert classes[4] == classes[1]
    assert classes[5] == classes[0]
    assert score_run(folder) == (10, 0)


def test_scoring_goes_on_after_a_kill(tmp_path: Path) -> None:
    golds = {f"programs/{i}": SQUARE.replace("-3", f"-3{i}") for i in range(3)}
    golds = {name: gold.replace("== 9", f"== 3{name[-1]}**2") for name, gold in golds.items()}
    slow = RIGHT.replace("return", "__import__('time').sleep(0.2); return")
    texts = {
        name: [RIGHT, WRONG, slow.replace("0.2", "4" if i else "0")] for i, name in enumerate(golds)
    }
    folder = write_run(tmp_path / "run", golds, texts, task="programs")
    command = [sys.executable, "-m", "lm_eval_tasks.cli", "score", str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (folder / CLASSES).is_file() or not (folder / CLASSES).read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = (folder / VERDICTS).read_text()
    assert 3 <= before.count("\n") < 9
    num_done = before.count("\n")
    write_run(folder, golds, {}, task="programs")
    counts = score_run(folder)
    assert counts == (9, 9 - num_done)
    after = (folder / VERDICTS).read_text()
    assert after.startswith(before)
    verdicts = list(read_verdicts(folder))
    assert len(verdicts) == 9
    assert [verdict.correct for verdict in verdicts] == [True, False, True] * 3


# -- tasks -----------------------------------------------------------------------------------------


def test_shipped_problems_and_their_solutions() -> None:
    """Each reference solution passes as a body; a function without a body does not."""
    assert len(ROWS) == 30
    assert len({row["task_id"] for row in ROWS}) == 30
    for row in ROWS:
        assert HumanEvalPassAtK.check_row(row) is None
        found = extract_program(row["canonical_solution"])
        assert found.source == "body"
        assert found.answer is not None
        gold = HumanEvalPassAtK.gold(row)
        assert grading.grade_programs(gold, [found.answer, "    return None\n"]) == [True, False]


def test_lm_eval_runs_the_shipped_task() -> None:
    rows = {row["prompt"].rstrip(): row for row in ROWS[:2]}

    def script(prompt: str, j: int) -> str:
        asked = prompt.split("```python\n")[1].removesuffix("\n```")
        row = rows[asked]
        body = row["canonical_solution"] if j < 3 else "    return None\n"
        return f"Here it is.\n```python\n{row['prompt']}{body}```\n"

    lm = ScriptedLM(script)
    results = evaluate(lm, "programs_maj", {"num_samples": 4}, limit=2)
    found = results["results"]["programs_maj"]
    assert found["pass@1,all"] == pytest.approx(3 / 4)
    assert found["maj@4,all"] == 1.0
    assert found["no_answer,all"] == 0.0
    assert lm.calls[0][0].args[0].startswith("Complete this Python function.")
    settings = lm.calls[0][0].args[1]
    assert (settings["temperature"], settings["max_gen_toks"], settings["until"]) == (0.7, 512, [])
    assert results["configs"]["programs_maj"]["metadata"]["extraction"] == "fence-body-code/2"


MBPP_ROW = {
    "task_id": 11,
    "text": "Write a function to square a number.",
    "code": "def f(x):\n    return x * x",
    "test_list": ["assert f(2) == 4", "assert f(n) == 9"],
    "test_setup_code": "n = -3",
    "challenge_test_list": [],
}


def test_own_files_in_the_published_layouts(tmp_path: Path) -> None:
    mbpp = write_jsonl(tmp_path / "mbpp.jsonl", [MBPP_ROW])
    options = {"num_samples": 4, "data_file": str(mbpp)}
    texts = [RIGHT, WRONG, RIGHT_TOO, NONE]
    lm = ScriptedLM(lambda prompt, j: texts[j])
    found = evaluate(lm, "mbpp_passk", options)["results"]["mbpp_passk"]
    assert found["pass@1,all"] == pytest.approx(1 / 2)
    prompt = lm.calls[0][0].args[0]
    assert "task: Write a function to square a number. Your code should pass these" in prompt
    assert "\n\nassert f(2) == 4\nassert f(n) == 9\n\n" in prompt
    humaneval = write_jsonl(tmp_path / "humaneval.jsonl", ROWS[5:6])
    body = ROWS[5]["canonical_solution"] + "\n\ndef next_function():\n    pass\n"
    lm = ScriptedLM(lambda prompt, j: body if j else "    return 1\n")
    options = {"num_samples": 2, "data_file": str(humaneval)}
    found = evaluate(lm, "humaneval_base_passk", options)["results"]["humaneval_base_passk"]
    assert found["pass@1,all"] == pytest.approx(1 / 2)
    assert lm.calls[0][0].args[0] == ROWS[5]["prompt"]
    assert "\ndef" in lm.calls[0][0].args[1]["until"]


@pytest.mark.parametrize(
    ("task", "row", "fault"),
    [
        ("humaneval", {**ROWS[0], "test": "assert f(1)"}, "the tests define no function check"),
        ("humaneval", {**ROWS[0], "entry_point": None}, "'entry_point' must be of type str"),
        ("mbpp", {"text": "t", "test_list": "assert 1"}, "'test_list' must be of type list"),
        ("mbpp", {"text": "t", "test_list": [1]}, "'test_list' must be a list of assertions"),
        ("mbpp", {"text": "t", "test_list": []}, "the tests assert nothing"),
        ("mbpp", {"question": "t"}, "no field 'text'"),
    ],
)
def test_rows_that_cannot_be_tested(
    task: str, row: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [row])
    with pytest.raises(InputError, match=f"line 1: .*{fault}"):
        load_problems(task, {}, data_file=str(path), chat_template="off")


def test_sampling_loads_the_same_problems(tmp_path: Path) -> None:
    found = load_problems("programs", {}, limit=3, chat_template="off")
    assert [problem.problem_id for problem in found.problems] == [
        f"programs/{row['task_id']}" for row in ROWS[:3]
    ]
    first = found.problems[0]
    assert first.question == ROWS[0]["prompt"]
    assert first.gold == HumanEvalPassAtK.gold(ROWS[0])
    assert ROWS[0]["prompt"].rstrip() in first.prompt
    assert ROWS[0]["test"] not in first.prompt
    assert found.defaults["max_tokens"] == 512
    assert grading_of("programs") is grading_of("mbpp") is grading_of("humaneval_base") is PROGRAM
    path = write_jsonl(tmp_path / "mbpp.jsonl", [MBPP_ROW])
    (problem,) = load_problems("mbpp", {}, data_file=str(path), chat_template="off").problems
    assert problem.problem_id == "mbpp/11"
    assert problem.gold == MBPPPassAtK.gold(MBPP_ROW)
