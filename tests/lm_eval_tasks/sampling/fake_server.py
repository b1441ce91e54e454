"""A small OpenAI-compatible server on localhost that answers, refuses and breaks as told."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Gets the number of the request (0 first) and its body; returns how to answer, None for well.
Script = Callable[[int, dict[str, Any]], str | None]


class FakeServer:
    """Answers with the request's seed as text, in pieces. Use it in a ``with`` statement.

    Answers by name: "500", "401" and so on (a status), "429 after 0.2" (with Retry-After), "drop"
    (the connection ends in the middle of the text), "hang up" (before any answer), "error event",
    "damaged event", "nested event", "no usage", "finish <reason>", "html" (a page with status 200).
    """

    def __init__(self, script: Script = lambda number, body: None) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        self.peak = 0
        self._open = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._answer(self)

            def end_headers(self) -> None:
                # Said, so that no client sends its next request into a connection that is closing.
                self.send_header("Connection", "close")
                super().end_headers()

            def log_message(self, *_: object) -> None:
                """Keep the test's output clean."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.paths.append(handler.path)
            self.authorizations.append(handler.headers.get("Authorization"))
            self._open += 1
            self.peak = max(self.peak, self._open)
        try:
            how = self.script(number, body) or "well"
        finally:
            # Before the answer: with its last byte the client may send the next request.
            with self._lock:
                self._open -= 1
        self._respond(handler, body, how)

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], how: str) -> None:
        first, _, rest = how.partition(" ")
        if first.isdigit():
            text = json.dumps({"error": {"message": f"scripted {first}"}}).encode()
            handler.send_response(int(first))
            if rest.startswith("after"):
                handler.send_header("Retry-After", rest.split()[1])
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)
            return
        handler.close_connection = True
        if how == "hang up":
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for event in events(body, handler.path, how):
            data = f"data: {event}\n\n".encode()
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if how != "drop":
            handler.wfile.write(b"0\r\n\r\n")


def events(body: dict[str, Any], path: str, how: str) -> list[str]:
    """The data of a stream's events."""
    is_chat = path.endswith("/chat/completions")

    def choice(text: Any, finish_reason: str | None = None) -> str:
        said = {"delta": {"content": text}} if is_chat else {"text": text}
        return json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason} | said]})

    reason = how.removeprefix("finish ") if how.startswith("finish") else "stop"
    usage = {
        "choices": [],
        "usage": {
            "completion_tokens": 11,
            "prompt_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    pieces = [choice(""), choice("seed "), choice(f"{body['seed']}")]
    end = [choice("", reason), json.dumps(usage), "[DONE]"]
    return {
        "drop": pieces,
        "error event": [*pieces, json.dumps({"error": {"message": "scripted"}})],
        "damaged event": [*pieces, '{"choices": ['],
        "nested event": [*pieces, "[" * 100_000],
        "no usage": [*pieces, end[0], end[2]],
        "html": ["<html>", "</html>"],
        "no choices": ["{}", "[DONE]"],
        "empty list": ["[]", *pieces, *end],
        "null usage": [*pieces, end[0], json.dumps({"usage": {"completion_tokens": None}})],
        "content list": [choice([{"type": "thinking", "thinking": "x"}]), *end],
        "odd usage": [*pieces, end[0], json.dumps({"usage": {"tokens": 3}}), end[2]],
    }.get(how, [*pieces, *end])
