r"""The published protocols of process reward models, each one pure function of its tokenizer.

A protocol says which tokens the model reads, at which positions its output is read, and which
numbers there make the score of a step. All of them end in a probability with a log-odds, so the
score is ``sigmoid(good - bad)``:

================= ============================ ============================== =================
protocol          read at                      good, bad                      published in
================= ============================ ============================== =================
rlhflow-deepseek  token before each "+"        logits of "+", "-"             [1]
rlhflow-mistral   the same, lines as steps     the same                       [1]
math-shepherd     each "ки"                    logits of "+", "-"             [2]
qwen2.5-math-prm  each "<extra_0>"             labels 1, 0 of the head        [3]
skywork-o1        newline that ends each step  value of the head, 0           [4]
================= ============================ ============================== =================

[1] https://github.com/RLHFlow/RLHF-Reward-Modeling, math-rm/prm_evaluate.py and math-rm/README.md
(5b2a281); [2] the model card of peiyi9979/math-shepherd-mistral-7b-prm, arXiv 2312.08935; [3] the
model card of Qwen/Qwen2.5-Math-PRM-7B, arXiv 2501.07301; [4]
https://github.com/SkyworkAI/skywork-o1-prm-inference, ``prepare_input``.

The publications find the positions by counting from the end or by searching for a token id, which
goes wrong as soon as a sampled text contains that token or the chat template changes. Here the
place of every mark in the text is known from how the text is put together, and the tokenizer says
which token covers it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lm_eval_tasks.rewards.steps import STEP_TAG, Split

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class TokenPair:
    """Score = softmax over the language model head's logits of two tokens, probability of good."""

    good_id: int
    """Id of the token that means a right step."""
    bad_id: int
    """Id of the token that means a wrong step."""


@dataclass(frozen=True)
class TwoLabels:
    """Score = softmax over the two labels of a classification head, probability of label 1."""

    tag_id: int
    """Id of the token at which the head is read; vLLM's STEP pooler looks for it."""


@dataclass(frozen=True)
class SingleValue:
    """Score = sigmoid of the one output of a value head."""


Readout = TokenPair | TwoLabels | SingleValue


@dataclass(frozen=True)
class ScoringInput:
    """What a model gets for one solution and what is read from it."""

    token_ids: list[int]
    """The whole input, special tokens included."""
    positions: list[int]
    """Per step the index into ``token_ids`` whose output is read, ascending."""
    readout: Readout
    """How a score comes out of the output at a position."""


class StepProtocol(ABC):
    """A published protocol, bound to the tokenizer of its model."""

    name: ClassVar[str]
    default_split: ClassVar[Split]
    """The step split of the publication."""
    readout: Readout

    def __init__(self, tokenizer: Any) -> None:
        """Check the tokenizer and look up the ids.

        Args:
            tokenizer: a Hugging Face tokenizer of the fast kind, which knows character offsets.

        Raises:
            ValueError: the tokenizer lacks what the protocol needs.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{self.name}: {type(tokenizer).__name__} has no character offsets; need a fast "
                "tokenizer (tokenizer.json)"
            )
        self.tokenizer = tokenizer

    @abstractmethod
    def encode(self, question: str, steps: Sequence[str]) -> ScoringInput:
        """Return the model's input for one solution.

        Args:
            question: the problem's text without any prompt around it.
            steps: at least one, as `split_steps` gives them.

        Raises:
            ValueError: the tokenizer merges a mark with the text around it, so that there is no
                position at which the published score could be read.
        """

    def _single_id(self, text: str, owner: str) -> int:
        """Return the id of a text that must be exactly one token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"{self.name}: {text!r} is not a single token of this tokenizer (ids {ids}); it is "
                f"not the tokenizer of {owner}"
            )
        return int(ids[0])

    def _tokenise(
        self, text: str, marks: Sequence[tuple[int, int]], add_special_tokens: bool = False
    ) -> tuple[list[int], list[int]]:
        """Tokenise a text and find the one token that covers each mark.

        Args:
            text: the whole input as text.
            marks: per step the first and the past-the-last character of its mark, ascending.
            add_special_tokens: as the publication does it.

        Returns:
            Token ids, and per mark the index of its token.

        Raises:
            ValueError: a mark is spread over several tokens.
        """
        encoding = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
        offsets = encoding["offset_mapping"]
        indices: list[int] = []
        index = 0
        for start, end in marks:
            while index < len(offsets) and offsets[index][1] <= start:
                index += 1
            if index == len(offsets) or not offsets[index][0] <= start < end <= offsets[index][1]:
                raise ValueError(
                    f"{self.name}: the tokenizer splits the mark {text[start:end]!r} into several "
                    "tokens, so no single position stands for the step"
                )
            indices.append(index)
        return list(encoding["input_ids"]), indices


