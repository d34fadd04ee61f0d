"""A real HTTP server on loopback that speaks the chat-completions protocol, and can be told to misbehave.

It answers by a function, counts what it was asked and what it answered in full, and takes faults from a script: a
list with one entry a request (None is no fault; after its end there are none), or a function of the request.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Body = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request. Without a status the answer is made, and spoilt on its way.

    Attributes:
        status: answer with this status and `message` instead.
        message: of the error.
        code: of the error, as the API names it.
        headers: further headers.
        delay: seconds before anything is sent.
        reset: cut the connection instead of answering.
        half: send half of the body and close.
        body: send this text as the body.
        reply: change the completion before it is sent.
    """

    status: int | None = None
    message: str = "injected"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    reset: bool = False
    half: bool = False
    body: str | None = None
    reply: Callable[[Body], Body] | None = None


def timeout(seconds: float = 30.0) -> Fault:
    return Fault(delay=seconds)


def busy(retry_after: float | str | None = None) -> Fault:
    return Fault(429, "slow down", headers={} if retry_after is None else {"Retry-After": str(retry_after)})


def status(code: int, message: str = "injected", error_code: str | None = None) -> Fault:
    return Fault(code, message, error_code)


def reset() -> Fault:
    return Fault(reset=True)


def half_body() -> Fault:
    return Fault(half=True)


def broken_json() -> Fault:
    return Fault(body='{"choices": [{"message": {"content": "so far so')


def empty_choices() -> Fault:
    return Fault(reply=lambda reply: reply | {"choices": []})


def finish(reason: str | None, content: str | None = "half an ans") -> Fault:
    def spoil(reply: Body) -> Body:
        reply["choices"][0]["finish_reason"] = reason
        reply["choices"][0]["message"]["content"] = content
        return reply

    return Fault(reply=spoil)


def content(text: str) -> Fault:
    """A whole answer with another text: the wrong schema, say."""
    return finish("stop", text)


def prompt_of(body: Body) -> str:
    return body["messages"][-1]["content"]


class ChatServer:
    """A context manager: the server runs inside the block, and is gone after it.

    Attributes:
        path: the end of the address that it answers at.
        listing: what it answers to a GET of ``/models``; 404 without one.

    Args:
        answer: text of the answer to a request; or a whole completion, as a dict.
        faults: one entry a request, or a function of the request and its number.
        refuses_format: status 400 for every request with ``response_format``.
        model: the name of the model that it says answers.
    """

    path = "/chat/completions"
    listing: Body | None = None

    def __init__(
        self,
        answer: Callable[[Body], str | Body] = lambda body: f"answer to {prompt_of(body)}",
        faults: Iterable[Fault | None] | Callable[[Body, int], Fault | None] = (),
        *,
        refuses_format: bool = False,
        model: str = "served",
    ) -> None:
        self.answer, self.refuses_format, self.model = answer, refuses_format, model
        self._faults = faults if callable(faults) else list(faults)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.received: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()
        """By the request's body: how often it was answered in full."""
        self.most_at_once = self._at_once = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._handle(self)

            def do_GET(self) -> None:
                known = server.listing if self.path.endswith("/models") else None
                server._send(self, 404 if known is None else 200, json.dumps(known or {}), Fault())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed, or a connection that was cut on purpose

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(body) for body in self.received]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body: Body = json.loads(raw)
        with self._lock:
            number = len(self.received)
            self.received.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            if callable(self._faults):
                fault = self._faults(body, number)
            else:
                fault = self._faults[number] if number < len(self._faults) else None
        try:
            self._answer(handler, body, fault or Fault())
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, body: Body, fault: Fault) -> None:
        if not handler.path.endswith(self.path):
            fault = Fault(404, f"no such path: {handler.path}")
        elif self.refuses_format and "response_format" in body and fault.status is None:
            fault = Fault(400, "response_format is not supported by this server")
        if fault.delay and self._closing.wait(fault.delay):
            fault = Fault(reset=True)
        if fault.reset:
            # With a linger time of 0 closing sends RST instead of FIN.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if fault.status is not None:
            error = {"error": {"message": fault.message, "type": "injected", "code": fault.code}}
            self._send(handler, fault.status, json.dumps(error), fault)
            return
        made = self.answer(body)
        reply = made if isinstance(made, dict) else self.completion(body, made)
        if fault.reply is not None:
            reply = fault.reply(reply)
        self._send(handler, 200, fault.body if fault.body is not None else json.dumps(reply), fault)
        if not fault.half and fault.body is None:
            with self._lock:
                self.answered[json.dumps(body, sort_keys=True)] += 1

    def completion(self, body: Body, text: str, finish_reason: str = "stop") -> Body:
        """A completion in the API's shape; tokens are words here."""
        asked, said = sum(len(m["content"].split()) for m in body["messages"]), len(text.split())
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
            ],
            "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
        }

    def _send(self, handler: BaseHTTPRequestHandler, code: int, text: str, fault: Fault) -> None:
        data = text.encode()
        handler.send_response(code)
        for name, value in {"Content-Type": "application/json", **fault.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if fault.half else data)
        handler.wfile.flush()
        if fault.half:
            handler.close_connection = True
