"""Prompts, golds and names come from the tasks; model files are told apart."""

import hashlib
import json
from pathlib import Path

import pytest
from scripted_lm import GSM8K_ROWS, MATH500_ROWS, ScriptedLM, evaluate, write_jsonl
from tiny_checkpoint import build_tokenizer

from lm_eval_tasks.sampling.environment import hardware, model_id, versions
from lm_eval_tasks.sampling.problems import encode_prompts, load_problems, task_names


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return str(folder)


def test_task_names() -> None:
    assert {"arith", "gsm8k", "math500"} <= set(task_names())


@pytest.mark.parametrize(
    ("task", "rows", "golds", "names"),
    [
        ("gsm8k", GSM8K_ROWS, ["18", "70,000", "5"], ["0", "1", "2"]),
        (
            "math500",
            MATH500_ROWS,
            ["2\\sqrt{2}", "\\frac{1}{2}"],
            ["test/algebra/a.json", "test/prealgebra/b.json"],
        ),
    ],
)
def test_the_same_prompts_as_lm_eval(
    tmp_path: Path,
    tokenizer_folder: str,
    task: str,
    rows: list[dict[str, object]],
    golds: list[str],
    names: list[str],
) -> None:
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    loaded = load_problems(task, {"pretrained": tokenizer_folder}, data_file=data)
    lm = ScriptedLM(lambda prompt, j: str(j))
    metadata = {"num_samples": 2, "data_file": data, "pretrained": tokenizer_folder}
    evaluate(lm, f"{task}_passk", metadata)
    asked = {request.problem: request.args[0] for request in lm.calls[0]}
    assert {p.problem_id: p.prompt for p in loaded.problems} == asked
    assert [p.problem_id for p in loaded.problems] == [f"{task}/{name}" for name in names]
    assert [p.gold for p in loaded.problems] == golds
    assert [p.question for p in loaded.problems] == [
        row.get("question", row.get("problem")) for row in rows
    ]
    assert loaded.prompt["chat_template_applied_by"] == "task"
    record = loaded.problems[0].record()
    assert record.prompt_sha256 == hashlib.sha256(loaded.problems[0].prompt.encode()).hexdigest()
    settings = lm.calls[0][0].args[1]
    assert loaded.defaults == {
        "temperature": settings["temperature"],
        "top_p": settings["top_p"],
        "max_tokens": settings["max_gen_toks"],
    }


def test_limit_and_data_hash(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", GSM8K_ROWS)
    every = load_problems("gsm8k", {}, data_file=str(data))
    first = load_problems("gsm8k", {}, data_file=str(data), limit=1)
    assert first.problems == every.problems[:1]
    assert first.data_sha256 == every.data_sha256, "of the whole file, so that limit can be raised"
    other = write_jsonl(tmp_path / "other.jsonl", GSM8K_ROWS[:2])
    assert load_problems("gsm8k", {}, data_file=str(other)).data_sha256 != every.data_sha256


def test_messages_for_a_chat_server() -> None:
    loaded = load_problems("arith", {}, limit=2, messages=True)
    for problem in loaded.problems:
        assert json.loads(problem.prompt) == [{"role": "user", "content": problem.question}]


def test_chat_template_off(tokenizer_folder: str) -> None:
    loaded = load_problems("arith", {"pretrained": tokenizer_folder}, limit=1, chat_template="off")
    assert loaded.problems[0].prompt == loaded.problems[0].question
    assert loaded.prompt["chat_template_applied_by"] == "nobody"


def test_prompts_get_one_bos(tokenizer_folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    bare = tokenizer("hi", add_special_tokens=False).input_ids
    calls: list[dict[str, bool]] = []

    class Spy:
        bos_token_id = tokenizer.bos_token_id
        eos_token_id = tokenizer.eos_token_id
        decode = staticmethod(tokenizer.decode)

        def __call__(self, text: str, **kwargs: bool) -> object:
            calls.append(kwargs)
            return tokenizer(text, **kwargs)

    encoded = encode_prompts(Spy(), ["hi", "<s>hi"])
    assert encoded == [bare, [tokenizer.bos_token_id, *bare]]
    assert calls == [{}, {"add_special_tokens": False}], "the tokenizer adds none where one stands"


def test_model_id_follows_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(10_000_000))
    before = model_id(str(folder), None)
    copy = tmp_path / "moved"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_id(str(copy), None) == before, "wherever it lies"
    found = {before}
    for position in (0, 9_999_999):
        changed = bytearray(10_000_000)
        changed[position] = 1
        weights.write_bytes(changed)
        found.add(model_id(str(folder), None))
    (folder / "config.json").write_text('{"a": 1}')
    found.add(model_id(str(folder), None))
    weights.write_bytes(b"short")
    found.add(model_id(str(folder), None))
    assert len(found) == 5
    assert model_id("some/model", None) == "some/model@main"
    assert model_id("some/model", "v2") == "some/model@v2"


def test_versions_and_hardware() -> None:
    assert "lm_eval" in versions()
    assert int(hardware()["cores"]) >= 1