class _ChatProtocol(StepProtocol):
    """Renders with the tokenizer's own chat template."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise ValueError(
                f"{self.name}: the tokenizer has no chat template; the protocol is a conversation, "
                "so take the reward model's own tokenizer"
            )

    def _render(self, messages: Messages) -> str:
        # Templates of the Llama 3 family print the current day unless they are told one; this is
        # the day that Llama 3.1's template prints by itself.
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=False, date_string="26 Jul 2024"
            )
        except TemplateError as error:
            raise ValueError(
                f"{self.name}: the tokenizer's chat template refuses the conversation ({error}); "
                "take the reward model's own tokenizer"
            ) from error
        return text

    def _render_marked(self, messages: Messages, mark: str) -> tuple[str, list[tuple[int, int]]]:
        """Render with every occurrence of the placeholder in ``messages`` turned into ``mark``.

        Returns:
            The text as it is rendered with the mark itself, and where the marks are.

        Raises:
            ValueError: the template treats the mark unlike the placeholder.
        """
        pieces = self._render(messages).split(_PLACEHOLDER)
        text, marks = pieces[0], []
        for piece in pieces[1:]:
            marks.append((len(text), len(text) + len(mark)))
            text += mark + piece
        expected = sum(message["content"].count(_PLACEHOLDER) for message in messages)
        plain = [
            message | {"content": message["content"].replace(_PLACEHOLDER, mark)}
            for message in messages
        ]
        if len(marks) != expected or text != self._render(plain):
            raise ValueError(
                f"{self.name}: the chat template changes the content of the assistant's turns; "
                "the protocol needs a template that prints every turn as it is"
            )
        return text, marks


#: Stands for a mark while a template is rendered; a noncharacter, so no text contains it.
_PLACEHOLDER = "\ufdd0"


def _clean(text: str) -> str:
    return text.replace(_PLACEHOLDER, "\ufffd")


class RLHFlow(_ChatProtocol):
    """A conversation: the user gives a step, the assistant answers "+" or "-".

    The first turn is the question, a space and the first step; every assistant turn in the input is
    "+", whatever its score. The score of a step is the softmax over the logits of "+" and "-" at
    the token before that "+". The publication runs one forward pass per step over the conversation
    so far; in a causal model that equals one pass over the whole conversation, provided that the
    template prints a conversation's beginning alike however it goes on, which is checked.
    """

    name = "rlhflow-deepseek"
    default_split: ClassVar[Split] = "paragraph"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        one = self._conversation("1+1", ["2"])
        two = self._conversation("1+1", ["2", "3"])
        texts = {sign: self._render_marked(one, sign)[0] for sign in "+-"}
        beginning = self._render(one).split(_PLACEHOLDER)[0]
        if not self._render(two).startswith(beginning):
            raise ValueError(
                f"{self.name}: the chat template prints earlier turns differently once more turns "
                "follow; the protocol needs a template that only appends"
            )
        ids = {
            sign: self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for sign, text in texts.items()
        }
        differing = [
            (int(plus), int(minus))
            for plus, minus in zip(ids["+"], ids["-"], strict=False)
            if plus != minus
        ]
        if len(ids["+"]) != len(ids["-"]) or len(differing) != 1:
            raise ValueError(
                f"{self.name}: '+' and '-' are not single tokens of their own in an assistant's "
                "turn of this tokenizer; it is not the tokenizer of an RLHFlow reward model"
            )
        self.readout = TokenPair(*differing[0])

    def _conversation(self, question: str, steps: Sequence[str]) -> Messages:
        messages: Messages = []
        for number, step in enumerate(steps):
            content = f"{_clean(question)} {_clean(step)}" if number == 0 else _clean(step)
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": _PLACEHOLDER})
        return messages

    def encode(self, question: str, steps: Sequence[str]) -> ScoringInput:
        """See `StepProtocol.encode`."""
        text, marks = self._render_marked(self._conversation(question, steps), "+")
        token_ids, indices = self._tokenise(text, marks)
        assert isinstance(self.readout, TokenPair)
        for index in indices:
            if token_ids[index] != self.readout.good_id:
                raise ValueError(
                    f"{self.name}: '+' is token {token_ids[index]} in this conversation, not "
                    f"{self.readout.good_id}: the tokenizer merges it with the text around it"
                )
        return ScoringInput(token_ids, [index - 1 for index in indices], self.readout)


class RLHFlowMistral(RLHFlow):
    """RLHFlow's protocol for the model trained on Mistral data, in which each line is a step."""

    name = "rlhflow-mistral"
    default_split: ClassVar[Split] = "line"


