"""The HTTP API over a replica: OpenAI's completions, the models, health. Plain FastAPI, whatever serves it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from llm.engine import Token
from llm.pieces import Pieces
from llm.vocabulary import encode_text
from serve import replica
from serve.protocol import (
    Choice,
    CompletionRequest,
    CompletionResponse,
    Logprobs,
    Model,
    ModelList,
    RequestError,
    Usage,
    refusal,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_BODY_BYTES = 8 * 2**20


class Api:
    """Answers requests for the model `model_name` with the engine of `replica`."""

    def __init__(self, engines: replica.Replica, model_name: str):
        self.replica = engines
        self.model_name = model_name
        self.created = int(time.time())

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(title="Headwater", openapi_url=None)
        app.add_middleware(LimitBody)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/completions", response_model=None)(self.completions)
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

    async def completions(self, request: CompletionRequest) -> CompletionResponse | StreamingResponse:
        """Continue each prompt `n` times; choices are in the order of the prompts."""
        self._check_model(request.model)
        requests = self._requests(request)
        if request.stream:
            return StreamingResponse(self._events(request, requests), media_type="text/event-stream")
        return await self._answer(request, requests)

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

    def _requests(self, request: CompletionRequest) -> list[replica.Request]:
        """What the engine is asked for, `n` for each prompt. RequestError if it could never run."""
        settings = [request.sampling(choice) for choice in range(request.n)]
        prompts = [encode_text(self._tokenizer, p) if isinstance(p, str) else p for p in request.prompts()]
        requests = [(prompt, params) for prompt in prompts for params in settings]
        try:
            self.replica.check(requests)
        except ValueError as error:
            raise RequestError(str(error), param="prompt") from error
        return requests

    async def _answer(self, request: CompletionRequest, requests: Sequence[replica.Request]) -> CompletionResponse:
        answers: list[list[Token]] = [[] for _ in requests]
        async for index, token in self.replica.tokens(requests):
            answers[index].append(token)
        choices = [self._choice(request, index, tokens, 0) for index, tokens in enumerate(answers)]
        usage = _usage(request, requests, sum(map(len, answers)))
        return CompletionResponse(model=self.model_name, choices=choices, usage=usage)

    async def _events(self, request: CompletionRequest, requests: Sequence[replica.Request]) -> AsyncIterator[str]:
        """Server-sent events, one for each token that shows anything."""
        response = CompletionResponse(model=self.model_name, choices=[])
        lengths = [0] * len(requests)  # of the text sent for each choice, in characters
        count = 0
        try:
            async for index, token in self.replica.tokens(requests):
                count += 1
                if token.text or token.finish_reason or request.logprobs is not None:
                    choice = self._choice(request, index, [token], lengths[index])
                    yield _event(response.model_copy(update={"choices": [choice]}))
                lengths[index] += len(token.text)
        except replica.Unavailable as error:
            yield _event(RequestError(str(error), status=503, code="unavailable").body)
            return
        if request.stream_options and request.stream_options.include_usage:
            yield _event(response.model_copy(update={"usage": _usage(request, requests, count)}))
        yield "data: [DONE]\n\n"

    def _choice(self, request: CompletionRequest, index: int, tokens: list[Token], offset: int) -> Choice:
        """A choice, or its next piece, which starts `offset` characters into its text."""
        return Choice(
            index=index,
            text="".join(token.text for token in tokens),
            logprobs=None if request.logprobs is None else self._logprobs(tokens, offset),
            finish_reason=tokens[-1].finish_reason,
        )

    def _logprobs(self, tokens: list[Token], offset: int) -> Logprobs:
        offsets = [offset]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token.text))
        return Logprobs(
            tokens=[self._pieces.spelling(token.id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[{self._pieces.spelling(i): logprob for i, logprob in token.top} for token in tokens],
            text_offset=offsets,
        )


def _usage(request: CompletionRequest, requests: Sequence[replica.Request], completion_tokens: int) -> Usage:
    """A prompt counts once, however many answers it gets."""
    prompt_tokens = sum(len(prompt) for prompt, _ in requests[:: request.n])
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _event(body: CompletionResponse | dict[str, Any]) -> str:
    text = body.model_dump_json() if isinstance(body, CompletionResponse) else json.dumps(body)
    return f"data: {text}\n\n"


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
    replica.Unavailable: _on_unavailable,
    replica.Overloaded: _on_overload,
    Exception: _on_our_mistake,
}
