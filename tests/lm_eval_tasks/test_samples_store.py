"""The sample store: append, repair, refuse, lock, disk full."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm_eval_tasks import jsonl
from lm_eval_tasks.jsonl import JsonLines
from lm_eval_tasks.samples import (
    HASHED_FIELDS,
    ProblemRecord,
    SampleRecord,
    SampleStore,
    config_hash,
)

CONFIG: dict[str, Any] = {name: f"some {name}" for name in HASHED_FIELDS} | {
    "num_samples": 4,
    "limit": 2,
    "created": "then",
}
HASH = config_hash(CONFIG)
PROBLEMS = [ProblemRecord(f"t/{i}", f"Question {i}?", str(i), "00") for i in range(2)]


def sample(problem: int = 0, index: int = 0, **changes: Any) -> SampleRecord:
    record = SampleRecord(
        problem_id=f"t/{problem}",
        sample_index=index,
        seed=7 + index,
        text="Two lines\nand \\boxed{½} \u2028 \ud800.",
        num_tokens=9,
        num_prompt_tokens=5,
        num_cached_tokens=None,
        finish_reason="stop",
        session=0,
        submit_s=0.5,
        first_token_s=0.75,
        finish_s=2.0,
        config_hash=HASH,
    )
    return replace(record, **changes)


def fill(folder: Path, count: int = 3) -> Path:
    with SampleStore(folder).open(CONFIG, PROBLEMS) as store:
        for index in range(count):
            store.append(sample(index % 2, index // 2))
    return folder / "samples.jsonl"


def reopen(folder: Path, **changes: Any) -> SampleStore:
    return SampleStore(folder).open(CONFIG | changes, PROBLEMS)


# -- what is written is read ----------------------------------------------------------------------


def test_records_come_back(tmp_path: Path) -> None:
    fill(tmp_path)
    store = SampleStore(tmp_path)
    assert list(store.records()) == [sample(0, 0), sample(1, 0), sample(0, 1)]
    assert store.have() == {"t/0": {0, 1}, "t/1": {0}}
    assert store.problems() == PROBLEMS
    assert store.config() == CONFIG | {"config_hash": HASH}
    assert not sample().is_truncated
    assert sample(finish_reason="length").is_truncated


def test_a_sample_is_on_file_before_the_next_one(tmp_path: Path) -> None:
    with reopen(tmp_path) as store:
        for index in range(3):
            store.append(sample(0, index))
            assert len(list(SampleStore(tmp_path).records())) == index + 1
            assert store.have() == {"t/0": set(range(index + 1))}


def test_sessions_merge_later_facts(tmp_path: Path) -> None:
    with reopen(tmp_path) as store:
        store.append_session({"session": 0, "warmup_s": 1.5})
        store.append_session({"session": 0, "mean_running": 3.0})
        store.append_session({"session": 1, "warmup_s": 2.5})
    assert SampleStore(tmp_path).sessions() == [
        {"session": 0, "warmup_s": 1.5, "mean_running": 3.0},
        {"session": 1, "warmup_s": 2.5},
    ]


def test_more_samples_and_problems_later(tmp_path: Path) -> None:
    fill(tmp_path)
    more = [*PROBLEMS, ProblemRecord("t/2", "Question 2?", "2", "00")]
    with SampleStore(tmp_path).open(CONFIG | {"num_samples": 8, "limit": 3}, more) as store:
        store.append(sample(2, 7))
    store = SampleStore(tmp_path)
    assert len(list(store.records())) == 4
    assert store.problems() == more
    assert (store.config()["num_samples"], store.config()["limit"]) == (8, 3)
    with reopen(tmp_path, num_samples=1, limit=None, created="now"):
        pass
    assert (store.config()["num_samples"], store.config()["limit"]) == (8, None)
    assert store.config()["created"] == "then"
    assert store.problems() == more, "those of earlier sessions stay"


def test_config_hash_depends_on_every_field_that_matters() -> None:
    hashes = {config_hash(CONFIG | {name: "other"}) for name in HASHED_FIELDS}
    assert len(hashes | {HASH}) == len(HASHED_FIELDS) + 1
    assert config_hash(CONFIG | {"num_samples": 99, "limit": None, "created": "now"}) == HASH


# -- a torn last line -----------------------------------------------------------------------------


def test_every_tear_is_repaired(tmp_path: Path) -> None:
    """Wherever its last line is cut, never more than that line is lost."""
    file = fill(tmp_path)
    whole = file.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in (*range(start, len(whole), 23), len(whole) - 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        readable = list(SampleStore(tmp_path).records())
        assert readable == [sample(0, 0), sample(1, 0)], "a reader leaves it out"
        with reopen(tmp_path) as store:
            is_complete = end == len(whole) - 1
            assert store.dropped_bytes == (0 if is_complete else end - start)
            assert store.have().get("t/0") == ({0, 1} if is_complete else {0})
            if not is_complete:
                store.append(sample(0, 1))
        assert file.read_bytes() == whole


def test_zeros_after_a_power_cut_are_cut_off(tmp_path: Path) -> None:
    file = fill(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" * 100_000)
    assert SampleStore(tmp_path).repair() == 100_000
    assert file.read_bytes() == whole


def test_long_torn_line(tmp_path: Path) -> None:
    file = fill(tmp_path)
    whole = file.read_bytes()
    torn = b'{"problem_id": "' + b"x" * 200_000
    file.write_bytes(whole + torn)
    assert SampleStore(tmp_path).repair() == len(torn)
    assert file.read_bytes() == whole


def test_repair_leaves_other_files_alone(tmp_path: Path) -> None:
    file = fill(tmp_path)
    for text in ("notes of mine, without a newline", '{"a": ' + "[" * 20_000):
        file.write_text(text)
        with pytest.raises(ValueError, match="no torn object"):
            SampleStore(tmp_path).repair()
        assert file.read_text() == text


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("seed"), r"fields missing: \['seed'\]"),
        (lambda row: row.update(mood=1), r"unknown: \['mood'\]"),
        (lambda row: row.update(num_tokens="9"), "num_tokens is '9'; need int"),
        (lambda row: row.update(num_tokens=True), "num_tokens is True; need int"),
        (lambda row: row.update(num_tokens=-1), "num_tokens is -1; need 0 or more"),
        (lambda row: row.update(sample_index=1.0), "sample_index is 1.0; need int"),
        (lambda row: row.update(first_token_s="x"), "need int or float or null"),
        (lambda row: row.update(finish_reason="abort"), "finish_reason is 'abort'"),
        (lambda row: row.update(finish_s=0.6), "times are out of order"),
        (lambda row: row.update(finish_s=float("inf")), "times are out of order"),
        (lambda row: row.update(submit_s=float("nan")), "times are out of order"),
        (lambda row: row.update(config_hash="abc"), f"config_hash is abc, .* is {HASH}"),
        (lambda row: row.update(problem_id="t/9"), "problem t/9 is not in problems.jsonl"),
        (lambda row: row.update(problem_id="t/0"), "sample 0 of t/0 stands there twice"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, change: Any, message: str) -> None:
    file = fill(tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    row = json.loads(lines[1])
    change(row)
    lines[1] = json.dumps(row) + "\n"
    file.write_text("".join(lines))
    for read in (lambda: list(SampleStore(tmp_path).records()), lambda: reopen(tmp_path)):
        with pytest.raises(ValueError, match=rf"samples\.jsonl, line 2: .*{message}"):
            read()
    assert file.read_text() == "".join(lines), "nothing is mended behind the user's back"


@pytest.mark.parametrize(
    "line",
    [
        b'{"problem_id": \n',
        b'{"text": ' + b"[" * 20_000 + b"\n",
        b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        b"[]\n",
        b"\n",
        b"\xff\xfe\n",
        b'{"problem_id": "t/0"}\n',
    ],
)
def test_a_malformed_line_in_the_middle_is_refused(tmp_path: Path, line: bytes) -> None:
    file = fill(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], line, *lines[1:]]))
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2: "):
        reopen(tmp_path)
    # Also as the last line: it has its newline, so it was not torn.
    file.write_bytes(b"".join([*lines, line]))
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 4: "):
        reopen(tmp_path)


def test_other_settings_are_refused_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    with pytest.raises(ValueError, match="holds samples of other settings"):
        reopen(tmp_path, temperature=0.9, seed=3)
    said = capsys.readouterr().err
    assert 'temperature is "some temperature" there and 0.9 now' in said
    assert 'seed is "some seed" there and 3 now' in said
    assert said.count("\n") == 1
    with reopen(tmp_path):
        pass  # the lock is free again


def test_a_folder_without_samples_takes_new_settings(tmp_path: Path) -> None:
    """A start that failed, for example on a misspelt engine argument, binds nothing."""
    with reopen(tmp_path):
        pass
    with reopen(tmp_path, temperature=0.9) as store:
        assert store.config()["temperature"] == 0.9


def test_other_problems_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    changed = [replace(PROBLEMS[0], gold="17"), PROBLEMS[1]]
    with pytest.raises(ValueError, match=r"t/0 is another problem now \(gold\)"):
        SampleStore(tmp_path).open(CONFIG, changed)
    file = tmp_path / "problems.jsonl"
    file.write_text(file.read_text().replace('"gold": "1"', '"gold": ""'))
    with pytest.raises(ValueError, match=r"problems\.jsonl, line 2: gold is empty"):
        SampleStore(tmp_path).problems()


def test_damaged_and_missing_config(tmp_path: Path) -> None:
    fill(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text()
    for damaged, message in (
        (text.replace("some model_id", "other"), "its fields give"),
        (text[:40], "not JSON"),
        ("[]", "need a JSON object"),
        ("[" * 20_000, "not JSON .maximum recursion depth"),
        ("{}", "fields missing"),
    ):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            SampleStore(tmp_path).config()
    file.unlink()
    with pytest.raises(ValueError, match=r"is .* a run folder"):
        SampleStore(tmp_path).config()
    with pytest.raises(ValueError, match=r"samples\.jsonl but no config\.json"):
        reopen(tmp_path)


def test_our_own_mistakes_are_assertions(tmp_path: Path) -> None:
    with reopen(tmp_path) as store:
        store.append(sample())
        with pytest.raises(AssertionError, match="stored already"):
            store.append(sample())
        with pytest.raises(AssertionError, match="another config"):
            store.append(sample(0, 1, config_hash="abc"))


# -- two writers ----------------------------------------------------------------------------------

HOLD = """
import sys
from lm_eval_tasks.locks import acquire
from pathlib import Path
folder = Path(sys.argv[1])
held = acquire(folder / ".lock", folder)
print("held", flush=True)
sys.stdin.read()
"""


def test_second_writer_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    fill(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} is writing there"):
            reopen(tmp_path)
        assert len(list(SampleStore(tmp_path).records())) == 3, "reading needs no lock"
        holder.kill()
        holder.wait()
    with reopen(tmp_path) as store:
        store.append(sample(1, 1))


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        reopen(tmp_path / "file" / "run")


# -- a full disk ----------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size; writes then come up short, then fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_in_the_middle_of_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = fill(tmp_path)
    whole = file.read_bytes()
    store = reopen(tmp_path)
    with (
        largest_file(len(whole) + 100),
        pytest.raises(ValueError, match=r"cannot be written .*all lines before this one are kept"),
    ):
        store.append(sample(1, 1))
    store.close()
    assert capsys.readouterr().err.count("\n") == 1
    assert file.read_bytes() == whole, "no torn line either"
    with reopen(tmp_path) as store:
        assert store.have() == {"t/0": {0, 1}, "t/1": {0}}
        store.append(sample(1, 1))
    assert len(list(SampleStore(tmp_path).records())) == 4


def test_disk_full_before_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fill(tmp_path)
    whole = file.read_bytes()
    store = reopen(tmp_path)

    def no_space(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jsonl.os, "write", no_space)
    with pytest.raises(ValueError, match="No space left on device"):
        store.append(sample(1, 1))
    monkeypatch.undo()
    store.close()
    assert file.read_bytes() == whole


def test_disk_full_while_config_is_written(tmp_path: Path) -> None:
    fill(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with largest_file(20), pytest.raises(ValueError, match=r"config\.json: cannot be written"):
        reopen(tmp_path, num_samples=99)
    assert (tmp_path / "config.json").read_text() == before


# -- the file class by itself ---------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "rows.jsonl")
    assert list(file.read(dict)) == []
    with file:
        file.append({"a": 1})
        file.append({"a": "\ud800é\n"})
    assert list(file.read(dict)) == [{"a": 1}, {"a": "\ud800é\n"}]
    with file, pytest.raises(ValueError, match="not JSON compliant"):
        file.append({"a": float("nan")})
    assert len(list(file.read(dict))) == 2


def test_json_lines_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(jsonl.os, "fdatasync", synced.append)
    with JsonLines(tmp_path / "now.jsonl", sync_interval_s=0.0) as file:
        for number in range(3):
            file.append({"a": number})
            assert len(synced) == number + 1
    synced.clear()
    with JsonLines(tmp_path / "later.jsonl", sync_interval_s=1e9) as file:
        for number in range(3):
            file.append({"a": number})
        assert len(synced) <= 1, "not for every line"
    assert synced, "but at the end"
