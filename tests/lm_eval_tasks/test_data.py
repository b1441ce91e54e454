"""Local data files: what is read, and one clear line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_lm import GSM8K_ROWS, MATH500_ROWS, write_jsonl

from lm_eval_tasks.data import read_local_rows
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.tasks.gsm8k.utils import GSM8KPassAtK
from lm_eval_tasks.tasks.math500.utils import Math500PassAtK


def _read(path: Path, task: type[GSM8KPassAtK] | type[Math500PassAtK]) -> list[dict[str, object]]:
    return read_local_rows(str(path), task.REQUIRED, task.OPTIONAL, task.check_row)


def test_read_local_rows_keeps_the_hub_layout(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", MATH500_ROWS)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert _read(path, Math500PassAtK) == MATH500_ROWS


def test_read_local_rows_drops_fields_that_not_every_row_has(tmp_path: Path) -> None:
    rows = [dict(MATH500_ROWS[0], extra=1), {"problem": "p", "answer": "1", "level": "high"}]
    read = _read(write_jsonl(tmp_path / "rows.jsonl", rows), Math500PassAtK)
    assert [set(row) for row in read] == [{"problem", "answer"}] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[" * 20_000, "not JSON (maximum recursion depth exceeded"),
        ("1" * 5_000, "not JSON (Exceeds the limit"),
        ("[1, 2]", "need a JSON object with 'question', 'answer', got list"),
        ('{"answer": "#### 1"}', "no field 'question'; need 'question', 'answer', got 'answer'"),
        ('{"question": 3, "answer": "#### 1"}', "field 'question' must be of type str, got int"),
        ('{"question": "q", "answer": "42"}', "must end in '#### <number>', got '42'"),
        ('{"question": "q", "answer": "#### many"}', "must end in '#### <number>'"),
    ],
)
def test_read_local_rows_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GSM8K_ROWS[0]) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        _read(path, GSM8KPassAtK)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)


def test_read_local_rows_refuses_an_empty_gold_answer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "p", "answer": " "}])
    with pytest.raises(ValueError, match="line 1: field 'answer' is empty"):
        _read(path, Math500PassAtK)


def test_read_local_rows_refuses_unreadable_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no rows"):
        _read(tmp_path / "empty.jsonl", GSM8KPassAtK)
    for name in ("binary.jsonl", "missing.jsonl", ""):
        with pytest.raises(ValueError, match="cannot be read"):
            _read(tmp_path / name, GSM8KPassAtK)


def test_a_bad_file_ends_the_process_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q"}\n')
    script = (
        "import sys; from lm_eval_tasks.data import read_local_rows as read; "
        "read(sys.argv[1], {'question': str, 'answer': str}, {}, lambda row: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {path}, line 1: no field 'answer'; need 'question', 'answer', got 'question'\n"
    )
