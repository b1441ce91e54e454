"""Step labels as conversations: what a process reward model (PRM) learns from.

The protocol is RLHFlow's (https://github.com/RLHFlow/RLHF-Reward-Modeling, ``math-rm``): the user
gives a step, the assistant answers "+" or "-"; the first turn is the question, a space and the
first step. When such a model scores a solution, every answer before the scored one is shown as "+",
whatever its score was. Training shows the same, unlike the published data, in which a "-" stays in
the conversation and gives the labels after it away:

* a conversation ends at a wrong step, or at the last step of a right solution;
* all answers before its end are "+", and count as targets where that is the label.

So a conversation that ends after the first wrong step teaches that steps after a mistake are wrong,
with no sign of it in the answers.

With ``learn_steps`` the texts of right steps are targets too: a model that judges steps is then
also trained to make them, as generative verifiers are (arXiv 2408.15240).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from thinkfast_distill.data.errors import DataError

LastStep = Literal["first_wrong", "any_wrong"]
"""``first_wrong``: conversations about wrong solutions end there, as ProcessBench measures;
``any_wrong``: half of them do, the others at any later wrong step."""

GOOD, BAD = "+", "-"
LABEL, SHOWN, STEP = "label", "shown", "step"
"""Roles: an assistant's turn of which the content is a target, or only shown; a user's text that is
a target, appended with a space to the user's turn before it, if there is one."""

RENDERED_AS: Mapping[str, str] = {LABEL: "assistant", SHOWN: "assistant", STEP: "user"}
"""What the roles are for a chat template."""

_LABELS: Mapping[Any, bool] = {True: True, False: False, GOOD: True, BAD: False}


def labelled_turns(
    question: str,
    steps: Any,
    labels: Any,
    last_step: LastStep = "any_wrong",
    *,
    learn_steps: bool = False,
) -> list[tuple[str, str]]:
    """The conversation about one solution.

    Args:
        question: the problem; empty: the first turn is the first step.
        steps: texts of the steps.
        labels: for each step true or "+", false or "-".
        last_step: where the conversation about a wrong solution ends; the choice among several
            steps is a function of the texts.
        learn_steps: the texts of right steps are targets too.

    Returns:
        turns (role, content) with roles of `RENDERED_AS`, or ``user``.

    Raises:
        DataError: a step or label of another form, or not one label per step.
    """
    texts, is_right = _steps(steps), _labels(labels)
    if len(texts) != len(is_right):
        raise DataError(f"{len(texts)} steps have {len(is_right)} labels; need one label per step")
    end = _end(question, texts, is_right, last_step)
    turns: list[tuple[str, str]] = []
    for i, text in enumerate(texts[: end + 1]):
        if learn_steps and is_right[i]:
            turns += [*([("user", question.strip())] if i == 0 and question else []), (STEP, text)]
        else:
            turns.append(("user", f"{question.strip()} {text}".strip() if i == 0 else text))
        if i < end:
            turns.append((LABEL if is_right[i] else SHOWN, GOOD))
    turns.append((LABEL, GOOD if is_right[end] else BAD))
    return turns


def _end(question: str, texts: Sequence[str], is_right: Sequence[bool], last_step: LastStep) -> int:
    wrong = [i for i, right in enumerate(is_right) if not right]
    if not wrong:
        return len(texts) - 1
    if last_step == "first_wrong" or len(wrong) == 1:
        return wrong[0]
    digest = hashlib.blake2b("\0".join([question, *texts]).encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "big")
    return wrong[0] if draw % 2 else wrong[1 + draw // 2 % (len(wrong) - 1)]


def _steps(value: Any) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"steps: need a list of texts, got {value!r:.40}")
    for i, step in enumerate(value):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"steps: step {i} must be text that is not empty, got {step!r:.40}")
    return [step.strip() for step in value]


def _labels(value: Any) -> list[bool]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"labels: need a list, got {value!r:.40}")
    found = []
    for i, label in enumerate(value):
        # Numbers are refused: 0 is wrong in one data set and neutral in another (PRM800K).
        if not isinstance(label, bool | str) or label not in _LABELS:
            raise DataError(
                f'labels: label {i} is {label!r:.40}; accepted: true, false, "+", "-" (for '
                "PRM800K: false for a rating of -1)"
            )
        found.append(_LABELS[label])
    return found
