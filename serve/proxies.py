"""What Ray Serve's HTTP proxies do for us: say what happened when the process that was answering is gone.

Proxies import this, so it imports nothing heavy. They do so where the Ray that starts them has in its environment
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxies:middlewares, as `cluster.local` gives it.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GONE = {
    "message": "the process that was answering has ended; try again",
    "type": "server_error",
    "param": None,
    "code": "unavailable",
}


def middlewares() -> list[Middleware]:
    """What Ray Serve is to put around its proxy's application."""
    return [Middleware(Ended)]


class Ended:
    """ASGI middleware: ends answers that the application leaves without an end.

    One that hasn't begun becomes a 503, which clients try again; uvicorn would say 500. A stream of server-sent events
    gets an error as its last event. Of any other answer the connection breaks, as it must.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        await self.app(scope, receive, answer.send)
        for message in answer.rest():
            await send(message)


class _Answer:
    def __init__(self, send: Send):
        self._send = send
        self._begun = self._ended = self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self._streams = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    def rest(self) -> list[Message]:
        """What is left to say."""
        body = json.dumps({"error": GONE}).encode()
        if not self._begun:
            headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
            return [{"type": "http.response.start", "status": 503, "headers": headers}, _body(body)]
        if self._streams and not self._ended:
            return [_body(b"data: " + body + b"\n\n")]
        return []


def _body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": False}
