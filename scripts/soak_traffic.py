"""The traffic of ``scripts/soak.py``: request number i of a seed, and the probes.

Requests are dealt from a deck that holds every kind; a shuffled deck follows the other. Nothing
here depends on time or on answers, so a seed gives the same requests in the same order every time.
"""

import json
import math
import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MODEL = "soak"
"""Name under which the model is served."""
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS, MAX_N = 4000, 256, 32
MAX_MODEL_LEN = 4352
"""Tokens: the longest prompt, the longest answer, and what a chat template adds."""
TEMPERATURE = 0.7
NUM_SHARED_PROMPTS, MAX_CONTINUATION = 6, 50
MAX_WORDS = 800
"""Of a chat message: at most about 4 tokens each in the embedded models' tokenizer."""

ANSWERED, REFUSED, ABORTED = "answered", "refused", "aborted"
"""What is to happen: a complete answer; a status 400 to 499; the client leaves before the end."""

_WORDS = (
    "What",
    "is",
    "the",
    "sum",
    "Anna",
    "has",
    "apples",
    "books",
    "3",
    "12",
    "25",
    "*",
    "+",
    "?",
)
_JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "enum": [1, 2, 3]}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_REGEX = "[0-9]{3}-[a-c]{2}"
_CHOICES = ["yes", "no"]

Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One request, and what is to happen with it."""

    kind: str
    path: str
    expect: str
    """ANSWERED, REFUSED or ABORTED."""
    payload: Json = field(default_factory=dict)
    """The body as JSON, unless ``body`` or ``raw`` is given."""
    method: str = "POST"
    body: bytes | None = None
    """Sent as it is, with the content type of JSON."""
    raw: bytes | None = None
    """Sent instead of a HTTP request. ABORTED: the connection is closed after it."""
    abort_after_s: float | None = None
    abort_after_pieces: int | None = None
    """Of an ABORTED request: when the client leaves; pieces are events of a stream."""
    pause_s: float = 0.0
    """How long the client waits before it."""

    @property
    def content(self) -> bytes:
        """The body."""
        return self.body if self.body is not None else json.dumps(self.payload).encode()


class Traffic:
    """The requests of a seed."""

    def __init__(
        self, seed: int, vocab_size: int, special_ids: Collection[int], partial_ids: Collection[int]
    ) -> None:
        """Prompts are of token ids below ``vocab_size``.

        Args:
            seed: of everything.
            vocab_size: of the model.
            special_ids: are in no prompt.
            partial_ids: tokens of a part of a character; no prompt ends with one. vLLM 0.32 then
                repeats the prompt in the text (https://github.com/vllm-project/vllm/issues/48853).
        """
        self.seed = seed
        self.vocab_size = vocab_size
        self._ids = sorted(set(range(vocab_size)) - set(special_ids))
        self._last_ids = sorted(set(self._ids) - set(partial_ids))
        rng = random.Random(f"{seed} prompts")
        longest = MAX_PROMPT_TOKENS - MAX_CONTINUATION
        self._shared = [self.prompt(rng, longest) for _ in range(NUM_SHARED_PROMPTS)]

    def request(self, index: int) -> Request:
        """Request number ``index`` (0 first)."""
        deck_number, card = divmod(index, len(_DECK))
        deck = list(_DECK)
        random.Random(f"{self.seed} deck {deck_number}").shuffle(deck)
        kind = deck[card]
        rng = random.Random(f"{self.seed} request {index}")
        # Mostly none, so that the server is full; now and then it can run empty.
        pause_s = rng.uniform(0, 3) if rng.random() < 0.1 else 0.0
        if kind in MALFORMED:
            return _malformed(self, kind, rng, pause_s)
        payload, path, abort = KINDS[kind](self, rng)
        common: Json = {"model": MODEL, "return_token_ids": True}
        if payload.get("stream"):
            common["stream_options"] = {"include_usage": True}
        expect = ABORTED if abort else ANSWERED
        return Request(kind, path, expect, common | payload, pause_s=pause_s, **abort)

    def prompt(self, rng: random.Random, longest: int = MAX_PROMPT_TOKENS) -> list[int]:
        """Random token ids; the length is log-uniform from 1 to ``longest``."""
        return self.ids(rng, log_uniform(rng, 1, longest))

    def ids(self, rng: random.Random, length: int) -> list[int]:
        """``length`` random token ids; the last is a whole character or more."""
        return [*rng.choices(self._ids, k=length - 1), rng.choice(self._last_ids)]

    def shared_prompt(self, rng: random.Random) -> list[int]:
        """A prompt that other requests have too, or a continuation of it."""
        prompt = rng.choice(self._shared)
        if rng.random() < 0.3:
            return prompt + self.ids(rng, rng.randint(1, MAX_CONTINUATION))
        return prompt

    def probes(self) -> dict[str, Request]:
        """The requests whose greedy answers must never change, by name."""
        rng = random.Random(f"{self.seed} probes")
        found: dict[str, Request] = {}

        def add(name: str, path: str, **payload: Any) -> None:
            fixed = {"model": MODEL, "return_token_ids": True, "temperature": 0, "n": 1}
            found[name] = Request(f"probe {name}", path, ANSWERED, fixed | payload)

        def add_ids(length: int, **payload: Any) -> None:
            prompt = self.ids(rng, length)
            options = {"max_tokens": 48, "ignore_eos": True, "logprobs": 2}
            add(f"{length} ids", COMPLETIONS, prompt=prompt, **options, **payload)

        for length in (1, 17, 300, 1000):
            add_ids(length)
        add_ids(MAX_PROMPT_TOKENS)
        for name, text in (
            ("chat", "Anna has 5 books. In January Anna buys 3. How many books has Anna now?"),
            ("chat long", message(rng, 300)),
        ):
            add(
                name,
                CHAT,
                messages=[{"role": "user", "content": text}],
                max_tokens=64,
                logprobs=True,
                top_logprobs=2,
            )
        add(
            "text stream",
            COMPLETIONS,
            prompt="12 * 7 =",
            max_tokens=48,
            logprobs=2,
            ignore_eos=True,
            stream=True,
            stream_options={"include_usage": True},
        )
        return found


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, each order of magnitude equally likely."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def message(rng: random.Random, num_words: int) -> str:
    """Text of words that the embedded models' tokenizer knows."""
    return " ".join(rng.choices(_WORDS, k=num_words))


# Requests to be answered. Each kind gives the body, the path, and when the client leaves.

Built = tuple[Json, str, Json]


def _sampling(rng: random.Random, *, greedy: bool | None = None) -> Json:
    """Length and way of sampling."""
    found: Json = {
        "max_tokens": log_uniform(rng, 1, MAX_NEW_TOKENS),
        "ignore_eos": rng.random() < 0.5,
        "temperature": 0 if greedy or (greedy is None and rng.random() < 0.5) else TEMPERATURE,
    }
    if rng.random() < 0.5:
        found["seed"] = rng.randrange(2**31)
    return found


def _completion(traffic: Traffic, rng: random.Random, **changes: Any) -> Built:
    payload = {"prompt": traffic.prompt(rng), **_sampling(rng), **changes}
    return payload, COMPLETIONS, {}


def _samples(traffic: Traffic, rng: random.Random, **changes: Any) -> Built:
    # n > 1 at temperature 0 is refused by vLLM, see MALFORMED.
    options = {**_sampling(rng, greedy=False), "n": log_uniform(rng, 2, MAX_N)}
    return _completion(traffic, rng, **options | changes)


def _chat(traffic: Traffic, rng: random.Random, **changes: Any) -> Built:
    text = message(rng, log_uniform(rng, 1, MAX_WORDS))
    turns = [{"role": "user", "content": text}]
    if rng.random() < 0.3:
        turns = [{"role": "system", "content": "Add."}, *turns]
    return {"messages": turns, **_sampling(rng), **changes}, CHAT, {}


def _chat_samples(traffic: Traffic, rng: random.Random, **changes: Any) -> Built:
    options = {**_sampling(rng, greedy=False), "n": log_uniform(rng, 2, MAX_N)}
    return _chat(traffic, rng, **options | changes)


def _shared(traffic: Traffic, rng: random.Random) -> Built:
    n = log_uniform(rng, 1, MAX_N)
    payload = {"prompt": traffic.shared_prompt(rng), "n": n}
    return payload | _sampling(rng, greedy=n == 1), COMPLETIONS, {}


def _several_prompts(traffic: Traffic, rng: random.Random) -> Built:
    prompts = [traffic.prompt(rng, 1000) for _ in range(rng.randint(2, 4))]
    return _completion(traffic, rng, prompt=prompts)


def _logprobs(traffic: Traffic, rng: random.Random) -> Built:
    stream = rng.random() < 0.5
    if rng.random() < 0.5:
        return _chat(traffic, rng, logprobs=True, top_logprobs=rng.randint(0, 5), stream=stream)
    return _completion(traffic, rng, logprobs=rng.randint(0, 5), stream=stream)


def _stop(traffic: Traffic, rng: random.Random) -> Built:
    stop = rng.sample(["1", "2", "5", "=", "\n", "####", "e", "a"], k=rng.randint(1, 3))
    build = rng.choice((_chat, _completion))
    return build(traffic, rng, stop=stop, max_tokens=64, stream=rng.random() < 0.5)


def _structured(traffic: Traffic, rng: random.Random) -> Built:
    form = rng.choice(("regex", "choice", "json", "response_format"))
    if form == "response_format":
        schema = {"type": "json_schema", "json_schema": {"name": "ab", "schema": _JSON_SCHEMA}}
        return _chat(traffic, rng, response_format=schema, max_tokens=100, ignore_eos=False)
    grammar = {"regex": _REGEX, "choice": _CHOICES, "json": _JSON_SCHEMA}[form]
    return _completion(
        traffic,
        rng,
        structured_outputs={form: grammar},
        max_tokens=100,
        ignore_eos=False,
        stream=rng.random() < 0.3,
    )


def _penalties(traffic: Traffic, rng: random.Random) -> Built:
    some = {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "top_k": rng.randint(1, 50),
        "top_p": rng.uniform(0.1, 1.0),
        "min_p": rng.uniform(0.0, 0.5),
        "min_tokens": 1,
        "logit_bias": {str(rng.choice(traffic.ids(rng, 1))): rng.uniform(-20, 20)},
        "bad_words": ["1"],
    }
    names = rng.sample(sorted(some), k=rng.randint(1, len(some)))
    return _completion(traffic, rng, **{name: some[name] for name in names})


def _aborted(
    build: Callable[..., Built], stream: bool
) -> Callable[[Traffic, random.Random], Built]:
    """``build``, and the client leaves in the middle."""

    def built(traffic: Traffic, rng: random.Random) -> Built:
        # Long answers: most would not be over when the client leaves.
        options = {"ignore_eos": True, "max_tokens": MAX_NEW_TOKENS, "stream": stream}
        payload, path, _ = build(traffic, rng, **options)
        if stream:
            return payload, path, {"abort_after_pieces": log_uniform(rng, 1, 40)}
        return payload, path, {"abort_after_s": math.exp(rng.uniform(math.log(0.01), math.log(3)))}

    return built


def _streamed(build: Callable[..., Built]) -> Callable[[Traffic, random.Random], Built]:
    return lambda traffic, rng: build(traffic, rng, stream=True)


KINDS: dict[str, Callable[[Traffic, random.Random], Built]] = {
    "completion": _completion,
    "completion, stream": _streamed(_completion),
    "n samples": _samples,
    "n samples, stream": _streamed(_samples),
    "chat": _chat,
    "chat, stream": _streamed(_chat),
    "chat, n samples": _chat_samples,
    "several prompts": _several_prompts,
    "shared prompt": _shared,
    "logprobs": _logprobs,
    "prompt logprobs": lambda traffic, rng: _completion(traffic, rng, prompt_logprobs=1),
    "stop strings": _stop,
    "structured output": _structured,
    "penalties": _penalties,
    "abort": _aborted(_completion, stream=False),
    "abort, stream": _aborted(_completion, stream=True),
    "abort, n samples": _aborted(_samples, stream=False),
    "abort, n samples, stream": _aborted(_samples, stream=True),
    "abort, chat": _aborted(_chat, stream=False),
    "abort, chat, stream": _aborted(_chat, stream=True),
}
"""Well-formed kinds of requests."""


# Requests to be refused: (method, path, body or raw bytes).


def _changed(**changes: Any) -> Callable[[Traffic, random.Random], Request]:
    """A small completion with wrong values."""

    def build(traffic: Traffic, rng: random.Random) -> Request:
        payload = {"model": MODEL, "prompt": traffic.prompt(rng, 50), "max_tokens": 4, **changes}
        if rng.random() < 0.3:
            payload.setdefault("stream", True)
        return Request("", COMPLETIONS, REFUSED, payload)

    return build


def _chat_changed(**changes: Any) -> Callable[[Traffic, random.Random], Request]:
    payload = {"model": MODEL, "messages": [{"role": "user", "content": "1 + 1 ="}], **changes}
    return lambda traffic, rng: Request("", CHAT, REFUSED, payload)


def _bytes(body: bytes) -> Callable[[Traffic, random.Random], Request]:
    return lambda traffic, rng: Request("", COMPLETIONS, REFUSED, body=body)


def _cut_body(traffic: Traffic, rng: random.Random) -> Request:
    """The header promises more than is sent before the client leaves."""
    body = json.dumps({"model": MODEL, "prompt": traffic.prompt(rng)}).encode()
    head = f"POST {rng.choice((COMPLETIONS, CHAT))} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    raw = head.encode() + body[: rng.randrange(len(body))]
    return Request("", COMPLETIONS, ABORTED, raw=raw, abort_after_s=rng.uniform(0, 0.5))


def _too_long(traffic: Traffic, rng: random.Random) -> Request:
    prompt = traffic.ids(rng, MAX_MODEL_LEN + rng.randint(0, 2000))
    return _changed(prompt=prompt)(traffic, rng)


def _foreign_id(traffic: Traffic, rng: random.Random) -> Request:
    wrong = rng.choice((traffic.vocab_size, traffic.vocab_size + 10**6, 2**31, -1))
    return _changed(prompt=[*traffic.prompt(rng, 50), wrong])(traffic, rng)


def _get(path: str) -> Callable[[Traffic, random.Random], Request]:
    return lambda traffic, rng: Request("", path, REFUSED, method="GET", body=b"")


MALFORMED: dict[str, Callable[[Traffic, random.Random], Request]] = {
    f"malformed: {name}": build
    for name, build in {
        "bad JSON": _bytes(b'{"model": "soak", "prompt": [1, 2'),
        "empty body": _bytes(b""),
        "a list as body": _bytes(b"[1, 2, 3]"),
        "invalid UTF-8": _bytes(b'{"model": "soak", "prompt": "\xff\xfe\xc3"}'),
        "body cut off": _cut_body,
        "no HTTP": lambda traffic, rng: Request("", "", REFUSED, raw=b"\x16\x03\x01 hello\r\n\r\n"),
        "unknown path": lambda traffic, rng: Request("", "/v1/nothing", REFUSED),
        "wrong method": _get(COMPLETIONS),
        "unknown model": _changed(model="other"),
        "no messages": lambda traffic, rng: Request("", CHAT, REFUSED, {"model": MODEL}),
        "prompt too long": _too_long,
        "token id out of vocabulary": _foreign_id,
        "empty prompt": _changed(prompt=[]),
        "prompt of a wrong type": _changed(prompt={"text": "1 + 1"}),
        "mixed prompt": _changed(prompt=[5, "six"]),
        "max_tokens negative": _changed(max_tokens=-5),
        "max_tokens of a wrong type": _changed(max_tokens="many"),
        "max_tokens too large": _changed(max_tokens=10**6),
        "n = 0": _changed(n=0),
        "n negative": _changed(n=-3),
        "n huge": _changed(n=10**6, temperature=TEMPERATURE),
        "n = 4, greedy": _changed(n=4, temperature=0),
        "temperature negative": _changed(temperature=-1),
        "temperature NaN": _changed(temperature=math.nan),
        "top_p = 2": _changed(top_p=2),
        "logprobs too many": _changed(logprobs=10**4),
        "stop of a wrong type": _changed(stop={"a": 1}),
        "seed too large": _changed(seed=2**80),
        "bad regex": _changed(structured_outputs={"regex": "[0-9"}),
        "bad JSON schema": _changed(structured_outputs={"json": "{"}),
        "stream options without stream": _changed(
            stream=False, stream_options={"include_usage": True}
        ),
        "chat role unknown": _chat_changed(messages=[{"role": "oracle", "content": "1"}]),
        "chat content of a wrong type": _chat_changed(messages=[{"role": "user", "content": 5}]),
    }.items()
}
"""Kinds of requests that must be refused, and one whose sender goes away."""

_COMMON = ("completion", "completion, stream", "chat, stream", "n samples", "n samples, stream")
_DECK = (*KINDS, *KINDS, *KINDS, *_COMMON, *_COMMON, *MALFORMED)
"""A third malformed; the commonest kinds more often."""


def _malformed(traffic: Traffic, kind: str, rng: random.Random, pause_s: float) -> Request:
    built = MALFORMED[kind](traffic, rng)
    return Request(**(vars(built) | {"kind": kind, "pause_s": pause_s}))


def grammar_problem(payload: Json, text: str) -> str | None:
    """What is wrong with a finished text under the request's grammar; None if nothing."""
    grammar = payload.get("structured_outputs", {})
    schema = "json" in grammar or "response_format" in payload
    if "regex" in grammar and not re.fullmatch(grammar["regex"], text):
        return f"does not match {grammar['regex']}: {text!r}"
    if "choice" in grammar and text not in grammar["choice"]:
        return f"is none of {grammar['choice']}: {text!r}"
    if schema:
        try:
            value = json.loads(text)
        except ValueError:
            return f"is not JSON: {text!r}"
        names = _JSON_SCHEMA["properties"]
        if set(value) != set(names) or any(value[k] not in names[k]["enum"] for k in names):
            return f"does not fit the schema: {text!r}"
    return None
