"""Step labels as conversations: where they end, what counts, and that scoring reads the same."""

import json
import re

import pytest

from thinkfast_distill.data import arith
from thinkfast_distill.data.arith_tokenizer import build_tokenizer
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import Formatter, RecordFormat
from thinkfast_distill.data.loader import Loader
from thinkfast_distill.data.source_config import source_config
from thinkfast_distill.data.sources import open_source, read_in_order
from thinkfast_distill.data.step_labels import LABEL, SHOWN, STEP, labelled_turns

STEPS = ["a=1", "b=2", "c=3", "d=4"]
TWO_WRONG = {"question": "Now?", "steps": ["7+1=8", "8+1=8", "8+1=9"], "labels": "++-"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def formatter(tokenizer):
    return Formatter(tokenizer)


def _targets(tokenizer, found):
    return tokenizer.decode([int(i) for i in found.tokens[found.completion]])


def test_right_solution_ends_at_its_last_step():
    turns = labelled_turns("Now?", STEPS, [True] * 4)
    assert [role for role, _ in turns] == ["user", LABEL] * 4
    assert [text for _, text in turns[::2]] == ["Now? a=1", "b=2", "c=3", "d=4"]
    assert [text for _, text in turns[1::2]] == ["+"] * 4


def test_wrong_solution_shows_no_minus_before_its_end():
    """A model is shown only "+" when it scores, so an earlier "-" must not give the answer away."""
    labels = ["+", "-", "-", "-"]
    ends = set()
    for number in range(40):
        turns = labelled_turns(f"Now {number}?", STEPS, labels)
        assert turns == labelled_turns(f"Now {number}?", STEPS, labels)
        assert [text for _, text in turns[1::2]] == ["+"] * (len(turns) // 2 - 1) + ["-"]
        assert [role for role, _ in turns[1::2]][:2] in ([LABEL, LABEL], [LABEL, SHOWN])
        assert turns[-1] == (LABEL, "-")
        ends.add(len(turns) // 2)
    assert ends == {2, 3, 4}
    assert len(labelled_turns("Now?", STEPS, labels, "first_wrong")) == 4


def test_right_step_after_a_wrong_one_counts():
    """Some data sets label every step by itself."""
    turns = labelled_turns("Now?", STEPS, [False, True, False, True], "any_wrong")
    if len(turns) == 6:
        assert [role for role, _ in turns[1::2]] == [SHOWN, LABEL, LABEL]
    several = (labelled_turns(f"{n}?", STEPS, [False, True, False, True]) for n in range(20))
    assert {len(turns) for turns in several} == {2, 6}


def test_learn_steps_counts_right_steps(formatter, tokenizer):
    labels = [True, True, False, False]
    turns = labelled_turns("Now?", STEPS, labels, "first_wrong", learn_steps=True)
    assert [role for role, _ in turns] == ["user", STEP, LABEL, STEP, LABEL, "user", LABEL]
    found = formatter.tokenise(turns)
    plain = formatter.tokenise(labelled_turns("Now?", STEPS, labels, "first_wrong"))
    assert found.tokens.tolist() == plain.tokens.tolist()
    assert _targets(tokenizer, found) == " a=1+b=2+-"
    assert _targets(tokenizer, plain) == "++-"


def test_record_format(formatter, tokenizer):
    record_format = RecordFormat(layout="steps", last_step="first_wrong")
    record = {**TWO_WRONG, "labels": ["+", "-", "-"]}
    found = formatter.tokenise(record_format.texts(record))
    assert tokenizer.decode([int(i) for i in found.tokens]) == (
        "<|bos|><|user|>Now? 7+1=8<|assistant|>+<|eos|><|user|>8+1=8<|assistant|>-<|eos|>"
    )
    assert _targets(tokenizer, found) == "+-"
    assert record_format.fields == ["question", "steps", "labels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, "3 steps have 1 labels"),
        ({"labels": [1, 0, -1]}, "label 0 is 1; accepted: true, false"),
        ({"labels": "++-"}, "labels: need a list"),
        ({"steps": "a\nb"}, "steps: need a list of texts"),
        ({"steps": []}, "steps: need a list of texts"),
        ({"steps": ["a", " ", "c"]}, "step 1 must be text that is not empty"),
        ({"question": ""}, "'question' is empty"),
    ],
)
def test_bad_records_are_named_by_line(tmp_path, formatter, change, message):
    good = {"question": "Now?", "steps": ["a", "b", "c"], "labels": [True, True, False]}
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, **change})))
    config = source_config({"kind": "jsonl", "path": str(path), "layout": "steps"})
    with pytest.raises(DataError, match=f"steps.jsonl:2: .*{message}"):
        list(read_in_order(config, formatter))


