"""The checkpoint's chat template is applied when lm-eval was not told to."""

from pathlib import Path
from typing import Any

import pytest
from scripted_lm import GSM8K_ROWS, ScriptedLM, evaluate, write_jsonl
from tiny_checkpoint import build_tokenizer

PROMPT = (
    GSM8K_ROWS[0]["question"]
    + "\n\nLet's think step by step and output the final answer within \\boxed{}."
)


@pytest.fixture(scope="module")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("instruct")
    build_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def without_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    build_tokenizer(folder, chat_template=None)
    return str(folder)


def _first_prompt(tmp_path: Path, metadata: dict[str, Any], **kwargs: Any) -> tuple[str, str]:
    data = write_jsonl(tmp_path / "rows.jsonl", GSM8K_ROWS)
    lm = ScriptedLM(lambda prompt, j: f"{j}")
    options = {"num_samples": 2, "data_file": str(data)} | metadata
    results = evaluate(lm, "gsm8k_passk", options, limit=1, **kwargs)
    recorded = results["configs"]["gsm8k_passk"]["metadata"]["chat_template_applied_by"]
    return lm.calls[0][0].args[0], recorded


def test_instruct_checkpoint(
    tmp_path: Path, with_template: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, by = _first_prompt(tmp_path, {"pretrained": with_template})
    assert prompt == f"<|user|>{PROMPT}\n<|assistant|>"
    assert by == "task"
    assert "chat_template=off samples the bare prompt" in caplog.text


def test_system_instruction_becomes_the_system_turn(tmp_path: Path, with_template: str) -> None:
    prompt, _ = _first_prompt(
        tmp_path, {"pretrained": with_template}, system_instruction="Be brief."
    )
    assert prompt == f"<|system|>Be brief.\n<|user|>{PROMPT}\n<|assistant|>"


def test_tokenizer_argument_comes_first(
    tmp_path: Path, with_template: str, without_template: str
) -> None:
    models = {"pretrained": with_template, "tokenizer": without_template}
    assert _first_prompt(tmp_path, models) == (PROMPT, "nobody")


def test_switched_off_base_and_unknown_checkpoints(
    tmp_path: Path, with_template: str, without_template: str
) -> None:
    for metadata in (
        {"pretrained": with_template, "chat_template": "off"},
        {"pretrained": without_template},
        {},
    ):
        assert _first_prompt(tmp_path, metadata) == (PROMPT, "nobody")


def test_lm_evals_own_template_is_not_applied_twice(tmp_path: Path, with_template: str) -> None:
    prompt, by = _first_prompt(tmp_path, {"pretrained": with_template}, apply_chat_template=True)
    assert prompt == f"<user>{PROMPT}<bot>"
    assert by == "lm-eval"


def test_checkpoint_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the tokenizer.*--metadata chat_template="):
        _first_prompt(tmp_path, {"pretrained": str(tmp_path)})
    prompt, _ = _first_prompt(tmp_path, {"pretrained": str(tmp_path), "chat_template": "off"})
    assert prompt == PROMPT
