"""Records -> tokens with a completion mask.

Rules that training and sampling must share:

* The chat template is pinned once (`pin_chat_template`): a date inside it is a constant, so that
  the text depends neither on the day of tokenising nor on the day of serving. The pinned template
  is what the loader uses, and what belongs into the exported folder.
* Each turn is tokenised on its own, the prompt exactly as a server tokenises it, so no token spans
  the border between prompt and completion. Special tokens come from the template alone: never two
  BOS.
* The end-of-turn token is part of the completion and trained. Nothing after it in the turn is.
* Of conversations with step labels only the labels count, and right steps if asked for, see
  `step_labels`.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.step_labels import LABEL, RENDERED_AS, STEP, LastStep, labelled_turns

Layout = Literal["text", "prompt", "chat", "steps"]

#: Stands in Llama-3.2's own template as the date if no clock is available.
DEFAULT_DATE = "26 Jul 2024"
_PIN = "{#- thinkfast-distill: date pinned #}"
_DATE = re.compile(r"[A-Za-z0-9 .,/-]{1,40}")
# A call sets options on the shared Rust object before it encodes: two threads at once tokenise with
# each other's options or, with older tokenizers, fail ("Already borrowed").
_ONE_CALL = threading.Lock()


@dataclass(frozen=True)
class Tokenised:
    """One document."""

    tokens: NDArray[np.uint32]
    """(T,) token ids."""

    completion: NDArray[np.bool_]
    """(T,) what an assistant says, with its end-of-turn token; everything in raw text; of step
    labels the label alone."""


def pin_chat_template(template: str, date: str = DEFAULT_DATE) -> str:
    """Returns the template with every date fixed; a pinned one comes back unchanged.

    Args:
        template: Jinja source, as in ``tokenizer.chat_template``.
        date: the text that the template shows as today's date, for any format.

    Raises:
        DataError: the date has characters that are no part of a date.
    """
    if template.startswith(_PIN):
        return template
    if not _DATE.fullmatch(date):
        raise DataError(f"date {date!r}: give a date such as {DEFAULT_DATE!r}")
    macro = ""
    if "strftime_now" in template:
        macro = f"{{%- macro strftime_now(format) -%}}{date}{{%- endmacro -%}}"
    variable = f'{{%- set date_string = "{date}" -%}}' if "date_string" in template else ""
    # The dash of the last tag would eat white space at the template's start.
    return f"{_PIN}{macro}{variable}{{{{- '' }}}}{template}"


def read_chat_template(tokenizer: Any, file: str | Path | None) -> str | None:
    """The template from a file, else the tokenizer's own, else None.

    Raises:
        DataError: the file cannot be read or is empty; the tokenizer has several templates.
    """
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template: {file} cannot be read ({error})") from error
        if not text.strip():
            raise DataError(f"chat_template: {file} is empty")
        return text
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        raise DataError(
            f"the tokenizer has several chat templates ({', '.join(own)}); choose one with "
            "chat_template: FILE"
        )
    return own


@dataclass(frozen=True)
class RecordFormat:
    """Which fields of a record hold what."""

    layout: Layout = "text"
    """``text``: raw text; ``prompt``: a question and its answer, as two turns; ``chat``: a list of
    turns; ``steps``: a question and the labelled steps of a solution."""

    text_field: str = "text"
    """``text``: the field."""

    prompt_field: str = "problem"
    """``prompt``: the user's turn."""

    completion_field: str = "generated_solution"
    """``prompt``: the assistant's turn."""

    messages_field: str = "messages"
    """``chat``: the list; turns are {role, content}, or ShareGPT's {from, value}."""

    question_field: str = "question"
    """``steps``: the problem; empty: the steps are shown without one."""

    steps_field: str = "steps"
    """``steps``: list of texts."""

    labels_field: str = "labels"
    """``steps``: one label per step, true or false, or "+" or "-"."""

    last_step: LastStep = "any_wrong"
    """``steps``: where the conversation about a wrong solution ends."""

    learn_steps: bool = False
    """``steps``: whether the texts of right steps are targets too."""

    system: str | None = None
    """System turn put before every record without one; not for ``text``."""

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise DataError(
                f"layout: {self.layout!r} is not accepted; accepted: {', '.join(get_args(Layout))}"
            )

    @property
    def fields(self) -> list[str]:
        """The fields that are read."""
        return {
            "text": [self.text_field],
            "prompt": [self.prompt_field, self.completion_field],
            "chat": [self.messages_field],
            "steps": [self.question_field, self.steps_field, self.labels_field],
        }[self.layout]

    def texts(self, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The turns of a record, (role, content); for raw text one with the role ``text``.

        The turns about labelled steps have the roles of `step_labels.RENDERED_AS`.

        Raises:
            DataError: a field is missing, of the wrong type or empty; the caller adds the place.
        """
        if self.layout == "text":
            return [("text", string_field(record, self.text_field))]
        if self.layout == "prompt":
            turns = [
                ("user", string_field(record, self.prompt_field)),
                ("assistant", string_field(record, self.completion_field)),
            ]
        elif self.layout == "steps":
            turns = labelled_turns(
                string_field(record, self.question_field) if self.question_field else "",
                _field(record, self.steps_field),
                _field(record, self.labels_field),
                self.last_step,
                learn_steps=self.learn_steps,
            )
        else:
            turns = _turns(record, self.messages_field)
        if self.system is not None and turns[0][0] != "system":
            turns.insert(0, ("system", self.system))
        return turns


_ROLES = {"human": "user", "gpt": "assistant"}


def _join_steps(
    turns: Sequence[tuple[str, str]],
) -> tuple[list[tuple[str, str]], dict[int, str]]:
    """Turns of which each is one message, and the text of the step that counts in some of them."""
    joined: list[tuple[str, str]] = []
    steps: dict[int, str] = {}
    for role, content in turns:
        if role == STEP and joined and joined[-1][0] == "user":
            joined[-1] = (STEP, f"{joined[-1][1]} {content}")
        else:
            joined.append((role, content))
        if role == STEP:
            steps[len(joined) - 1] = content
    return joined, steps


def _field(record: Mapping[str, Any], field: str) -> Any:
    if field not in record:
        raise DataError(f"no field {field!r}; the fields are {', '.join(map(repr, record))}")
    return record[field]


def string_field(record: Mapping[str, Any], field: str) -> str:
    """The text in a field.

    Raises:
        DataError: the field is missing, no text, or empty.
    """
    value = _field(record, field)
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"field {field!r} is empty")
    return value


def _turns(record: Mapping[str, Any], field: str) -> list[tuple[str, str]]:
    value = _field(record, field)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"field {field!r} must be a list of turns, got {str(value)[:40]!r}")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise DataError(f"field {field!r}, turn {i}: need role and content, got {turn!r:.40}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"field {field!r}, turn {i}: need text in role and content (or from and value), "
                f"got {', '.join(map(repr, turn)) or 'nothing'}"
            )
        if role in RENDERED_AS:
            raise DataError(
                f"field {field!r}, turn {i}: role {role!r} is reserved for layout: steps"
            )
        turns.append((_ROLES.get(role, role), content))
    if all(role != "assistant" for role, _ in turns):
        raise DataError(f"field {field!r} has no turn of the assistant")
    return turns


class Formatter:
    """Turns records into tokens, with one tokenizer and one pinned template."""

    def __init__(
        self, tokenizer: Any, *, chat_template: str | None = None, date: str = DEFAULT_DATE
    ) -> None:
        """Fixes the template.

        Args:
            tokenizer: a Hugging Face tokenizer; it is not changed.
            chat_template: Jinja source; None for the tokenizer's own, which may be absent as long
                as only raw text is read.
            date: see `pin_chat_template`.

        Raises:
            DataError: the tokenizer has no end-of-sequence token.
        """
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise DataError(
                "the tokenizer has no eos_token: a model trained on its texts would never stop; "
                "set eos_token in tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
        template = chat_template or read_chat_template(tokenizer, None)
        self.chat_template = None if template is None else pin_chat_template(template, date)
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer: vocabulary, merges, BOS and EOS."""
        if self._fingerprint is None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is None:
                rules = str(sorted(self.tokenizer.get_vocab().items()))
            else:
                # A tokenizer stores the padding and truncation of its last call; not what it is.
                fields = json.loads(backend.to_str())
                fields.pop("padding", None)
                fields.pop("truncation", None)
                rules = json.dumps(fields, sort_keys=True)
            text = "\0".join([rules, str(self.bos), str(self.eos)])
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._fingerprint

    @property
    def template_fingerprint(self) -> str | None:
        """A hash of the pinned chat template."""
        if self.chat_template is None:
            return None
        return hashlib.sha256(self.chat_template.encode()).hexdigest()[:16]

    def tokenise(self, turns: Sequence[tuple[str, str]]) -> Tokenised:
        """Returns the tokens of a record.

        Args:
            turns: `RecordFormat.texts`.

        Raises:
            DataError: no template, or one that cannot be used turn by turn.
        """
        if turns[0][0] == "text":
            ids = self._encode(turns[0][1], is_raw=True)
            tokens = [*([] if self.bos is None else [self.bos]), *ids, self.eos]
            return _tokenised(tokens, [True] * len(tokens))
        return self._tokenise_chat(turns)

    def _tokenise_chat(self, turns: Sequence[tuple[str, str]]) -> Tokenised:
        turns, steps = _join_steps(turns)
        messages = [{"role": RENDERED_AS.get(r, r), "content": content} for r, content in turns]
        tokens: list[int] = []
        completion: list[bool] = []
        done = ""
        for i, (role, content) in enumerate(turns):
            if messages[i]["role"] != "assistant":
                continue
            prompt = self._render(messages[:i], ask=True)
            answered = self._render(messages[: i + 1], ask=False)
            if not prompt.startswith(done) or not answered.startswith(prompt):
                raise DataError(
                    f"the chat template changes earlier text when turn {i} is added, so the "
                    "assistant's tokens cannot be told apart; give another one with "
                    "chat_template: FILE"
                )
            ids, is_step = self._encode_prompt(prompt[len(done) :], steps.get(i - 1))
            tokens += ids
            completion += is_step
            ids = self._encode(answered[len(prompt) :])
            done = answered
            if role != "assistant":
                self._check_label(content, ids)
                tokens += ids
                completion += [role == LABEL and at == 0 for at in range(len(ids))]
                continue
            is_last = all(later != "assistant" for later, _ in turns[i + 1 :])
            if self.eos not in ids and is_last:
                ids.append(self.eos)
            end = max((at for at, token in enumerate(ids) if token == self.eos), default=len(ids))
            tokens += ids
            completion += [at <= end for at in range(len(ids))]
        if self.bos is not None and tokens[:2] == [self.bos] * 2:
            raise DataError("the chat template begins with two BOS tokens; remove one")
        return _tokenised(tokens, completion)

    def _encode_prompt(self, text: str, step: str | None) -> tuple[list[int], list[bool]]:
        """Ids of what comes before an answer, and which of them belong to the step that counts."""
        if step is None:
            ids = self._encode(text)
            return ids, [False] * len(ids)
        encoding = call_tokenizer(
            self.tokenizer,
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        first = text.rfind(step)  # templates may print turns trimmed, and steps are
        if first < 0:
            raise DataError(
                f"the chat template does not print the step {step[:40]!r} as it is, so its tokens "
                "cannot be told apart; give another one with chat_template: FILE"
            )
        inside = [
            end > first and start < first + len(step) for start, end in encoding["offset_mapping"]
        ]
        return list(encoding["input_ids"]), inside

    def _check_label(self, label: str, ids: list[int]) -> None:
        """A score is read at one position, so a label must be one token, first in its turn."""
        alone = self._encode(label)
        if len(alone) != 1 or ids[:1] != alone:
            raise DataError(
                f"the label {label!r} is not one token of its own in this tokenizer and chat "
                "template; step labels need a tokenizer and a template that keep it apart"
            )

    def _render(self, messages: list[dict[str, str]], *, ask: bool) -> str:
        if self.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template; give one with chat_template: FILE, or read "
                "the source with layout: text"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except Exception as error:  # Jinja raises its own classes and what the template raises
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"the chat template refuses the record: {reason}") from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str, *, is_raw: bool = False) -> list[int]:
        """Ids without added special tokens; in raw text, special tokens are ordinary characters."""
        ids = call_tokenizer(
            self.tokenizer,
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            **({"split_special_tokens": True} if is_raw else {}),
        )["input_ids"]
        return list(ids)


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with BOS, as it does when the model is served."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and call_tokenizer(tokenizer, "a")["input_ids"][:1] == [bos]


def call_tokenizer(tokenizer: Any, text: str, **options: Any) -> Any:
    """``tokenizer(text, ...)``, one thread after the other."""
    with _ONE_CALL:
        return tokenizer(text, **options)


def _tokenised(tokens: list[int], completion: list[bool]) -> Tokenised:
    return Tokenised(np.asarray(tokens, dtype=np.uint32), np.asarray(completion, dtype=np.bool_))
