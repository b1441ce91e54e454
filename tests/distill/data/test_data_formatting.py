import threading
import time

import pytest

from thinkfast_distill.data.arith_tokenizer import build_tokenizer
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import (
    Formatter,
    RecordFormat,
    pin_chat_template,
    read_chat_template,
)
from thinkfast_distill.data.step_labels import labelled_turns
from thinkfast_distill.step_metrics import label_ids

# Behaves like Llama-3.2's: the date comes from the clock unless date_string is given.
LLAMA_LIKE = (
    "{{- bos_token }}{%- if not date_string is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}'
    "<|system|>Today Date: {{ date_string }}\n"
    "{%- for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QUESTION = [("user", "5+2?"), ("assistant", "7"), ("user", "7+1?"), ("assistant", "8")]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def _decode(tokenizer, tokenised, mask=None):
    ids = tokenised.tokens if mask is None else tokenised.tokens[mask]
    return tokenizer.decode([int(i) for i in ids])


def test_completion_mask_covers_answers_and_their_end(tokenizer):
    found = Formatter(tokenizer).tokenise(QUESTION)
    assert _decode(tokenizer, found) == (
        "<|bos|><|user|>5+2?<|assistant|>7<|eos|><|user|>7+1?<|assistant|>8<|eos|>"
    )
    assert _decode(tokenizer, found, found.completion) == "7<|eos|>8<|eos|>"
    assert found.tokens[-1] == tokenizer.eos_token_id
    assert found.completion[-1]
    assert list(found.tokens).count(tokenizer.bos_token_id) == 1


def test_prompt_tokens_are_those_of_a_server(tokenizer):
    """Also where a merge would join the prompt's last and the answer's first character."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = Formatter(tokenizer, chat_template=template).tokenise(
        [("user", "1"), ("assistant", "7 apples")]
    )
    prompt = tokenizer.encode("1", add_special_tokens=False)
    assert list(found.tokens[:1]) == prompt
    assert tokenizer.encode("17 apples", add_special_tokens=False)[0] != prompt[0]
    assert _decode(tokenizer, found, found.completion) == "7 apples<|eos|>"


def test_missing_end_of_turn_is_added_and_trained(tokenizer):
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    found = Formatter(tokenizer, chat_template=template).tokenise(QUESTION[:2])
    assert _decode(tokenizer, found) == "5+2? 7 <|eos|>"
    assert found.completion[-1]


def test_text_after_the_end_of_turn_is_no_target(tokenizer):
    """ChatML writes a line break after its end token, which no sampler ever produces."""
    chatml = "{% for m in messages %}{{ m['content'] }}{{ eos_token + '\n' }}{% endfor %}"
    found = Formatter(tokenizer, chat_template=chatml).tokenise(QUESTION)
    assert _decode(tokenizer, found).endswith("8<|eos|>\n")
    assert _decode(tokenizer, found, found.completion) == "7<|eos|>8<|eos|>"


def test_ends_with_a_user_turn(tokenizer):
    found = Formatter(tokenizer).tokenise(QUESTION[:3])
    assert _decode(tokenizer, found) == "<|bos|><|user|>5+2?<|assistant|>7<|eos|>"


def test_pinned_template_does_not_depend_on_the_day(tokenizer):
    """The pinned template is what the exported folder carries, so it must work on its own."""
    messages = [{"role": "user", "content": "q"}]

    def render(template):
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    assert "26 Jul 2024" not in render(LLAMA_LIKE)
    pinned = pin_chat_template(LLAMA_LIKE)
    assert "Today Date: 26 Jul 2024<" in render(pinned)
    assert render(pinned) == tokenizer.apply_chat_template(
        messages, chat_template=LLAMA_LIKE, tokenize=False, date_string="26 Jul 2024"
    )
    assert pin_chat_template(pinned, "1 Jan 2000") == pinned
    assert "Today Date: 1 Jan 2000" in render(pin_chat_template(LLAMA_LIKE, "1 Jan 2000"))
    clock_only = "{{ strftime_now('%Y') }} {{ messages[0]['content'] }}"
    assert render(pin_chat_template(clock_only)) == "26 Jul 2024 q"
    undated = " {{ messages[0]['content'] }}"
    assert render(pin_chat_template(undated)) == render(undated)


def test_pin_chat_template_refuses_code_in_the_date():
    with pytest.raises(DataError, match="give a date such as"):
        pin_chat_template(LLAMA_LIKE, '"}}{{ evil }}')


def test_raw_text_ends_with_eos_and_keeps_special_words_as_text(tokenizer):
    found = Formatter(tokenizer).tokenise([("text", "5 <|eos|> 6")])
    assert list(found.tokens).count(tokenizer.eos_token_id) == 1
    assert found.tokens[-1] == tokenizer.eos_token_id
    assert _decode(tokenizer, found) == "5 <|eos|> 6<|eos|>"
    assert found.completion.all()


def test_raw_text_has_one_bos_where_the_tokenizer_puts_one(tokenizer):
    from tokenizers.processors import TemplateProcessing

    with_bos = build_tokenizer()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", with_bos.bos_token_id)]
    )
    found = Formatter(with_bos).tokenise([("text", "5")])
    assert _decode(with_bos, found) == "<|bos|>5<|eos|>"
    chat = Formatter(with_bos).tokenise(QUESTION[:2])
    assert list(chat.tokens).count(with_bos.bos_token_id) == 1
    double = "<|bos|>" + str(with_bos.chat_template)
    with pytest.raises(DataError, match="two BOS tokens"):
        Formatter(with_bos, chat_template=double).tokenise(QUESTION[:2])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{{ messages[0]['content'] }}", "changes earlier text"),
        ("{{ raise_exception('no systems here') }}", "refuses the record: no systems here"),
        ("{% for %}", "refuses the record"),
    ],
)
def test_unusable_templates_are_reported(tokenizer, template, message):
    with pytest.raises(DataError, match=message):
        Formatter(tokenizer, chat_template=template).tokenise(QUESTION)


def test_tokenizer_without_eos_or_template_is_reported():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    formatter = Formatter(tokenizer)
    assert formatter.chat_template is None
    assert formatter.template_fingerprint is None
    with pytest.raises(DataError, match="has no chat template"):
        formatter.tokenise(QUESTION)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no eos_token"):
        Formatter(tokenizer)


def test_fingerprint_ignores_padding_but_not_the_vocabulary(tokenizer):
    other = build_tokenizer()
    other(["1", "2 3"], padding=True, truncation=True, max_length=4)
    assert Formatter(other).fingerprint == Formatter(tokenizer).fingerprint
    other.add_tokens(["newword"])
    assert Formatter(other).fingerprint != Formatter(tokenizer).fingerprint


def test_read_chat_template(tokenizer, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(LLAMA_LIKE)
    assert read_chat_template(tokenizer, file) == LLAMA_LIKE
    assert read_chat_template(tokenizer, None) == tokenizer.chat_template
    file.write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        read_chat_template(tokenizer, file)
    with pytest.raises(DataError, match="cannot be read"):
        read_chat_template(tokenizer, tmp_path / "none.jinja")
    several = build_tokenizer()
    several.chat_template = {"default": "a", "tools": "b"}
    with pytest.raises(DataError, match=r"several chat templates \(default, tools\)"):
        read_chat_template(several, None)


@pytest.mark.parametrize(
    ("fields", "record", "turns"),
    [
        ({}, {"text": "a b"}, [("text", "a b")]),
        (
            {"layout": "prompt"},
            {"problem": "p", "generated_solution": "s", "other": 1},
            [("user", "p"), ("assistant", "s")],
        ),
        (
            {"layout": "chat", "messages_field": "conversations", "system": "be brief"},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("system", "be brief"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"layout": "chat", "system": "unused"},
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "assistant", "content": ""},
                ]
            },
            [("system", "s"), ("assistant", "")],
        ),
    ],
)
def test_record_layouts(fields, record, turns):
    assert RecordFormat(**fields).texts(record) == turns


@pytest.mark.parametrize(
    ("fields", "record", "message"),
    [
        ({}, {"txt": "a"}, "no field 'text'; the fields are 'txt'"),
        ({}, {"text": 3}, "field 'text' must be text, got int"),
        ({}, {"text": " \n"}, "field 'text' is empty"),
        ({"layout": "prompt"}, {"problem": "p"}, "no field 'generated_solution'"),
        ({"layout": "chat"}, {"messages": "hi"}, "must be a list of turns"),
        ({"layout": "chat"}, {"messages": []}, "must be a list of turns"),
        ({"layout": "chat"}, {"messages": [{"role": "user"}]}, "turn 0: need text in role and"),
        ({"layout": "chat"}, {"messages": ["hi"]}, "turn 0: need role and content"),
        (
            {"layout": "chat"},
            {"messages": [{"role": "user", "content": "q"}]},
            "has no turn of the assistant",
        ),
    ],
)
def test_wrong_records_are_reported(fields, record, message):
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        RecordFormat(**fields).texts(record)


def test_unknown_layout_is_refused():
    with pytest.raises(DataError, match="accepted: text, prompt, chat"):
        RecordFormat(layout="alpaca")


class OneAtATime:
    """A tokenizer that, as a Rust one may, fails when two threads call it at once."""

    def __init__(self, tokenizer):
        self._tokenizer, self._is_busy = tokenizer, False

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **options):
        if self._is_busy:
            raise RuntimeError("Already borrowed")
        self._is_busy = True
        time.sleep(1e-3)
        self._is_busy = False
        return self._tokenizer(text, **options)


def test_threads_do_not_share_a_call(tokenizer):
    """The feed's thread and held-out data have one tokenizer, each with a formatter."""
    shared, failures = OneAtATime(tokenizer), []

    def work():
        try:
            for _ in range(10):
                formatter = Formatter(shared)
                formatter.tokenise([("text", "5+2")])
                formatter.tokenise(QUESTION)
                formatter.tokenise(labelled_turns("Now?", ["1+1=2"], [True]))
                label_ids(shared)
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
