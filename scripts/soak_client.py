"""The client of ``scripts/soak.py``: sends requests, leaves early if told, checks the answers."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from scripts.soak_traffic import ABORTED, ANSWERED, CHAT, REFUSED, Json, Request, grammar_problem

ANSWER_S = 300.0
"""A request without an end after so many seconds is a failure: the server hangs."""
_HEADERS = {"Content-Type": "application/json"}


@dataclass
class Choice:
    """One sample of an answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    """Of the chosen tokens, if the request asked for them."""
    margins: list[float] | None = None
    """Nats between the two most likely tokens at each position, if there were two."""
    num_prompt_logprobs: int = 0
    finish_reason: str | None = None


@dataclass
class Answer:
    """What came back."""

    status: int | None = None
    """HTTP status; None if there was none."""
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Json = field(default_factory=dict)
    error: str = ""
    """The body of a refusal, or what went wrong on the way; empty if nothing did."""
    left: bool = False
    """The client went away before the end."""


def new_session(url: str) -> aiohttp.ClientSession:
    """A session without limits of its own; every request has its own connection.

    A kept connection can be closed by the server at the moment in which a request goes into it,
    which would look like a failure of the server.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout)


async def send(session: aiohttp.ClientSession, url: str, request: Request) -> Answer:
    """Sends ``request`` and reads the answer, or leaves in the middle."""
    answer = Answer()
    try:
        if request.raw is not None:
            await asyncio.wait_for(_send_raw(url, request, answer), ANSWER_S)
        elif request.abort_after_s is not None:
            try:
                await asyncio.wait_for(_send_http(session, request, answer), request.abort_after_s)
            except asyncio.TimeoutError:
                answer.left = True
        else:
            await _send_http(session, request, answer)
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def _send_http(session: aiohttp.ClientSession, request: Request, answer: Answer) -> None:
    body = request.content
    async with session.request(
        request.method, request.path, data=body, headers=_HEADERS
    ) as response:
        answer.status = response.status
        if response.status != 200:
            answer.error = (await response.text(errors="replace"))[:300]
        elif not request.payload.get("stream"):
            _add(answer, json.loads(await response.read()))
        else:
            num_pieces = 0
            async for event in _events(response):
                _add(answer, event)
                num_pieces += 1
                if num_pieces == request.abort_after_pieces:
                    answer.left = True
                    response.close()
                    return


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    """The events of a stream.

    Raises:
        ValueError: the stream ends before its end is announced.
    """
    async for line in response.content:
        kind, _, data = line.decode().strip().partition(": ")
        if kind != "data":
            continue
        if data == "[DONE]":
            return
        yield json.loads(data)
    raise ValueError("the stream ended without [DONE]")


async def _send_raw(url: str, request: Request, answer: Answer) -> None:
    """Writes bytes; reads a status line, or closes the connection after a while."""
    assert request.raw is not None
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request.raw)
        await writer.drain()
        if request.abort_after_s is not None:
            await asyncio.sleep(request.abort_after_s)
            answer.left = True
            return
        status = (await reader.readline()).split()
        answer.status = int(status[1])
    except IndexError:
        raise ValueError("no status line") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _add(answer: Answer, piece: Json) -> None:
    """Adds an event of a stream, or the whole answer.

    An error can come in the middle of a stream, after the status 200: vLLM looks at grammars only
    then. Its code takes the status's place.

    Raises:
        ValueError: it is an error.
    """
    if "error" in piece:
        answer.status = int(piece["error"]["code"])
        raise ValueError(f"in the stream: {json.dumps(piece['error'])[:300]}")
    if piece.get("usage"):
        answer.usage = piece["usage"]
    for part in piece["choices"]:
        choice = answer.choices.setdefault(part["index"], Choice())
        said = part.get("message") or part.get("delta") or part
        choice.text += said.get("text") or said.get("content") or ""
        choice.token_ids += part.get("token_ids") or []
        choice.num_prompt_logprobs += len(part.get("prompt_logprobs") or [])
        choice.finish_reason = part.get("finish_reason") or choice.finish_reason
        if part.get("logprobs"):
            _add_logprobs(choice, part["logprobs"])


def _add_logprobs(choice: Choice, logprobs: Json) -> None:
    if "content" in logprobs:  # chat
        values = [token["logprob"] for token in logprobs["content"]]
        tops = [[top["logprob"] for top in t["top_logprobs"]] for t in logprobs["content"]]
    else:
        values = logprobs["token_logprobs"]
        tops = [list((top or {}).values()) for top in logprobs["top_logprobs"] or []]
    choice.logprobs = (choice.logprobs or []) + values
    margins = [top[0] - top[1] for top in (sorted(t, reverse=True) for t in tops) if len(top) > 1]
    choice.margins = (choice.margins or []) + margins


def outcome(request: Request, answer: Answer) -> str:
    """What happened, for counting: ``left``, a status, or ``no answer``."""
    if answer.left:
        return "left"
    return str(answer.status) if answer.status is not None else "no answer"


def problems(request: Request, answer: Answer) -> list[str]:
    """What is wrong with an answer; empty if nothing is."""
    status = answer.status
    if status is not None and status >= 500:
        return [f"status {status}: {answer.error}"]
    if request.expect == ABORTED:
        # It may have been over before the client left; then it must be right.
        if answer.left and not answer.error:
            return []
        if request.raw is not None or status is None:
            return [f"did not get as far as leaving: {answer.error}"]
    if request.expect == REFUSED:
        if status is None or not 400 <= status < 500:
            return [f"not refused: status {status} {answer.error}"]
        return []
    if status != 200:
        return [f"not answered: status {status} {answer.error}"]
    if answer.error:
        return [answer.error]
    return _problems_of_content(request.payload, request.path, answer)


def _problems_of_content(payload: Json, path: str, answer: Answer) -> list[str]:
    prompts: Any = payload.get("prompt")
    is_several = isinstance(prompts, list) and isinstance(prompts[0], list)
    num_choices = payload.get("n", 1) * (len(prompts) if is_several else 1)
    found = []
    if sorted(answer.choices) != list(range(num_choices)):
        found.append(f"choices {sorted(answer.choices)} instead of {num_choices}")
    for index, choice in sorted(answer.choices.items()):
        found += [f"choice {index}: {what}" for what in _problems_of_choice(payload, choice)]
    counted = sum(len(choice.token_ids) for choice in answer.choices.values())
    if answer.usage.get("completion_tokens") != counted:
        found.append(f"usage {answer.usage} for {counted} generated tokens")
    if path != CHAT and isinstance(prompts, list):
        length = sum(map(len, prompts)) if is_several else len(prompts)
        if answer.usage.get("prompt_tokens") != length:
            found.append(f"usage {answer.usage} for {length} prompt tokens")
    return found


def _problems_of_choice(payload: Json, choice: Choice) -> list[str]:
    found = []
    limit, count = payload["max_tokens"], len(choice.token_ids)
    if choice.finish_reason not in ("stop", "length"):
        found.append(f"finish reason {choice.finish_reason!r}")
    if not 1 <= count <= limit or (choice.finish_reason == "length" and count != limit):
        found.append(f"{count} tokens, finish reason {choice.finish_reason}, of {limit}")
    found += [
        f"has the stop string {stop!r}: {choice.text!r}"
        for stop in payload.get("stop", [])
        if stop in choice.text
    ]
    if payload.get("logprobs") is not None:
        values = choice.logprobs or []
        if len(values) != count:
            found.append(f"{len(values)} log-probabilities of {count} tokens")
        if not all(math.isfinite(value) and value < 1e-4 for value in values):
            found.append(f"log-probabilities {values}")
    if "prompt_logprobs" in payload and choice.num_prompt_logprobs != len(payload["prompt"]):
        found.append(f"{choice.num_prompt_logprobs} prompt log-probabilities")
    if choice.finish_reason == "stop" and (why := grammar_problem(payload, choice.text)):
        found.append(why)
    return found


class Probes:
    """Requests whose greedy answers must stay what they were at first."""

    def __init__(self, requests: Mapping[str, Request]) -> None:
        """The requests by name."""
        assert all(request.expect == ANSWERED for request in requests.values())
        self.requests = dict(requests)
        self.first: dict[str, Choice] = {}
        self.num_rounds = 0
        self.max_logprob_change = 0.0
        """Nats, over all rounds; float32 sums in another order change the last digits."""

    async def run(self, session: aiohttp.ClientSession, url: str) -> list[str]:
        """Sends all of them at once; returns what was wrong."""
        answers = await asyncio.gather(
            *(send(session, url, request) for request in self.requests.values())
        )
        self.num_rounds += 1
        found = []
        for (name, request), answer in zip(self.requests.items(), answers, strict=True):
            wrong = problems(request, answer)
            if not wrong and name in self.first:
                wrong = self._differences(self.first[name], answer.choices[0])
            elif not wrong:
                self.first[name] = answer.choices[0]
            found += [f"round {self.num_rounds}, probe {name}: {what}" for what in wrong]
        return found

    def _differences(self, first: Choice, now: Choice) -> list[str]:
        if first.token_ids != now.token_ids:
            pairs = zip(first.token_ids, now.token_ids, strict=False)
            same = [a == b for a, b in pairs]
            at = same.index(False) if False in same else len(same)
            margin = (first.margins or [])[at : at + 1]
            nats = f" ({margin[0]:.2g} nats between the two likeliest at first)" if margin else ""
            return [f"token {at} differs{nats}: {first.text!r} became {now.text!r}"]
        if first.text != now.text:
            return [f"same tokens, other text: {first.text!r} became {now.text!r}"]
        changes = zip(first.logprobs or [], now.logprobs or [], strict=True)
        largest = max((abs(a - b) for a, b in changes), default=0.0)
        self.max_logprob_change = max(self.max_logprob_change, largest)
        return []

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "num_probes": len(self.requests),
            "num_rounds": self.num_rounds,
            "max_logprob_change": self.max_logprob_change,
            "texts": {name: choice.text for name, choice in self.first.items()},
        }