def test_label_must_be_a_token_of_its_own(tokenizer):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    with pytest.raises(DataError, match="label '\\+' is not one token of its own"):
        Formatter(tokenizer, chat_template=template).tokenise(labelled_turns("Now?", ["a"], [True]))


def test_template_that_changes_steps_is_named(tokenizer):
    template = str(tokenizer.chat_template).replace("['content']", "['content'] | upper")
    assert template != tokenizer.chat_template
    with pytest.raises(DataError, match=r"template does not print the step 'a=1' as it is"):
        Formatter(tokenizer, chat_template=template).tokenise(
            labelled_turns("Now?", ["a=1"], [True], learn_steps=True)
        )


def test_roles_of_steps_are_refused_in_chats():
    chat = RecordFormat(layout="chat")
    with pytest.raises(DataError, match="role 'shown' is reserved"):
        chat.texts({"messages": [{"role": "shown", "content": "+"}]})


def test_only_labels_are_targets_of_a_batch(tokenizer):
    """Also in a mixture that counts every token, as it does by default."""
    sources = [{"kind": "arith", "mistakes": 0.5}]
    batch = Loader(sources, tokenizer, 256, 4, seed=1).next()
    targets = batch.input_ids[:, 1:][batch.target_mask()]
    assert {tokenizer.decode([int(i)]) for i in targets} == {"+", "-"}
    with pytest.raises(DataError, match="loss_on: 'all' is not accepted with step labels"):
        source_config({**sources[0], "loss_on": "all"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mistakes": 1.5}, "mistakes: 1.5 must lie between 0 and 1"),
        ({"mistakes": 0.5, "samples": "x.jsonl"}, "give mistakes or samples, not both"),
        ({"mistakes": 0.5, "last_step": "last"}, "accepted: first_wrong, any_wrong"),
        ({"mistake": "slip"}, "mistake: give mistakes too"),
        ({"mistakes": 0.5, "mistake": "typo"}, "accepted: .*slip"),
        ({"single_steps": 9}, "single_steps: give mistakes too"),
        ({"mistakes": 0.5, "single_steps": 0}, "single_steps: 0 must be >= 1"),
        ({"mistakes": 0.5, "single_steps": 9, "mistake": "slip"}, "leave out mistake"),
    ],
)
def test_arith_options(change, message):
    with pytest.raises(DataError, match=message):
        source_config({"kind": "arith", **change})


def _solutions(formatter, num, **options):
    config = source_config({"kind": "arith", "num": num, **options})
    documents = read_in_order(config, formatter)
    return [formatter.tokenizer.decode([int(i) for i in d.tokenised.tokens]) for d in documents]


def test_arith_mistakes_are_in_proportion_and_repeatable(formatter):
    found = _solutions(formatter, 200, mistakes=0.3)
    wrong = sum("<|assistant|>-" in text for text in found)
    assert 40 <= wrong <= 80
    assert found[:20] == _solutions(formatter, 20, mistakes=0.3)
    assert found[:20] != _solutions(formatter, 20, mistakes=0.3, problem_seed=1)
    assert not any("<|assistant|>-" in t for t in _solutions(formatter, 20, mistakes=0.0))
    assert all("<|assistant|>-" in t for t in _solutions(formatter, 20, mistakes=1.0))


