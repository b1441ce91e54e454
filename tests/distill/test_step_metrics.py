"""Metrics of a process reward model against counting by hand."""

import pytest
import torch

from tests.distill.stages import models
from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.data.arith_tokenizer import build_tokenizer
from thinkfast_distill.data.loader import Loader
from thinkfast_distill.step_metrics import label_ids, step_figures, step_sums

GOOD, BAD, TEXT = 1, 2, 0


def _batch(*rows):
    """Rows of documents; a document is the labels it has, each after a token of text."""
    length = max(sum(2 * len(labels) for labels in row) for row in rows) + 1
    shape = (len(rows), length)
    ids = torch.full(shape, TEXT)
    documents = torch.full(shape, -1, dtype=torch.int32)
    loss = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = 0
        for d, labels in enumerate(row):
            for label in labels:
                documents[b, at : at + 2] = d
                ids[b, at + 1] = GOOD if label == "+" else BAD
                loss[b, at + 1] = True
                at += 2
    return PackedBatch(ids, torch.zeros(shape, dtype=torch.int64), documents, loss)


def _hidden(batch, *rows):
    """Hidden states of a model that says these things; width 1, "+" is positive."""
    hidden = torch.zeros(*batch.input_ids.shape, 1)
    for b, said in enumerate(rows):
        for n, label in enumerate(said.replace(" ", "")):
            hidden[b, 2 * n, 0] = 1.0 if label == "+" else -1.0
    return hidden


HEAD = torch.tensor([[0.0], [0.5], [-0.5]])


def test_sums_and_figures():
    batch = _batch(["+++", "+-", "-"], ["++-", "++"])
    said = _hidden(batch, "+++ -- -", "+++ +-")
    figures = step_figures(step_sums(said, HEAD, batch, GOOD, BAD))
    # Labels: 8 right, of which 6 found; 3 wrong, of which 2 found.
    assert figures["step_accuracy"] == pytest.approx(8 / 11)
    assert figures["step_recall_right"] == pytest.approx(6 / 8)
    assert figures["step_recall_wrong"] == pytest.approx(2 / 3)
    assert figures["step_balanced_accuracy"] == pytest.approx((6 / 8 + 2 / 3) / 2)
    # Solutions: of "+++" and "++" one without a false alarm; of three wrong ones only "-" is found.
    assert figures["step_no_error_found"] == 1 / 2
    assert figures["step_first_error_found"] == pytest.approx(1 / 3)
    assert figures["step_f1"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


def test_figures_of_what_does_not_occur_are_left_out():
    batch = _batch(["++"])
    figures = step_figures(step_sums(_hidden(batch, "+-"), HEAD, batch, GOOD, BAD))
    assert figures == {
        "step_accuracy": 0.5,
        "step_recall_right": 0.5,
        "step_no_error_found": 0.0,
    }
    empty = _batch([""])
    assert step_figures(step_sums(_hidden(empty, ""), HEAD, empty, GOOD, BAD)) == {}


def test_sums_add_up():
    """Over micro-batches and ranks."""
    batch = _batch(["+++", "+-"], ["++-", "++"])
    hidden = _hidden(batch, "+-+ +-", "++- ++")
    whole = step_sums(hidden, HEAD, batch, GOOD, BAD)
    first, second = batch.split(2)
    parts = (step_sums(hidden[i : i + 1], HEAD, p, GOOD, BAD) for i, p in ((0, first), (1, second)))
    one, other = parts
    assert whole == {key: one[key] + other[key] for key in one}


def test_ids_are_those_of_the_data():
    """What the loader writes as labels is what the metrics look for."""
    tokenizer = build_tokenizer()
    good, bad = label_ids(tokenizer)
    sources = [{"kind": "arith", "mistakes": 0.6, "last_step": "first_wrong"}]
    batch = Loader(sources, tokenizer, 256, 4, seed=1).next()
    hidden = torch.zeros(*batch.input_ids.shape, 1)
    hidden[:, :-1, 0] = torch.where(batch.input_ids[:, 1:] == good, 1.0, -1.0)
    head = torch.zeros(len(tokenizer), 1)
    head[good], head[bad] = 1.0, -1.0
    figures = step_figures(step_sums(hidden, head, batch, good, bad))
    assert figures["step_f1"] == figures["step_balanced_accuracy"] == 1.0
    figures = step_figures(step_sums(-hidden, head, batch, good, bad))
    assert figures["step_f1"] == figures["step_balanced_accuracy"] == 0.0


def test_document_numbers_do_not_run_together():
    """The last document of a row and the first of the next are two solutions."""
    batch = models.batch(lengths=((5,), (5,)), padding=0)
    batch = PackedBatch(
        torch.full_like(batch.input_ids, GOOD),
        batch.position_ids,
        batch.document_ids,
        torch.ones_like(batch.loss_mask),
    )
    sums = step_sums(torch.ones(*batch.input_ids.shape, 1), HEAD, batch, GOOD, BAD)
    assert sums["solution_right"] == sums["solution_right_found"] == 2
