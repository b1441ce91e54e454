"""Any OpenAI-compatible server: ``/v1/chat/completions`` or ``/v1/completions``, streamed.

One streamed request per sample (n=1), each with its own seed; the first piece of text stamps the
first token. Dropped connections, timeouts, 408, 409, 429 and 5xx are tried again with exponential
backoff and jitter, at least as long as ``Retry-After`` asks for. The clock of a sample is that of
the attempt that succeeded; the number of retries is a fact of the session.
"""

import asyncio
import json
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval_tasks.errors import stop
from lm_eval_tasks.sampling.backend import BackendError, Drawn, DrawRequest, SamplingSettings
from lm_eval_tasks.sampling.problems import Problem, encode_prompts

logger = logging.getLogger(__name__)

APIS = ("chat", "completions")
_RETRIED = (408, 409, 429)
_WARM_UP_PROMPT = "Count from one to ten."
_WARM_UP_TOKENS = 8
_POLL_S = 0.5
_WARN_INTERVAL_S = 2.0


class _TryAgainError(Exception):
    """An attempt failed in a way that another attempt may not."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class ServerOptions:
    """Where the server is and how patient to be with it."""

    url: str
    """Up to and with ``/v1``."""
    model: str
    """Name under which the server knows the model."""
    api: str = "chat"
    """"chat" lets the server apply the chat template, "completions" sends the prompt as it is."""
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the server's chat template; empty for "completions"."""
    api_key: str | None = field(default=None, repr=False)
    max_retries: int = 8
    """Attempts after the first one, per sample."""
    timeout_s: float = 600.0
    """Longest silence of the server within a request."""
    backoff_s: float = 0.5
    """Before the first retry; doubles with each, at most `max_backoff_s`."""
    max_backoff_s: float = 30.0


