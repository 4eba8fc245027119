"""The HTTP API over a replica: OpenAI's completions, chat, models; health. Plain FastAPI, whatever serves it."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from llm.chat import DROPPED_TURNS, fit_window, render_turns
from llm.engine import Token
from llm.pieces import Pieces
from llm.vocabulary import encode_text
from serve import backend, replica
from serve.chat import ChatRequest, ChatWriter
from serve.completions import CompletionRequest, CompletionWriter
from serve.protocol import GenerationRequest, Model, ModelList, RequestError, Usage, Writer, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_BODY_BYTES = 8 * 2**20


class Api:
    """Answers requests for the model `model_name` with the engine of `replica`."""

    def __init__(self, engines: replica.Replica, model_name: str):
        self.replica = engines
        self.model_name = model_name
        self.created = int(time.time())
        # A long text takes seconds to encode: in this thread, so that the tokens of others go on meanwhile.
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(title="Headwater", openapi_url=None)
        app.add_middleware(LimitBody)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)
        for kind, handler in ERROR_HANDLERS.items():
            app.add_exception_handler(kind, handler)
        return app

    async def healthz(self) -> Response:
        """200 while the process is up."""
        return JSONResponse({"status": "up"})

    async def readyz(self) -> Response:
        """200 once the model is loaded and has made a token; 503 before, and after a failure."""
        context = self.replica.engine.context
        return JSONResponse({"status": "ready", "model": self.model_name, "context": context})

    async def models(self) -> ModelList:
        return ModelList(data=[self._model()])

    async def model(self, name: str) -> Model:
        self._check_model(name)
        return self._model()

    async def completions(self, request: CompletionRequest) -> Response:
        """Continue each prompt `n` times; choices are in the order of the prompts."""
        self._check_model(request.model)
        prompts = await self._in_thread(self._prompts, request)
        settings = request.settings(request.max_tokens, request.logprobs or 0)
        requests = [(prompt, params) for prompt in prompts for params in settings]
        return await self._respond(request, requests, CompletionWriter(request, self._pieces))

    async def chat_completions(self, request: ChatRequest) -> Response:
        """Answer a conversation `n` times; the header DROPPED_TURNS counts turns that had no room in the context."""
        self._check_model(request.model)
        prompt, dropped = await self._in_thread(self._prompt, request)
        room = self.replica.engine.context - len(prompt)
        settings = request.settings(request.reply_tokens or room, request.top_logprobs or 0)
        requests = [(prompt, params) for params in settings]
        response = await self._respond(request, requests, ChatWriter(request, self._pieces))
        response.headers[DROPPED_TURNS] = str(dropped)
        return response

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        # A copy: the engine's own is used in the engine's thread.
        return copy.deepcopy(self.replica.engine.tokenizer)

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self._tokenizer)

    def _model(self) -> Model:
        return Model(id=self.model_name, created=self.created)

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            message = f"no model {name!r} here; there is {self.model_name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function, *arguments)

    def _prompts(self, request: CompletionRequest) -> list[list[int]]:
        return [encode_text(self._tokenizer, p) if isinstance(p, str) else p for p in request.prompts()]

    def _prompt(self, request: ChatRequest) -> tuple[list[int], int]:
        """The ids of the conversation's newest turns, which leave room for a reply, and how many turns they leave out.

        A reply whose length isn't given has a quarter of the context at least.
        """
        turns, context = request.turns(), self.replica.engine.context
        try:
            kept = fit_window(self._tokenizer, turns, context, request.reply_tokens or context // 4)
            return render_turns(self._tokenizer, kept), len(turns) - len(kept)
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error

    async def _respond(self, request: GenerationRequest, requests: list[backend.Request], writer: Writer) -> Response:
        """The answer to `request`, for which the engine is asked `requests`. RequestError if one could never run."""
        try:
            self.replica.check(requests)
        except ValueError as error:
            raise RequestError(str(error), param="prompt") from error
        if request.stream:
            return StreamingResponse(self._events(request, requests, writer), media_type="text/event-stream")
        answers: list[list[Token]] = [[] for _ in requests]
        async for index, token in self.replica.tokens(requests):
            answers[index].append(token)
        body = writer.whole(answers, _usage(request, requests, sum(map(len, answers))))
        return Response(body.model_dump_json(), media_type="application/json")

    async def _events(
        self, request: GenerationRequest, requests: Sequence[backend.Request], writer: Writer
    ) -> AsyncIterator[str]:
        """Server-sent events: the writer's, then the usage if it was asked for, and the end."""
        hidden = set() if request.streams_usage else {"usage"}
        for event in writer.opening():
            yield _event(event, hidden)
        count = 0
        try:
            async for index, token in self.replica.tokens(requests):
                count += 1
                for event in writer.events(index, token):
                    yield _event(event, hidden)
        except backend.Unavailable as error:
            yield f"data: {json.dumps(RequestError(str(error), status=503, code='unavailable').body)}\n\n"
            return
        if request.streams_usage:
            yield _event(writer.closing(_usage(request, requests, count)), hidden)
        yield "data: [DONE]\n\n"


def _usage(request: GenerationRequest, requests: Sequence[backend.Request], completion_tokens: int) -> Usage:
    prompt_tokens = sum(len(prompt) for prompt, _ in requests[:: request.n])
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _event(body: BaseModel, hidden: Set[str]) -> str:
    return f"data: {body.model_dump_json(exclude=set(hidden))}\n\n"


class LimitBody:
    """ASGI middleware: 413 for a body of more than MAX_BODY_BYTES, 411 for one that doesn't say how long it is."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = _body_error(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (_refused(error) if error else self.app)(scope, receive, send)


def _body_error(scope: Scope) -> RequestError | None:
    length = dict(scope["headers"]).get(b"content-length", b"")
    if not length.isdigit():
        return RequestError("the request has no Content-Length", status=411)
    if int(length) > MAX_BODY_BYTES:
        return RequestError(f"the body has {int(length)} bytes, the most is {MAX_BODY_BYTES}", status=413)
    return None


def _refused(error: RequestError, **headers: str) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _on_refusal(_: Request, error: Any) -> Response:
    return _refused(error)


async def _on_invalid(_: Request, error: Any) -> Response:
    return _refused(refusal(list(error.errors())))


async def _on_http_error(request: Request, error: Any) -> Response:
    return _refused(RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code))


async def _on_unavailable(_: Request, error: Any) -> Response:
    return _refused(RequestError(str(error), status=503, code="unavailable"), **{"Retry-After": "5"})


async def _on_overload(_: Request, error: Any) -> Response:
    return _refused(RequestError(str(error), status=429, code="overloaded"), **{"Retry-After": "1"})


async def _on_our_mistake(_: Request, error: Any) -> Response:
    return _refused(RequestError("internal error; the service's log has it", status=500))


ERROR_HANDLERS = {
    RequestError: _on_refusal,
    RequestValidationError: _on_invalid,
    HTTPException: _on_http_error,
    backend.Unavailable: _on_unavailable,
    backend.Overloaded: _on_overload,
    Exception: _on_our_mistake,
}