def test_arith_single_steps(formatter):
    """Without the problem; wrong ones differ in the result only, by anything from 1 to 100."""
    texts = _solutions(formatter, 300, mistakes=0.5, single_steps=100)
    distances = []
    for text in texts:
        found = re.search(
            r"\|>(\w+): (\d+)([-+*/])(\d+)=(\d+)<\|assistant\|>([-+])<\|end\|>$",
            text.replace(formatter.tokenizer.eos_token, "<|end|>"),
        )
        assert found, text
        right = arith.compute(int(found[2]), found[3], int(found[4]))
        assert (right == int(found[5])) == (found[6] == "+")
        if found[6] == "-":
            distances.append(abs(right - int(found[5])))
    assert 110 <= len(distances) <= 190
    assert min(distances) == 1
    assert max(distances) > 40
    assert sum(by <= 2 for by in distances) > len(distances) / 8


def test_arith_one_kind_of_mistake(formatter):
    """A slip changes only the result of the step where the conversation ends."""
    options = {"mistakes": 1.0, "mistake": "slip", "last_step": "first_wrong"}
    for index, text in enumerate(_solutions(formatter, 20, **options)):
        shown = re.findall(r"\w+: (\d+)([-+*/])(\d+)=(\d+)", text)[-1]
        place = text.count("<|assistant|>") - 1
        gold = re.match(
            r"\w+: (\d+)([-+*/])(\d+)=(\d+)", arith.problem("train", index).steps[place]
        ).groups()
        assert shown[:3] == gold[:3]
        assert shown[3] != gold[3]


def test_arith_splits_share_no_question(formatter):
    def questions(split):
        texts = _solutions(formatter, 100, mistakes=0.5, split=split)
        return {text.split("? ")[0] for text in texts}

    assert not questions("train") & questions("validation")


def _sample_row(index=0, split="train", sample=None):
    one = arith.problem(split, index)
    return {"question": one.question, "answer": one.solution, "sample": sample or one.solution}


def _samples(tmp_path, *rows):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "arith", "samples": str(path), "last_step": "first_wrong"}


def test_samples_get_labels(tmp_path, formatter, tokenizer):
    lines = arith.problem("train", 1).steps
    broken = "\n\n".join([lines[0], "I do not know", *lines[2:]]) + "\n"
    config = source_config(_samples(tmp_path, _sample_row(0), _sample_row(1, sample=broken)))
    right, wrong = read_in_order(config, formatter)
    number = len(arith.problem("train", 0).steps)
    assert _targets(tokenizer, right.tokenised) == "+" * number
    assert _targets(tokenizer, wrong.tokenised) == "+-"
    assert config.label == "samples"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_sample_row(3, "test"), "belongs to the split test, the source reads train"),
        ({"question": "Now?", "answer": "forty", "sample": "40"}, "not a solution of this"),
        ({"question": "Now?", "answer": "#### 40", "sample": "40"}, "has no step"),
        ({"question": "Now?", "answer": "#### 40"}, "no field 'sample'"),
    ],
)
def test_samples_that_cannot_be_labelled(tmp_path, formatter, row, message):
    config = source_config(_samples(tmp_path, row))
    with pytest.raises(DataError, match=f"samples.jsonl:1: .*{message}"):
        open_source(config, formatter, seed=0)


def test_training_and_scoring_read_the_same_tokens(formatter, tokenizer):
    """The evaluation's protocol predicts at the positions that training counts."""
    protocols = pytest.importorskip("lm_eval_tasks.rewards.protocols")
    one = arith.problem("train", 0)
    found = formatter.tokenise(labelled_turns(one.question, one.steps, [True] * len(one.steps)))
    scoring = protocols.RLHFlowMistral(tokenizer).encode(one.question, one.steps)
    assert scoring.token_ids == found.tokens.tolist()
    assert scoring.positions == [int(at) - 1 for at in found.completion.nonzero()[0]]