class OpenAIBackend:
    """A `lm_eval_tasks.sampling.backend.Backend` that asks a server.

    An event loop in a thread of its own holds the connections; the runner never waits for one.
    """

    def __init__(
        self, options: ServerOptions, max_in_flight: int = 64, tokenizer: Any = None
    ) -> None:
        """See the class.

        Args:
            options: of the server.
            max_in_flight: requests at a time under saturation.
            tokenizer: for the completions API: prompts go out as its token ids. None: as text.

        Raises:
            InputError: aiohttp is missing.
        """
        try:
            import aiohttp
        except ImportError as error:
            stop(f"{error}; sampling from a server needs it: pip install aiohttp")
        self._aiohttp = aiohttp
        self.options = options
        self.max_in_flight = max_in_flight
        self.num_places = max_in_flight  # how many of them the server runs at once, it does not say
        self.tokenizer = tokenizer
        self.num_retries = 0
        self._warned_at = -math.inf
        self._settings: SamplingSettings | None = None
        self._prompts: dict[str, Any] = {}
        self._finished: queue.SimpleQueue[Drawn | BackendError] = queue.SimpleQueue()
        self._failure: BackendError | None = None
        self._session: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    # -- the protocol -----------------------------------------------------------------------------

    def prepare(self, problems: Sequence[Problem], settings: SamplingSettings) -> None:
        """Tokenise where a tokenizer is given; whether a prompt fits, the server says."""
        self._settings = settings
        texts = [problem.prompt for problem in problems]
        prompts: Sequence[Any]
        if self.options.api == "chat":
            prompts = [json.loads(text) for text in texts]
        elif self.tokenizer is not None:
            prompts = encode_prompts(self.tokenizer, texts)
        else:
            prompts = texts
        names = [problem.problem_id for problem in problems]
        self._prompts = dict(zip(names, prompts, strict=True))

    def warm_up(self, num_samples: int) -> None:
        """Send short requests with a prompt of their own, which no problem finds in a cache."""
        prompt: Any = _WARM_UP_PROMPT
        if self.options.api == "chat":
            prompt = [{"role": "user", "content": prompt}]
        elif self.tokenizer is not None:
            prompt = encode_prompts(self.tokenizer, [prompt])[0]

        async def all_of_them() -> None:
            count = min(num_samples, self.max_in_flight)
            bodies = [self._body(prompt, seed, _WARM_UP_TOKENS) for seed in range(count)]
            # The first one alone: a wrong address or name is reported once.
            await self._with_retries(bodies.pop(), "the warm-up")
            await asyncio.gather(*(self._with_retries(body, "the warm-up") for body in bodies))

        asyncio.run_coroutine_threadsafe(all_of_them(), self._loop).result()
        self.num_retries = 0

    def submit(self, request: DrawRequest) -> None:
        """See the protocol."""
        asyncio.run_coroutine_threadsafe(self._draw(request), self._loop)

    def wait(self) -> list[Drawn]:
        """See the protocol."""
        finished: list[Drawn] = []
        timeout_s = _POLL_S
        while True:
            try:
                item = self._finished.get(timeout=timeout_s)
            except queue.Empty:
                break
            timeout_s = 0.0
            if isinstance(item, BackendError):
                self._failure = self._failure or item
            else:
                finished.append(item)
        if self._failure is not None and not finished:
            raise self._failure
        return finished

    def facts(self) -> dict[str, Any]:
        """See the protocol."""
        return {
            "engine": {"max_in_flight": self.max_in_flight, "api": self.options.api},
            "num_retries": self.num_retries,
        }

    def close(self) -> None:
        """See the protocol; the server is left running."""
        if self._loop.is_closed():
            return

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._session is not None:
                await self._session.close()

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- one sample -------------------------------------------------------------------------------

    async def _draw(self, request: DrawRequest) -> None:
        """Put the finished sample, or the reason why there is none, into the queue."""
        assert self._settings is not None
        problem_id = request.problem.problem_id
        body = self._body(self._prompts[problem_id], request.seed, self._settings.max_tokens)
        try:
            answer = await self._with_retries(body, f"{problem_id}, sample {request.sample_index}")
            drawn = Drawn(
                request=request,
                text=answer.text,
                num_tokens=answer.num_tokens,
                num_prompt_tokens=answer.num_prompt_tokens,
                num_cached_tokens=answer.num_cached_tokens,
                finish_reason=answer.finish_reason,
                submitted_at=answer.submitted_at,
                first_token_at=answer.first_token_at,
                finished_at=answer.finished_at,
            )
        except BackendError as error:
            self._finished.put(error)
        else:
            self._finished.put(drawn)

    def _body(self, prompt: Any, seed: int | None, max_tokens: int) -> dict[str, Any]:
        assert self._settings is not None
        assert seed is not None, "refused before: a server's random numbers are not ours"
        body = {
            "model": self.options.model,
            "messages" if self.options.api == "chat" else "prompt": prompt,
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
            "max_tokens": max_tokens,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._settings.stop:
            body["stop"] = list(self._settings.stop)
        if self.options.chat_template_args:
            # The name of vLLM and SGLang; a server that does not know it refuses or ignores it.
            body["chat_template_kwargs"] = dict(self.options.chat_template_args)
        return body

    async def _with_retries(self, body: dict[str, Any], what: str) -> "_Answer":
        """Return the answer to one request.

        Raises:
            BackendError: there is none, or not one that is understood.
        """
        aiohttp = self._aiohttp
        for attempt in range(self.options.max_retries + 1):
            try:
                return await self._attempt(body)
            except _TryAgainError as error:
                failure, wait_s = str(error), error.wait_s
            except asyncio.TimeoutError:
                failure, wait_s = f"no sign of life for {self.options.timeout_s:g} s", 0.0
            except (aiohttp.ClientError, OSError) as error:
                failure, wait_s = f"{type(error).__name__}: {error}", 0.0
            except BackendError:
                raise
            except Exception as error:
                # A server that answers in another shape; unseen, the runner would wait for ever.
                reason = f"{type(error).__name__}: {error}"
                raise BackendError(
                    f"no OpenAI-like answer from {self.options.url} ({reason}); see --server and "
                    "--api"
                ) from error
            if attempt < self.options.max_retries:
                self.num_retries += 1
                backoff = min(self.options.backoff_s * 2**attempt, self.options.max_backoff_s)
                wait_s = max(wait_s, backoff * random.uniform(0.5, 1.0))
                self._warn(f"{what}: {failure}; trying again in {wait_s:.1f} s")
                await asyncio.sleep(wait_s)
        raise BackendError(
            f"{self.options.url} failed {self.options.max_retries + 1} times for {what} ({failure})"
        )

    def _warn(self, message: str) -> None:
        """Say it, but not for each of many requests that fail at once."""
        if time.monotonic() - self._warned_at >= _WARN_INTERVAL_S:
            self._warned_at = time.monotonic()
            logger.warning("%s (%d retries so far)", message, self.num_retries)

    async def _attempt(self, body: dict[str, Any]) -> "_Answer":
        path = "chat/completions" if self.options.api == "chat" else "completions"
        url = f"{self.options.url.rstrip('/')}/{path}"
        key = self.options.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = _Answer(is_chat=self.options.api == "chat")
        async with self._connection().post(url, json=body, headers=headers) as response:
            if response.status != 200:
                reason = " ".join((await response.text()).split())[:300]
                said = f"{url} answered {response.status}: {reason}"
                if response.status in _RETRIED or response.status >= 500:
                    raise _TryAgainError(said, _retry_after_s(response.headers.get("Retry-After")))
                raise BackendError(f"{said}; see --model, --api, --api-key-env and --max-tokens")
            async for line in response.content:
                if line.startswith(b"data:"):
                    answer.read(line[5:].strip())
        return answer.complete()

    def _connection(self) -> Any:
        if self._session is None:
            aiohttp = self._aiohttp
            timeout = aiohttp.ClientTimeout(
                total=None, connect=self.options.timeout_s, sock_read=self.options.timeout_s
            )
            # The runner bounds the requests; a second bound here would hide queueing from it.
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(
                timeout=timeout, connector=connector, read_bufsize=1 << 20
            )
        return self._session


@dataclass
class _Answer:
    """What a stream has said so far."""

    is_chat: bool
    submitted_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    finished_at: float = 0.0
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None
    _pieces: list[str] = field(default_factory=list)
    _has_usage: bool = False

    def read(self, data: bytes) -> None:
        """Take in the data of one event."""
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:  # the latter: thousands of brackets
            raise _TryAgainError(f"a damaged event in the stream: {error}") from error
        if "error" in event:
            raise _TryAgainError(f"an error within the stream: {event['error']}")
        usage = event.get("usage")
        if usage:
            self._has_usage = True
            self.num_tokens = int(usage["completion_tokens"])
            self.num_prompt_tokens = int(usage["prompt_tokens"])
            details = usage.get("prompt_tokens_details") or {}
            self.num_cached_tokens = details.get("cached_tokens")
        for choice in event.get("choices") or ():
            piece, is_token = self._piece(choice)
            now = time.monotonic()
            if is_token and self.first_token_at is None:
                self.first_token_at = now
            self._pieces.append(piece)
            if choice.get("finish_reason"):
                self.finish_reason = choice["finish_reason"]
                self.finished_at = now

    def _piece(self, choice: dict[str, Any]) -> tuple[str, bool]:
        """Return the text of a choice, and whether it stands for a generated token."""
        if not self.is_chat:
            text = choice.get("text") or ""
            return text, bool(text)
        delta = choice.get("delta") or {}
        text = delta.get("content") or ""
        if not isinstance(text, str):
            raise TypeError(f"content is a {type(text).__name__}, need text")
        # A reasoning parser of the server puts the thinking elsewhere; it takes time all the same.
        return text, bool(text or delta.get("reasoning_content") or delta.get("reasoning"))

    def complete(self) -> "_Answer":
        """Check that the stream came to its end."""
        if not self.finish_reason:
            raise _TryAgainError("the connection ended before the sample did")
        if self.finish_reason not in ("stop", "length"):
            raise BackendError(
                f"the server ended a sample with finish_reason {self.finish_reason!r}; accepted "
                "are stop and length"
            )
        if not self._has_usage:
            raise BackendError(
                "the server's stream reports no usage, so the tokens cannot be counted; it must "
                "support stream_options.include_usage"
            )
        self.text = "".join(self._pieces)
        return self


def _retry_after_s(value: str | None) -> float:
    """Return the seconds a server asks to wait; dates and nonsense count as no wish."""
    try:
        return min(max(float(value or 0.0), 0.0), 300.0)
    except ValueError:
        return 0.0
