"""A small server that speaks the OpenAI API and answers with a real model of transformers, through llmkit's generator.

What a network does to a client can be asked for: ``failures`` are answered before anything else, one a request, as
``(status, headers)`` (status 0 closes the connection without a word); ``refused`` names parameters that it does not take.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llmkit.inference.generate import Generator, Sampling


@dataclass
class Served:
    """The running server: its address, what it was asked, and what it is to do wrong."""

    url: str = ""
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    refused: tuple[str, ...] = ()
    key: str | None = None
    pause: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def serve(generator: Generator, model: str = "tiny") -> Iterator[Served]:
    """Serve ``generator`` under the name ``model`` on a free port."""
    state = Served()
    lock, counting = threading.Lock(), threading.Lock()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal under_way
            with counting:
                under_way += 1
                state.most_at_once = max(state.most_at_once, under_way)
                state.times.append(time.monotonic())
                failure = state.failures.pop(0) if state.failures else None
            try:
                self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), failure)
            finally:
                with counting:
                    under_way -= 1

        def _respond(self, body: dict[str, Any], failure: tuple[int, dict[str, str]] | None) -> None:
            state.bodies.append(body)
            time.sleep(state.pause)
            if failure is not None:
                status, headers = failure
                if status:
                    self._send(status, {"error": {"message": f"status {status}"}}, headers)
                return
            if state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
                self._send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
            elif body["model"] != model:
                self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            elif wrong := [name for name in state.refused if name in body]:
                better = " Use `max_completion_tokens` instead." if wrong[0] == "max_tokens" else ""
                self._send(400, {"error": {"message": f"Unrecognized request argument: {wrong[0]}.{better}"}})
            else:
                self._answer(body)

        def _answer(self, body: dict[str, Any]) -> None:
            limit = body.get("max_tokens", body.get("max_completion_tokens"))
            sampling = Sampling(limit, body["temperature"], body.get("top_p", 1.0), body.get("seed", 0), logprobs=True)
            chat = self.path.endswith("/chat/completions")
            with lock:
                made = generator.generate(body["messages"] if chat else body["prompt"], sampling)
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if made.finished else "length"}
            choice |= {"message": {"role": "assistant", "content": made.text}} if chat else {"text": made.text}
            if body.get("logprobs"):
                each = [made.logprob] * len(made.ids)
                choice["logprobs"] = {"content": [{"logprob": p} for p in each]} if chat else {"token_logprobs": each}
            usage = {"prompt_tokens": made.prompt_tokens, "completion_tokens": len(made.ids)}
            self._send(200, {"choices": [choice], "usage": usage})

        def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(raw)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
