"""Reward models behind a vLLM server: ``/v1/completions`` or ``/pooling``.

Token protocols ask ``/v1/completions`` for one token after each step's prefix with
``logprob_token_ids``; two-label heads ask ``/pooling`` with task ``token_classify``, which returns
the softmax at each step tag (the server knows the tag: 151651 by default, else
``--pooler-config '{"step_tag_id": ID}'``). Prompts travel as token ids, so the server's own chat
template and special tokens play no part. Value heads ask ``/pooling`` too, for a server whose model
class returns the value at every token, as the Skywork authors' plugin does.

A refused connection, a broken one, 429 and 5xx are tried again with growing pauses; then the run
stops, with all finished batches on disk.
"""

import http.client
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from lm_eval_tasks.errors import stop
from lm_eval_tasks.rewards.backend import Backend, sigmoid
from lm_eval_tasks.rewards.protocols import Readout, ScoringInput, TokenPair, TwoLabels
from lm_eval_tasks.rewards.spec import RewardSpec
from lm_eval_tasks.rewards.vllm_engine import label_scores, prefixes

logger = logging.getLogger(__name__)

_MAX_TRIES = 6
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_TIMEOUT_S = 600.0
_REQUESTS_IN_FLIGHT = 16
_PROMPTS_PER_REQUEST = 64


class RemoteBackend(Backend):
    """A reward model on a server."""

    def __init__(self, spec: RewardSpec, readout: Readout) -> None:
        """Ask the server for its models.

        Args:
            spec: with ``url``.
            readout: of the protocol.

        Raises:
            InputError: the server does not answer, or does not serve this model.
        """
        assert spec.url is not None
        self.url = spec.url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            stop(f"url={spec.url} is not accepted; give http://HOST:PORT")
        self.model = spec.model
        self._headers = {"Content-Type": "application/json"}
        key = os.environ.get(spec.api_key_env)
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        try:
            entries = self._ask("/v1/models").get("data", ())
        except ValueError as error:
            stop(str(error))
        served = {str(entry.get("id")): entry for entry in entries}
        if self.model not in served:
            stop(
                f"{self.url} does not serve {self.model} but {', '.join(served) or 'no model'}; "
                "give that name, and tokenizer= if it is not where the tokenizer is"
            )
        limit = served[self.model].get("max_model_len") or spec.max_tokens
        if not limit:
            stop(f"{self.url} does not say how long an input may be; give max_tokens=")
        limit = min(int(limit), spec.max_tokens or int(limit))
        self.max_tokens = limit - isinstance(readout, TokenPair)

    def score(self, inputs: Sequence[ScoringInput]) -> list[list[float]]:
        """See `Backend.score`."""
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            return list(pool.map(self._score_one, inputs))

    def _score_one(self, one: ScoringInput) -> list[float]:
        if isinstance(one.readout, TokenPair):
            return self._score_tokens(one, one.readout)
        rows = self._pool(one)
        if isinstance(one.readout, TwoLabels):
            return label_scores(one, rows, one.readout)
        if len(rows) != len(one.token_ids) or any(len(row) != 1 for row in rows):
            self._unfit("/pooling", f"need one value for each of {len(one.token_ids)} tokens")
        return [sigmoid(rows[position][0]) for position in one.positions]

    def _score_tokens(self, one: ScoringInput, readout: TokenPair) -> list[float]:
        scores = []
        for prompts in _chunks(prefixes(one), _PROMPTS_PER_REQUEST):
            answer = self._ask(
                "/v1/completions",
                {
                    "model": self.model,
                    "prompt": prompts,
                    "max_tokens": 1,
                    "temperature": 0,
                    "logprobs": 2,
                    "logprob_token_ids": [readout.good_id, readout.bad_id],
                    "return_tokens_as_token_ids": True,
                },
            )
            choices = sorted(answer.get("choices", ()), key=lambda choice: choice.get("index", 0))
            if len(choices) != len(prompts):
                self._unfit("/v1/completions", f"{len(choices)} choices for {len(prompts)} prompts")
            for choice in choices:
                good, bad = self._logprobs(choice, readout)
                scores.append(sigmoid(good - bad))
        return scores

    def _logprobs(self, choice: Mapping[str, Any], readout: TokenPair) -> tuple[float, float]:
        top = ((choice.get("logprobs") or {}).get("top_logprobs") or [{}])[0] or {}
        keys = [f"token_id:{token}" for token in (readout.good_id, readout.bad_id)]
        if not all(isinstance(top.get(key), int | float) for key in keys):
            self._unfit(
                "/v1/completions",
                f"no log-probabilities of {' and '.join(keys)} (got {list(top)[:4]}); the server "
                "must be vLLM with logprob_token_ids",
            )
        return float(top[keys[0]]), float(top[keys[1]])

    def _pool(self, one: ScoringInput) -> list[list[float]]:
        request: dict[str, Any] = {
            "model": self.model,
            "input": [one.token_ids],
            "task": "token_classify",
            "encoding_format": "float",
        }
        if not isinstance(one.readout, TwoLabels):
            request["use_activation"] = False
        data = self._ask("/pooling", request).get("data") or [{}]
        rows: Any = data[0].get("data")
        if not isinstance(rows, list):
            self._unfit("/pooling", f"need a list in data[0].data, got {type(rows).__name__}")
        if rows and not isinstance(rows[0], list):
            rows = [[value] for value in rows]
        if not all(
            isinstance(row, list) and all(isinstance(value, int | float) for value in row)
            for row in rows
        ):
            self._unfit("/pooling", "need rows of numbers")
        return list(rows)

    def _unfit(self, path: str, reason: str) -> NoReturn:
        raise ValueError(f"{self.url}{path} gave an answer that does not fit: {reason}")

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's JSON answer, after as many tries as it takes.

        Raises:
            ValueError: the server refuses the request, or all tries failed.
        """
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers=self._headers,
        )
        problem, asked_s = "", 0.0
        for attempt in range(_MAX_TRIES):
            if attempt:
                pause_s = _FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
                pause_s = max(pause_s, asked_s)
                logger.warning("%s%s: %s; again in %.1f s", self.url, path, problem, pause_s)
                time.sleep(pause_s)
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                    answer = json.load(response)
                if isinstance(answer, dict):
                    return answer
                problem = f"answered {type(answer).__name__} instead of a JSON object"
            except urllib.error.HTTPError as error:
                reason = error.read(400).decode(errors="replace").strip()
                problem = f"HTTP {error.code} {' '.join(reason.split())}"
                asked = error.headers.get("Retry-After", "")
                asked_s = min(float(asked), _LONGEST_PAUSE_S) if asked.isdigit() else 0.0
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"{self.url}{path} refuses the request: {problem}") from error
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{self.url}{path}: {problem} (tried {_MAX_TRIES} times); scores written so far are "
            "kept, start the same command again when the server is back"
        )

    def facts(self) -> dict[str, Any]:
        """See `Backend.facts`."""
        return {"url": self.url, "max_tokens": self.max_tokens}

    def close(self) -> None:
        """See `Backend.close`; the server goes on."""


def _chunks(items: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
