"""The task ``arith_passk``: shipped problems, grading, and lm-eval's evaluator."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_lm import ScriptedLM, evaluate, write_jsonl

from lm_eval_tasks.answers import extract_answer
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.scoring import grading_of, problem_metrics, score_problem
from lm_eval_tasks.tasks.arith.utils import TEST_FILE
from lm_eval_tasks.tasks.gsm8k.utils import gold_answer

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in TEST_FILE.read_text(encoding="utf-8").splitlines()]


def _gold(row: dict[str, str]) -> str:
    return row["answer"].rpartition("#### ")[2]


def test_shipped_problems_are_what_the_readme_says() -> None:
    assert len(ROWS) == 300
    assert {frozenset(row) for row in ROWS} == {frozenset({"id", "question", "answer"})}
    assert len({row["id"] for row in ROWS}) == len({row["question"] for row in ROWS}) == 300
    assert {row["answer"].count("\n") for row in ROWS} == {4, 5, 6, 7, 8}


def test_shipped_solutions_are_right() -> None:
    """Recomputed from the text of the question, not with the generator's own code."""
    for row in ROWS:
        sentences = row["question"].split(". ")
        value = int(sentences[0].split(" has ")[1].split()[0])
        for sentence in sentences[1:-1]:
            number = next((int(word) for word in sentence.split() if word.isdigit()), None)
            if "half" in sentence:
                assert value % 2 == 0, row["id"]
                value //= 2
            elif "times as many" in sentence:
                assert number is not None
                value *= number
            else:
                assert number is not None
                is_more = any(verb in sentence for verb in ("buys", "finds", "gets"))
                value += number if is_more else -number
        assert gold_answer(row["answer"]) == str(value), row["id"]


def test_the_answer_format_is_extracted() -> None:
    assert {extract_answer(row["answer"]).source for row in ROWS} == {"hash"}
    assert [extract_answer(row["answer"]).answer for row in ROWS] == [_gold(row) for row in ROWS]


def test_grading_takes_the_last_answer() -> None:
    row = ROWS[0]
    wrong = row["answer"].replace(f"#### {_gold(row)}", f"#### {int(_gold(row)) + 1}")
    samples = [row["answer"], wrong, f"\\boxed{{{_gold(row)}.0}}", ""]
    found = problem_metrics(score_problem(samples, _gold(row), grading_of("arith")))
    assert found["pass@1"] == pytest.approx(2 / 4)
    assert found["pass@4"] == 1.0
    assert found["no_answer"] == pytest.approx(1 / 4)


def test_lm_eval_runs_the_task_without_a_data_file() -> None:
    gold = {row["question"]: _gold(row) for row in ROWS}

    def script(prompt: str, j: int) -> str:
        right = gold[prompt]
        return f"1+1=2\n#### {right}" if j < 3 else f"1+{j}\n#### 100{j}"

    lm = ScriptedLM(script)
    results = evaluate(lm, "arith_passk", {"num_samples": 4})
    found = results["results"]["arith_passk"]
    assert found["pass@1,all"] == pytest.approx(3 / 4)
    assert found["pass@4,all"] == 1.0
    assert len(lm.calls[0]) == 4 * 300
    settings = lm.calls[0][0].args[1]
    assert (settings["temperature"], settings["max_gen_toks"], settings["until"]) == (0.7, 128, [])
    assert results["configs"]["arith_passk"]["metadata"]["data_file"] == str(TEST_FILE)


def test_own_problems_and_their_mistakes(tmp_path: Path) -> None:
    rows = [{"question": "Ann has 2 eggs. How many?", "answer": "#### 2"}]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    lm = ScriptedLM(lambda prompt, j: f"#### {j}")
    options = {"num_samples": 4, "data_file": str(path)}
    found = evaluate(lm, "arith_passk", options)["results"]["arith_passk"]
    assert found["pass@1,all"] == pytest.approx(1 / 4)
    path.write_text('{"question": "q", "answer": "2"}\n')
    with pytest.raises(InputError, match=r"line 1: field 'answer' must end in '#### <number>'"):
        evaluate(lm, "arith_passk", options)


def test_the_file_is_the_generators_output() -> None:
    """Needs the distillation package's sources, which lie beside in the repository."""
    command = [sys.executable, "-m", "thinkfast_distill.data.arith", "--split", "test"]
    done = subprocess.run(
        [*command, "--num", "300"],
        cwd=ROOT / "distill",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == TEST_FILE.read_text(encoding="utf-8")
