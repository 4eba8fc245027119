"""One request for tokens: asked of a model, counted, answered as a whole or as server-sent events."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence, Set
from typing import Any

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from llm.engine import Token
from serve.backend import DeadlineExceeded, Overloaded, Request, Unavailable
from serve.limits import Account
from serve.metrics import Metrics
from serve.models import Served
from serve.protocol import GenerationRequest, Usage, Writer
from serve.refusals import RequestError

Tokens = AsyncIterator[tuple[int, Token]]


class Meter:
    """Counts one request's tokens, for who pays for them and for the metrics."""

    def __init__(self, model: str, account: Account, metrics: Metrics):
        self.completion_tokens = 0
        self._model, self._account, self._metrics = model, account, metrics
        self._started, self._first, self._last = time.monotonic(), 0.0, 0.0
        self._prompt_tokens = 0

    def reserve(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Before any is made. RequestError if the request's key may not use so many."""
        self._account.reserve(prompt_tokens, max_new_tokens)
        self._prompt_tokens = prompt_tokens

    def count(self) -> None:
        """One more token was made."""
        self._last = time.monotonic()
        if self.completion_tokens == 0:
            self._first = self._last
            self._metrics.first_token(self._model, self._first - self._started)
            self._account.charge(self._prompt_tokens, 0)
        self.completion_tokens += 1
        self._account.charge(0, 1)

    def close(self) -> None:
        """No more will be made; of a request that got none, nothing is counted."""
        if self.completion_tokens:
            self._metrics.tokens(self._model, self._prompt_tokens, self.completion_tokens, self._last - self._first)

    def usage(self) -> Usage:
        total = self._prompt_tokens + self.completion_tokens
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self.completion_tokens, total_tokens=total)


class Generation:
    """Asks the model for `requests`, `n` in turn for each prompt, and has a writer word what comes."""

    def __init__(
        self,
        request: GenerationRequest,
        requests: Sequence[Request],
        writer: Writer,
        served: Served,
        meter: Meter,
        prompt_field: str,
    ):
        self.request, self.requests, self.writer = request, requests, writer
        self.backend, self.meter, self.prompt_field = served.backend, meter, prompt_field

    async def respond(self, deadline_s: float | None) -> Response:
        """The answer. RequestError and the backend's exceptions, if it fails before the first token."""
        await self._check()
        self.meter.reserve(
            sum(len(prompt) for prompt, _ in self.requests[:: self.request.n]),
            sum(params.max_new_tokens for _, params in self.requests),
        )
        tokens = self._counted(deadline_s)
        # A stream's status is sent with its first token: whatever keeps it from coming has a status of its own.
        first = await self._first(tokens)
        if not self.request.stream:
            return await self._whole(first, tokens)
        return EventStream(self._events(first, tokens), tokens.aclose)

    async def _check(self) -> None:
        """A grammar may take long to compile, so that is done in a thread."""
        try:
            if self.requests[0][1].grammar is None:
                self.backend.check(self.requests)
            else:
                await asyncio.to_thread(self.backend.check, self.requests)
        except ValueError as error:
            raise self.request.refusal(error, self.prompt_field) from error

    async def _counted(self, deadline_s: float | None) -> AsyncGenerator[tuple[int, Token]]:
        tokens = self.backend.tokens(self.requests, deadline_s=deadline_s)
        try:
            async for index, token in tokens:
                self.meter.count()
                if token.finish_reason == "error":
                    raise RequestError("what the answer is held to failed", status=500, code="grammar_failed")
                yield index, token
        finally:
            self.meter.close()
            await tokens.aclose()  # type: ignore[attr-defined]

    async def _first(self, tokens: Tokens) -> tuple[int, Token]:
        try:
            return await anext(tokens)
        except ValueError as error:
            raise self.request.refusal(error, self.prompt_field) from error

    async def _whole(self, first: tuple[int, Token], tokens: AsyncGenerator[tuple[int, Token]]) -> Response:
        answers: list[list[Token]] = [[] for _ in self.requests]
        try:
            async for index, token in _chained(first, tokens):
                answers[index].append(token)
        finally:
            await tokens.aclose()
        body = self.writer.whole(answers, self.meter.usage())
        return Response(body.model_dump_json(), media_type="application/json")

    async def _events(self, first: tuple[int, Token], tokens: Tokens) -> AsyncIterator[str]:
        """Server-sent events: the writer's, then the usage if it was asked for, and the end; or an error."""
        hidden = set() if self.request.streams_usage else {"usage"}
        for event in self.writer.opening():
            yield _event(event, hidden)
        try:
            async for index, token in _chained(first, tokens):
                for event in self.writer.events(index, token):
                    yield _event(event, hidden)
        except KNOWN_FAILURES as error:
            yield refused(error).event
            return
        if self.request.streams_usage:
            yield _event(self.writer.closing(self.meter.usage()), hidden)
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed at once when the client has left."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], Awaitable[Any]]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            await self._close()


KNOWN_FAILURES = (RequestError, Unavailable, Overloaded, DeadlineExceeded)


def refused(error: Exception) -> RequestError:
    """One of KNOWN_FAILURES as the API words it."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        return RequestError(str(error), status=429, code="overloaded", headers=headers)
    if isinstance(error, DeadlineExceeded):
        return RequestError(str(error), status=504, code="timeout")
    return RequestError(str(error), status=503, code="unavailable", headers={"Retry-After": "5"})


async def _chained(first: tuple[int, Token], tokens: Tokens) -> Tokens:
    yield first
    async for pair in tokens:
        yield pair


def _event(body: BaseModel, hidden: Set[str]) -> str:
    return f"data: {body.model_dump_json(exclude=set(hidden))}\n\n"
