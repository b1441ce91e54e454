import pytest
from transformers import AutoTokenizer

from thinkfast_distill.data.arith import problem
from thinkfast_distill.data.arith_tokenizer import build_tokenizer, write_tokenizer
from thinkfast_distill.data.formatting import Formatter


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_numbers_and_words_are_single_tokens(tokenizer):
    assert len(tokenizer) <= 520
    for number in range(100):
        assert len(tokenizer.encode(str(number), add_special_tokens=False)) == 1
    one = problem("train", 0)
    for word in one.question.replace(".", "").replace("?", "").split()[1:]:
        if not word.isdigit():
            assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
    assert len(tokenizer.encode("#### 5", add_special_tokens=False)) == 3


@pytest.mark.parametrize("text", ["12 34", " x\n\ty", "né <|user> 漢字 1234", "17+7=24\n#### 24"])
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_distinct(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert ids == [0, 1, 2]
    assert len(set(tokenizer.all_special_ids)) == 6


def test_written_folder_is_read_back_equal_and_reproducible(tokenizer, tmp_path):
    write_tokenizer(tmp_path / "one")
    write_tokenizer(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    read = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert read.get_vocab() == tokenizer.get_vocab()
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (0, 1, 2)
    assert read.chat_template == tokenizer.chat_template
    text = problem("train", 1).question
    assert read.encode(text) == tokenizer.encode(text)
    assert Formatter(read).fingerprint == Formatter(tokenizer).fingerprint


def test_chat_template_of_a_conversation(tokenizer):
    turns = [("system", " s "), ("user", "17"), ("assistant", "18"), ("user", "19")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>s<|user|>17<|assistant|>18<|eos|><|user|>19<|assistant|>"
    )  # fmt: skip
