"""``vllm serve`` as far as scripts/soak.py sees it, without a model: answers, refuses, breaks.

FAKE_VLLM_FAULTS names what it does wrong, separated by spaces: ``drift`` (a greedy answer changes),
``500`` (one request is answered so), ``short`` (one of n samples is missing), ``log`` (an error is
logged), ``busy`` (a request is said to run for ever), ``die`` (the process ends in the middle).
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from typing import Any

from aiohttp import web

from scripts.soak_server import METRICS
from scripts.soak_traffic import CHAT, COMPLETIONS, MAX_MODEL_LEN, MODEL

FAULTS = os.environ.get("FAKE_VLLM_FAULTS", "").split()
VOCAB_SIZE = 514
calls: Counter[str] = Counter()


def is_malformed(path: str, body: Any) -> bool:
    """Whether vLLM refuses it."""
    if not isinstance(body, dict) or body.get("model") != MODEL:
        return True
    if path == CHAT:
        messages = body.get("messages") or [{"role": "", "content": ""}]
        is_text = all(isinstance(message["content"], str) for message in messages)
        if not is_text or any(m["role"] not in ("system", "user") for m in messages):
            return True
    elif not isinstance(body.get("prompt"), str):
        prompts = prompts_of(body.get("prompt"))
        if not prompts or not all(isinstance(i, int) for prompt in prompts for i in prompt):
            return True
        if any(
            len(p) >= MAX_MODEL_LEN or not (0 <= min(p) <= max(p) < VOCAB_SIZE) for p in prompts
        ):
            return True
    temperature, n = body.get("temperature", 1), body.get("n", 1)
    grammar = body.get("structured_outputs", {})
    return (
        not isinstance(body.get("max_tokens", 1), int)
        or not 1 <= body["max_tokens"] <= MAX_MODEL_LEN
        or not 1 <= n <= 16384
        or (n > 1 and temperature == 0)
        or not (math.isfinite(temperature) and temperature >= 0)
        or body.get("top_p", 1) > 1
        or int(body.get("logprobs") or 0) > 20
        or not isinstance(body.get("stop", []), list)
        or body.get("seed", 0) >= 2**63
        or grammar.get("regex", "").count("[") != grammar.get("regex", "").count("]")
        or isinstance(grammar.get("json", {}), str)
        or ("stream_options" in body and not body.get("stream"))
    )


def prompts_of(prompt: Any) -> list[list[int]]:
    """The token ids of each prompt; nothing if these are none."""
    if not isinstance(prompt, list) or not prompt:
        return []
    return prompt if isinstance(prompt[0], list) else [prompt]


async def serve(request: web.Request) -> web.StreamResponse:
    try:
        return await answer(request)
    except ConnectionResetError:  # the client left
        return web.Response()


async def answer(request: web.Request) -> web.StreamResponse:
    try:
        body = json.loads((await request.read()).decode())
    except ValueError:
        raise web.HTTPBadRequest from None
    if is_malformed(request.path, body):
        raise web.HTTPBadRequest
    kind = "chat" if request.path == CHAT else str(body["prompt"])
    calls[kind] += 1
    calls["all"] += 1
    if "500" in FAULTS and calls["all"] == 30:
        raise web.HTTPInternalServerError
    if "die" in FAULTS and calls["all"] == 60:
        os._exit(3)
    if "log" in FAULTS and calls["all"] == 30:
        sys.stderr.write("(EngineCore pid=7) ERROR 11-21 18:52:28 [core.py:5] scripted\n")
    word = "y" if "drift" in FAULTS and kind == "12 * 7 =" and calls[kind] > 2 else "z"
    length = body["max_tokens"]
    number = body.get("n", 1) * max(1, len(prompts_of(body.get("prompt"))))
    if "short" in FAULTS and number > 1:
        number -= 1
    choices = [choice(request.path, body, index, word, length) for index in range(number)]
    usage = {
        "completion_tokens": number * length,
        "prompt_tokens": sum(map(len, prompts_of(body.get("prompt")))),
    }
    if not body.get("stream"):
        return web.json_response({"choices": choices, "usage": usage})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    events = [{"choices": [one]} for one in choices] + [{"choices": [], "usage": usage}]
    for event in events:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


def choice(path: str, body: dict[str, Any], index: int, word: str, length: int) -> dict[str, Any]:
    """One sample: the same token again and again."""
    found: dict[str, Any] = {"index": index, "finish_reason": "length"}
    found["token_ids"] = [ord(word)] * length
    if path == CHAT:
        found["delta" if body.get("stream") else "message"] = {"content": word * length}
        if body.get("logprobs"):
            token = {"logprob": -0.5, "top_logprobs": [{"logprob": -0.5}, {"logprob": -1.5}]}
            found["logprobs"] = {"content": [token] * length}
    else:
        found["text"] = word * length
        found["prompt_logprobs"] = body.get("prompt_logprobs") and [None] * len(body["prompt"])
        if body.get("logprobs") is not None:
            tops = [{"a": -0.5, "b": -1.5}] * length
            found["logprobs"] = {"token_logprobs": [-0.5] * length, "top_logprobs": tops}
    return found


async def metrics(request: web.Request) -> web.Response:
    running = {METRICS["running"]: 1.0} if "busy" in FAULTS else {}
    return web.Response(
        text="".join(f"{name} {running.get(name, 0.0)}\n" for name in METRICS.values())
    )


async def health(request: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    app = web.Application(client_max_size=2**24)
    app.router.add_post(COMPLETIONS, serve)
    app.router.add_post(CHAT, serve)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None, shutdown_timeout=1)


if __name__ == "__main__":
    sys.exit(main())
