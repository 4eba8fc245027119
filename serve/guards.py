"""What stands between the network and the API: ASGI middleware, the same with Ray Serve and without it.

In this order a request is refused for: a head that is too long, a host that isn't ours, a path or method that the API
doesn't have, too many at once or the end of the service, no key, a spent budget, a body that isn't strict JSON, a
model that its key isn't for. What is let through ends when its client leaves or doesn't read on, at the deadline, or
when its key is revoked; whoever generates for it learns of that by being cancelled. No other site's page may read an
answer: no header of CORS is ever sent, and bodies must be declared as JSON, which browsers ask about first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from serve import bounds, metrics
from serve.bounds import CLOSING, Bounds, Gone
from serve.keys import Key, KeyStore, Unreadable
from serve.limits import Account, Accounts
from serve.metrics import Metrics
from serve.refusals import OverBudget, RequestError

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
METRICS_PATH = "/metrics"
UNKNOWN_PATH = "unknown"
METHODS = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"}
CLIENT_LEFT = 499
RECHECK_S = 1.0  # how often a running request's key is looked up
TAME_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guards:
    """The settings of the guards."""

    keys_file: str | None = None  # None: everyone who can reach the service may use it
    # Names by which it may be addressed; None: any. Without keys on loopback it should be LOOPBACK_HOSTS: else a web
    # page whose name is made to point at 127.0.0.1 talks to the service as if it were the page's own.
    hosts: tuple[str, ...] | None = None
    bounds: Bounds = field(default_factory=Bounds)
    deadline_s: float = 600.0  # from a request's head to the end of its answer
    write_deadline_s: float = 30.0  # until a client has taken a piece of its answer
    max_in_flight: int = 1024
    open_paths: tuple[str, ...] = ("/healthz", "/readyz")  # no key needed: what probes ask can't hold one
    request_logger: str = "headwater.requests"  # gets a line of JSON for each request, at INFO
    sends_request_id: bool = True  # False behind Ray Serve's proxy, which sends it itself


def guard(app: FastAPI, guards: Guards, metrics: Metrics) -> Guard:
    """`app` behind its guards.

    A request's state then has: `account` (serve.limits.Account: `reserve` before tokens are made, `charge` as they
    are), `request_id`, and `deadline` (of time.monotonic). `/metrics` is answered here; where there are keys, it needs
    one, whichever.
    """
    return Guard(app, guards, metrics)


class Stalled(OSError):
    """A client didn't take what was sent to it."""


