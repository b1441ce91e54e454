"""How well a process reward model finds wrong steps, on batches of labelled conversations.

The score of a step is the softmax over the logits of "+" and "-" at the position before its label;
a step is called wrong when "-" has the larger one. Besides the accuracies of single labels there is
ProcessBench's measure (arXiv 2412.06559): the part of wrong solutions whose first wrong
step is found exactly, the part of right solutions in which none is found, and F1, the harmonic mean
of the two. It needs conversations that end at the first wrong step (``last_step: first_wrong``).

Shapes: B rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from thinkfast_distill.data.formatting import call_tokenizer
from thinkfast_distill.data.step_labels import BAD, GOOD

if TYPE_CHECKING:
    from thinkfast_distill.batch import PackedBatch

PREFIX = "step_"
_KINDS = ("right", "wrong")
_WHATS = ("label", "solution")


def label_ids(tokenizer: Any) -> tuple[int, int]:
    """Token ids of "+" and "-"; the data's formatter has checked that each is one token."""
    good, bad = (
        call_tokenizer(tokenizer, label, add_special_tokens=False)["input_ids"]
        for label in (GOOD, BAD)
    )
    assert len(good) == len(bad) == 1
    return int(good[0]), int(bad[0])


def step_sums(
    hidden: torch.Tensor, head: torch.Tensor, batch: PackedBatch, good_id: int, bad_id: int
) -> dict[str, float]:
    """Counts of a batch, to be added over batches and ranks.

    Args:
        hidden: (B, L, D) of the model, after its final norm.
        head: (V, D).
        batch: conversations in which the targets are labels; one cut by the end of a row counts as
            two.
        good_id: id of "+".
        bad_id: id of "-".

    Returns:
        how many labels and solutions are right and wrong, and how many of each were found.
    """
    counts = batch.target_mask()
    difference = head[good_id].float() - head[bad_id].float()
    calls_right = (hidden[:, :-1].float() @ difference)[counts] > 0
    is_right = batch.input_ids[:, 1:][counts] == good_id
    is_found = calls_right == is_right
    # One number per document of the batch: the rows one after the other.
    rows = torch.arange(counts.shape[0], device=counts.device)[:, None]
    documents = (rows * batch.input_ids.shape[1] + batch.document_ids[:, 1:])[counts]
    _, document = torch.unique(documents, return_inverse=True)
    number = int(document.max()) + 1 if document.numel() else 0
    num_wrong = torch.zeros(number, device=counts.device).index_add_(
        0, document, (~is_right).float()
    )
    num_missed = torch.zeros_like(num_wrong).index_add_(0, document, (~is_found).float())
    found: dict[str, float] = {}
    for what, right, good in (
        ("label", is_right, is_found),
        ("solution", num_wrong == 0, num_missed == 0),
    ):
        for kind, chosen in zip(_KINDS, (right, ~right), strict=True):
            found[f"{what}_{kind}"] = float(chosen.sum())
            found[f"{what}_{kind}_found"] = float((chosen & good).sum())
    return found


def step_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums -> figures to log; a figure about labels or solutions that do not occur is left out.

    Returns:
        ``step_accuracy`` over all labels, ``step_recall_right`` and ``step_recall_wrong`` of single
        labels and their mean ``step_balanced_accuracy``; ``step_no_error_found`` of right
        solutions, ``step_first_error_found`` of wrong ones and ``step_f1``.
    """
    ratios = {
        f"{what}_{kind}": sums[f"{what}_{kind}_found"] / sums[f"{what}_{kind}"]
        for what in _WHATS
        for kind in _KINDS
        if sums[f"{what}_{kind}"]
    }
    figures: dict[str, float] = {}
    number = sums["label_right"] + sums["label_wrong"]
    if number:
        figures["step_accuracy"] = (sums["label_right_found"] + sums["label_wrong_found"]) / number
    for key, name in (
        ("label_right", "step_recall_right"),
        ("label_wrong", "step_recall_wrong"),
        ("solution_right", "step_no_error_found"),
        ("solution_wrong", "step_first_error_found"),
    ):
        if key in ratios:
            figures[name] = ratios[key]
    if "label_right" in ratios and "label_wrong" in ratios:
        figures["step_balanced_accuracy"] = (ratios["label_right"] + ratios["label_wrong"]) / 2
    if "solution_right" in ratios and "solution_wrong" in ratios:
        one, other = ratios["solution_right"], ratios["solution_wrong"]
        figures["step_f1"] = 2 * one * other / (one + other) if one + other else 0.0
    return figures
