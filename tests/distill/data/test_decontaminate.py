import json

import pytest

from thinkfast_distill.data.decontaminate import Decontaminator, words
from thinkfast_distill.data.errors import DataError

LONG = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether?"
)
SHORT = "What is $2^{10}$?"
MIDDLE = "How many primes lie between one and nine hundred?"  # 9 words


@pytest.fixture
def known():
    return Decontaminator([LONG, SHORT, MIDDLE])


def test_words_ignore_case_punctuation_and_latex_spacing():
    one = words("Find  $\\left(\\dfrac{1}{2}\\right)\\!$, \\quad then ADD 1,000.")
    assert one == words("find ( \\frac 1 2 ) then add 1,000")
    assert one == ["find", "frac", "1", "2", "then", "add", "1,000"]
    assert words("x = 12") != words("x = 13"), "numbers count"


@pytest.mark.parametrize(
    ("texts", "finding"),
    [
        ([LONG, "48/2=24"], "exact"),
        ([LONG.upper().replace(",", " ")], "exact"),
        (["user", "what is 2^10"], "exact"),
        (["Before. " + LONG + " And after."], "ngram"),
        ([" ".join(LONG.split()[5:18])], "ngram"),
        ([" ".join(LONG.split()[5:17])], None),  # 12 words
        (["Tell me: " + MIDDLE], "ngram"),
        (["A page that says what is 2^10 in passing"], None),
        (["Natalia bought clips."], None),
        ([" ".join(LONG.split()[:12]), " ".join(LONG.split()[12:])], "ngram"),
    ],
)
def test_find(known, texts, finding):
    assert known.find(texts) == finding


def test_fingerprint_is_that_of_the_set(known):
    assert known.num_problems == 3
    assert known.fingerprint == Decontaminator([MIDDLE, SHORT.upper(), LONG, LONG]).fingerprint
    assert known.fingerprint != Decontaminator([MIDDLE, SHORT]).fingerprint


def test_from_files_reads_the_usual_benchmarks(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": LONG, "answer": "72"}) + "\n\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"problem": SHORT}) + "\n")
    found = Decontaminator.from_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert found.fingerprint == Decontaminator([LONG, SHORT]).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "p"}\n{oops\n', r":2: not JSON"),
        ('{"problem": "p"}\n{"answer": "1"}\n', r":2: need an object with a text field"),
        ("[1]\n", r":1: need an object"),
        ("\n", "has no problems"),
        ('{"problem": "?!"}\n', "no evaluation problem with any word"),
    ],
)
def test_wrong_files_are_reported(tmp_path, content, message):
    file = tmp_path / "eval.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        Decontaminator.from_files([file])
    with pytest.raises(DataError, match="cannot be read"):
        Decontaminator.from_files([tmp_path / "none.jsonl"])
