r"""Split a sampled solution into the steps that a reward model scores.

The published models disagree on what a step is, and a split that finds nothing turns a process
reward model into an outcome model without a word. Hence the variants have names, every protocol
has the one of its publication as its default, and ``thinkfast-eval reward`` reports the mean number
of steps.

========== =====================================================================================
paragraph  ``"\n\n"`` between steps: RLHFlow's Deepseek data, Qwen2.5-Math-PRM, search-and-learn
line       one line, one step: Math-Shepherd's and RLHFlow's Mistral data, GSM8K, ``arith``
newline    as ``line``, but blank lines are steps of their own: Skywork-o1's ``prepare_input``,
           which does not drop the white space around a solution as all variants do here
step_tag   ``"ки\n"`` ends a step: texts that carry Math-Shepherd's tag, as RLHFlow's test sets do
========== =====================================================================================
"""

from typing import Literal, get_args

Split = Literal["paragraph", "line", "newline", "step_tag"]

SPLITS: tuple[Split, ...] = get_args(Split)

STEP_TAG = "ки"

_SEPARATOR: dict[Split, str] = {
    "paragraph": "\n\n",
    "line": "\n",
    "newline": "\n",
    "step_tag": f"{STEP_TAG}\n",
}


def split_steps(text: str, split: Split) -> list[str]:
    """Return the steps of a solution in order.

    White space around the solution belongs to no step. Except under ``newline``, white space around
    a step is dropped, and so are steps without text: a model that ends its answer with blank lines
    has not made one more step, and its last step is the one before them.

    Args:
        text: the sampled text.
        split: one of `SPLITS`.

    Returns:
        The steps; empty for a text without any.

    Raises:
        ValueError: no such split.
    """
    if split not in _SEPARATOR:
        raise ValueError(f"split {split!r} is not known; accepted: {', '.join(SPLITS)}")
    text = text.strip()
    if not text:
        return []
    pieces = text.split(_SEPARATOR[split])
    if split == "newline":
        return pieces
    return [piece for piece in map(str.strip, pieces) if piece]