class Guard:
    """The ASGI application. `accounts` and `keys` may be given for their clocks."""

    def __init__(
        self,
        app: FastAPI,
        guards: Guards,
        metrics: Metrics,
        *,
        accounts: Accounts | None = None,
        keys: KeyStore | None = None,
    ):
        self.app, self.guards, self.metrics = app, guards, metrics
        self.accounts = accounts or Accounts()
        self.keys = keys or (KeyStore(Path(guards.keys_file)) if guards.keys_file else None)
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self.request_logger = logging.getLogger(guards.request_logger)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._count(Exchange(self, scope, receive, send))

    def drain(self) -> None:
        """Let nobody in any more: 503, to be tried elsewhere. What runs goes on."""
        self.draining = True

    async def drained(self) -> None:
        """Wait until nothing runs."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()

    async def _count(self, exchange: Exchange) -> None:
        self.in_flight += 1
        self.metrics.started()
        try:
            await exchange.run()
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()
            exchange.end()


class Refusal(Exception):
    """A request that is refused here, for a reason that the metrics count."""

    def __init__(self, reason: str, error: RequestError):
        super().__init__(reason)
        self.reason, self.error = reason, error


class Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send):
        self.guard, self.guards, self.scope = guard, guard.guards, scope
        self._receive, self._send = receive, send
        self.started = time.monotonic()
        self.id = _request_id(scope)
        self.path, self.model = UNKNOWN_PATH, metrics.OTHER
        self.account = Account()
        self.status: int | None = None  # of the answer's head, once it is sent
        self.complete = self.gone = self.stalled = False
        self._streams = False
        self._body: bytes | None = b""

    async def run(self) -> None:
        """Answer the request, or refuse it."""
        try:
            await self._admit()
            if self.path == METRICS_PATH:
                await self._answer(200, metrics.CONTENT_TYPE, self.guard.metrics.text())
            else:
                await self._serve()
        except Refusal as refusal:
            self.guard.metrics.refused(refusal.reason)
            await self._refuse(refusal.error)
        except Gone:
            self.gone = True
        except Stalled:
            pass
        except asyncio.CancelledError:  # by Ray Serve, whose client has left
            self.gone = not self.complete
            raise

    def end(self) -> None:
        """Settle the account, count and log; no matter how the exchange ended."""
        self.account.close()
        seconds = time.monotonic() - self.started
        status = CLIENT_LEFT if self.gone or self.stalled else self.status or 500
        self.guard.metrics.ended(self.path, status, seconds)
        self.guard.request_logger.info("%s", _Line(self, status, seconds))

    # Before the API

    async def _admit(self) -> None:
        """Judge the request, cheapest things first; a body is read only for who may send it."""
        self._check_head()
        self.path = self._route()
        self._check_room()
        if self.path not in self.guards.open_paths and self.guard.keys:
            self._open_account(self.guard.keys)
        if self.scope["method"] == "POST":
            await self._take_body()
        state = self.scope.setdefault("state", {})
        state |= {"account": self.account, "request_id": self.id, "deadline": self.started + self.guards.deadline_s}

    def _check_head(self) -> None:
        try:
            bounds.check_head(self.scope, self.guards.bounds)
        except RequestError as error:
            raise Refusal("head", error) from None
        if self.guards.hosts is None:
            return
        host = re.sub(r":\d*$", "", (bounds.header(self.scope, b"host") or b"").decode("latin-1").lower())
        if host not in self.guards.hosts:
            message = f"the service isn't called {host[:80]!r}; it is {', '.join(self.guards.hosts)}"
            raise Refusal("host", RequestError(message, status=421))

    def _route(self) -> str:
        """The pattern of the path; what the API doesn't have ends here."""
        method, path = self.scope["method"], self.scope["path"]
        allowed: set[str] = {"GET"} if path == METRICS_PATH else set()
        if path == METRICS_PATH and method == "GET":
            return METRICS_PATH
        for route in self.guard.app.router.routes:
            match, _ = route.matches(self.scope)
            if match is Match.FULL:
                return getattr(route, "path", UNKNOWN_PATH)
            if match is Match.PARTIAL:
                allowed |= getattr(route, "methods", None) or set()
        if allowed:
            headers = {"Allow": ", ".join(sorted(allowed))}
            message = f"{method[:20]} {path[:200]}: there is {headers['Allow']} only"
            raise Refusal("method", RequestError(message, status=405, headers=headers))
        raise Refusal("path", RequestError(f"there is no {path[:200]} here", status=404, code="unknown_url"))

    def _check_room(self) -> None:
        if self.path in ("/healthz", METRICS_PATH):
            return
        if self.guard.draining:
            headers = {"Retry-After": "1", **CLOSING}
            error = RequestError("the service is ending here", status=503, code="unavailable", headers=headers)
            raise Refusal("draining", error)
        if self.path not in self.guards.open_paths and self.guard.in_flight > self.guards.max_in_flight:
            headers = {"Retry-After": "1"}
            message = (
                f"{self.guard.in_flight - 1} requests are being answered, the most is {self.guards.max_in_flight}"
            )
            raise Refusal("overload", RequestError(message, status=429, code="overloaded", headers=headers))

    def _open_account(self, keys: KeyStore) -> None:
        try:
            key = keys.find(self._presented())
        except Unreadable:
            error = RequestError("the service can't read its keys", status=503, code="unavailable")
            raise Refusal("keys", error) from None
        if key is None:
            raise Refusal("key", _unauthorized())
        try:
            self.account = self.guard.accounts.open(key)
        except OverBudget as error:
            raise Refusal("budget", error) from None

    def _presented(self) -> str:
        """The key that the request bears; an empty one is nobody's."""
        scheme, _, key = (bounds.header(self.scope, b"authorization") or b"").decode("latin-1").partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""

    async def _take_body(self) -> None:
        try:
            bounds.check_content_type(self.scope)
            self._body = await bounds.read_body(self._receive, self.guards.bounds)
            value = bounds.parse(self._body, self.guards.bounds.json_depth)
        except RequestError as error:
            raise Refusal("body", error) from None
        model = value.get("model") if isinstance(value, dict) else None
        if isinstance(model, str):
            self._check_model(model)

    def _check_model(self, model: str) -> None:
        self.model = self.guard.metrics.label(model)
        if not self.account.allows(model):
            message = f"there is no model {model[:80]!r} for this key"
            raise Refusal("model", RequestError(message, status=404, param="model", code="model_not_found"))

    # The API's answer

    async def _serve(self) -> None:
        """Let the API answer, and cancel it as soon as nobody is to have the answer."""
        api = asyncio.create_task(self.guard.app(self.scope, self.receive, self.send))
        leaving = asyncio.create_task(self._until_gone())
        try:
            cut = await self._supervise(api, leaving)
        finally:
            leaving.cancel()
            api.cancel()  # nothing happens if it is done
            await asyncio.wait({api})
        failure = _failure(api)
        if cut:
            await self._break_off(cut)
        elif failure and not (self.gone or self.stalled):
            _log_failure(self.id, failure)
            await self._break_off(RequestError("internal error; the service's log has it", status=500))
        if failure:
            _let_go(failure)

    async def _supervise(self, api: asyncio.Task[None], leaving: asyncio.Task[None]) -> RequestError | None:
        """Wait for the end of the answer, or the reason for which it has to be cut off."""
        deadline = self.started + self.guards.deadline_s
        while not api.done():
            left = deadline - time.monotonic()
            if left <= 0 and not self.complete:
                message = f"no whole answer within {self.guards.deadline_s:g} s"
                return RequestError(message, status=504, code="timeout")
            if self._revoked(self.account.key):
                return _unauthorized()
            pending = {api} if leaving.done() else {api, leaving}
            wait = min(RECHECK_S, max(left, 0.01))
            await asyncio.wait(pending, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not api.done() and not self.complete:
                self.gone = True
                return None
        return None

    def _revoked(self, key: Key | None) -> bool:
        """Whether the key was taken out of the file since. While that can't be read, what runs goes on."""
        if key is None or self.guard.keys is None:
            return False
        try:
            return all(key.sha256 != other.sha256 for other in self.guard.keys.all())
        except Unreadable:
            return False

    async def _until_gone(self) -> None:
        with suppress(Exception):  # a proxy that died raises here: its client is gone as well
            while (await self._receive())["type"] != "http.disconnect":
                pass

    async def receive(self) -> Message:
        """For the API: the body, which was read already. That the client left it learns by being cancelled."""
        if self._body is None:
            await asyncio.Future()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Send a part of the answer. Stalled if the client doesn't take it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            self._streams = any(n.lower() == b"content-type" and b"event-stream" in v for n, v in headers)
            message = {**message, "headers": headers + self._own_headers()}
        else:
            self.complete = not message.get("more_body", False)
        try:
            async with asyncio.timeout(self.guards.write_deadline_s):
                await self._send(message)
        except TimeoutError:
            self.stalled = True
            raise Stalled(f"the client took nothing for {self.guards.write_deadline_s:g} s") from None

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self.id.encode())] if self.guards.sends_request_id else []

    async def _break_off(self, error: RequestError) -> None:
        """End the answer by an error: as the answer itself, or as a stream's last event."""
        if self.status is None:
            await self._refuse(error)
        elif self._streams and not self.complete:
            await self.send({"type": "http.response.body", "body": error.event.encode(), "more_body": False})
        # Of another answer a part was sent: the server closes the connection, so that it isn't taken for the whole.

    async def _refuse(self, error: RequestError) -> None:
        await self._answer(error.status, "application/json", json.dumps(error.body).encode(), error.headers)

    async def _answer(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        lines = {"content-type": kind, "content-length": str(len(body)), **(headers or {})}
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in lines.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


@dataclass(frozen=True)
class _Line:
    """What the log has of a request: neither its text nor its key, and no word that it could choose."""

    exchange: Exchange
    status: int
    seconds: float

    def __str__(self) -> str:
        exchange, method = self.exchange, self.exchange.scope["method"]
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": exchange.id,
            "method": method if method in METHODS else "other",
            "path": exchange.path,
            "status": self.status,
            "model": exchange.model,
            "key": exchange.account.key.name if exchange.account.key else None,
            "prompt_tokens": exchange.account.prompt_tokens,
            "completion_tokens": exchange.account.completion_tokens,
            "seconds": round(self.seconds, 4),
        }
        return json.dumps(line)


def _unauthorized() -> RequestError:
    return RequestError(
        "no valid key: send Authorization: Bearer KEY",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _request_id(scope: Scope) -> str:
    """The one that it came with, from a proxy or the client, if it is harmless to write into a log."""
    given = (bounds.header(scope, b"x-request-id") or b"").decode("latin-1")
    return given if TAME_ID.fullmatch(given) else uuid.uuid4().hex


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    """What a task that is done ended with; its cancellation counts as well."""
    try:
        return task.exception()
    except asyncio.CancelledError as error:
        return error


def _let_go(error: BaseException) -> None:
    """Drop what the frames of a failed answer hold: the iterator of its tokens, which frees a slot when it is closed.

    It would be closed with them, but their exceptions and they refer to each other until the garbage is collected.
    """
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:  # a group's parts have the group as their context
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += [one.__context__, *getattr(one, "exceptions", ())]


def _log_failure(request_id: str, error: BaseException) -> None:
    """Where the API failed, without the error's own words: they may quote a prompt."""
    frames = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)))
    logger.error("request %s failed with %s at\n%s", request_id, type(error).__name__, frames)