class MathShepherd(StepProtocol):
    """Question, a space, and the steps, each followed by a space and the tag "ки".

    The score of a step is the softmax over the logits of "+" and "-" at its tag. The ids are those
    that the model card looks up: 648 and 387 for "+ -", 12902 for "ки".
    """

    name = "math-shepherd"
    default_split: ClassVar[Split] = "line"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        signs = tokenizer.encode("+ -", add_special_tokens=False)
        if len(signs) != 2 or signs[0] == signs[1]:
            raise ValueError(
                f"{self.name}: '+' and '-' are not single tokens of this tokenizer (ids {signs} "
                "for '+ -'); it is not the tokenizer of Math-Shepherd"
            )
        self.readout = TokenPair(int(signs[0]), int(signs[1]))
        self._tag_id = self._single_id(STEP_TAG, "Math-Shepherd")

    def encode(self, question: str, steps: Sequence[str]) -> ScoringInput:
        """See `StepProtocol.encode`."""
        text, marks = f"{question} ", []
        for number, step in enumerate(steps):
            text += f"{step} " if number == 0 else f"\n{step} "
            marks.append((len(text), len(text) + len(STEP_TAG)))
            text += STEP_TAG
        token_ids, positions = self._tokenise(text, marks, add_special_tokens=True)
        for position in positions:
            if token_ids[position] != self._tag_id:
                raise ValueError(
                    f"{self.name}: the tag is token {token_ids[position]} in this text, not "
                    f"{self._tag_id}: the tokenizer merges it with the text around it"
                )
        return ScoringInput(token_ids, positions, self.readout)


class Qwen25MathPRM(_ChatProtocol):
    r"""System prompt, question, and the steps joined and ended by the token "<extra_0>".

    The score of a step is the probability of label 1 of the two-label head at its "<extra_0>". The
    model card recommends ``"\n\n"`` between steps.
    """

    name = "qwen2.5-math-prm"
    default_split: ClassVar[Split] = "paragraph"
    system_prompt = "Please reason step by step, and put your final answer within \\boxed{}."
    tag = "<extra_0>"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.readout = TwoLabels(self._single_id(self.tag, "Qwen2.5-Math-PRM"))

    def encode(self, question: str, steps: Sequence[str]) -> ScoringInput:
        """See `StepProtocol.encode`."""
        messages = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": _clean(question)},
            {"role": "assistant", "content": "".join(_clean(s) + _PLACEHOLDER for s in steps)},
        ]
        text, marks = self._render_marked(messages, self.tag)
        token_ids, positions = self._tokenise(text, marks)
        return ScoringInput(token_ids, positions, self.readout)


class SkyworkO1(StepProtocol):
    """Start token, question, newline, and the steps, each followed by the newline token.

    The pieces are tokenised one by one, as published, so that nothing merges with the newline. The
    score of a step is the sigmoid of the value head at its newline.
    """

    name = "skywork-o1"
    default_split: ClassVar[Split] = "newline"
    readout = SingleValue()

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if not tokenizer.bos_token:
            raise ValueError(
                f"{self.name}: the tokenizer has no bos_token, with which the input begins; it is "
                "not the tokenizer of a Skywork-o1 reward model"
            )
        self._newline_id = int(tokenizer.encode("\n")[-1])

    def encode(self, question: str, steps: Sequence[str]) -> ScoringInput:
        """See `StepProtocol.encode`."""
        token_ids = list(self.tokenizer.encode(f"{self.tokenizer.bos_token}{question}\n"))
        positions = []
        for step in steps:
            if step:
                token_ids += self.tokenizer.encode(step)
            token_ids.append(self._newline_id)
            positions.append(len(token_ids) - 1)
        return ScoringInput(token_ids, positions, self.readout)


PROTOCOLS: dict[str, type[StepProtocol]] = {
    protocol.name: protocol
    for protocol in (RLHFlow, RLHFlowMistral, MathShepherd, Qwen25MathPRM, SkyworkO1)
}
