"""The HTTP API over the served models: OpenAI's endpoints, ids of texts, health. ASGI, whatever serves it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from llm.chat import DROPPED_TURNS, fit_window, render_turns
from llm.vocabulary import encode_text
from serve import backend, description
from serve.backend import ModelInfo, check_prompt
from serve.chat import ChatRequest, ChatWriter
from serve.completions import CompletionRequest, CompletionWriter
from serve.embeddings import MAX_INPUT_TOKENS, EmbeddingRequest, embedding_response
from serve.generation import KNOWN_FAILURES, Generation, Meter, refused
from serve.guards import Guard, Guards, guard
from serve.limits import Account
from serve.metrics import Metrics
from serve.models import Model, ModelList, Served
from serve.protocol import GenerationRequest, Writer, refusal
from serve.refusals import RequestError
from serve.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse


class Api:
    """Answers requests for `models`, by their names, behind `guards`."""

    def __init__(self, models: Mapping[str, Served], guards: Guards | None = None, metrics: Metrics | None = None):
        self.models = dict(models)
        self.guards = guards or Guards()
        self.metrics = metrics or Metrics(self.models)
        self.created = int(time.time())
        # A long text takes seconds to encode: in this thread, so that the tokens of others go on meanwhile.
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")

    def app(self) -> Guard:
        """The ASGI application."""
        app = FastAPI(title="Headwater", openapi_url=None)
        for served in self.models.values():
            self.metrics.watch(served.name, served.backend.load)
        app.get("/healthz", **description.HEALTH)(self.healthz)
        app.get("/readyz", **description.READINESS)(self.readyz)
        app.get("/openapi.json", include_in_schema=False)(lambda: description.of(app, list(self.models)))
        app.get("/v1/models", **description.MODELS)(self.list_models)
        app.get("/v1/models/{name:path}", **description.MODEL)(self.retrieve_model)
        app.post("/v1/completions", **description.COMPLETIONS)(self.completions)
        app.post("/v1/chat/completions", **description.CHAT_COMPLETIONS)(self.chat_completions)
        app.post("/v1/embeddings", **description.EMBEDDINGS)(self.embeddings)
        app.post("/tokenize", **description.TOKENIZE)(self.tokenize)
        app.post("/detokenize", **description.DETOKENIZE)(self.detokenize)
        for kind, handler in ERROR_HANDLERS.items():
            app.add_exception_handler(kind, handler)
        return guard(app, self.guards, self.metrics)

    async def healthz(self) -> Response:
        """200 while the process is up."""
        return JSONResponse({"status": "up"})

    async def readyz(self) -> Response:
        """200 once every model can answer; 503 before, and after a failure."""
        for served in self.models.values():
            if served.backend.failure is not None:
                raise backend.Unavailable(f"{served.name} failed: {served.backend.failure}")
            if not served.backend.ready:
                raise backend.Unavailable(f"{served.name}: the model is still loading")
        return JSONResponse({"status": "ready", "models": list(self.models)})

    async def list_models(self, http: Request) -> ModelList:
        """The models that the request's key may use."""
        allowed = [served for name, served in self.models.items() if _account(http).allows(name)]
        return ModelList(data=[await self._listed(served) for served in allowed])

    async def retrieve_model(self, name: str, http: Request) -> Model:
        """One model."""
        return await self._listed(self._served(name, http))

    async def completions(self, request: CompletionRequest, http: Request) -> Response:
        """Continue each prompt `n` times; choices are in the order of the prompts."""
        served = self._served(request.model, http)
        _check_generates(served, await served.backend.describe())
        prompts = await self._in_thread(_encode, served, request.prompts())
        settings = request.settings(request.max_tokens, request.logprobs or 0)
        requests = [(prompt, params) for prompt in prompts for params in settings]
        return await self._generate(request, requests, CompletionWriter(request, served), served, http, "prompt")

    async def chat_completions(self, request: ChatRequest, http: Request) -> Response:
        """Answer a conversation `n` times. A header counts the oldest turns that the context had no room for."""
        served = self._served(request.model, http)
        info = await served.backend.describe()
        _check_generates(served, info)
        prompt, dropped = await self._in_thread(_render, served, request, info.context)
        settings = request.settings(request.reply_tokens or info.context - len(prompt), request.top_logprobs or 0)
        requests = [(prompt, params) for params in settings]
        response = await self._generate(request, requests, ChatWriter(request, served), served, http, "messages")
        response.headers[DROPPED_TURNS] = str(dropped)
        return response

    async def embeddings(self, request: EmbeddingRequest, http: Request) -> Response:
        """One vector for each input."""
        served = self._served(request.model, http)
        info = await served.backend.describe()
        if not info.embeds:
            raise RequestError(f"{served.name} gives no embeddings", param="model", code="model_not_supported")
        prompts = await self._in_thread(_encode, served, request.inputs())
        count = _check_inputs(prompts, info)
        _account(http).reserve(count, 0)
        vectors = await served.backend.embed(prompts)
        _account(http).charge(count, 0)
        self.metrics.tokens(served.name, count, 0)
        body = embedding_response(request, vectors, count)
        return Response(body.model_dump_json(), media_type="application/json")

    async def tokenize(self, request: TokenizeRequest, http: Request) -> TokenizeResponse:
        """The ids of a text, or of a conversation's prompt."""
        served = self._served(request.model, http)
        info = await served.backend.describe()
        ids = await self._in_thread(_tokenize, served, request)
        spelt = [served.pieces.spelling(token) for token in ids] if request.return_token_strs else None
        return TokenizeResponse(count=len(ids), max_model_len=info.context, tokens=ids, token_strs=spelt)

    async def detokenize(self, request: DetokenizeRequest, http: Request) -> DetokenizeResponse:
        """The text of ids."""
        served = self._served(request.model, http)
        size = len(served.tokenizer)
        outside = next((token for token in request.tokens if not 0 <= token < size), None)
        if outside is not None:
            raise RequestError(f"tokens have id {outside}, outside the tokenizer's {size}", param="tokens")
        text = await self._in_thread(served.tokenizer.decode, request.tokens)
        return DetokenizeResponse(prompt=text)

    async def _generate(
        self,
        request: GenerationRequest,
        requests: list[backend.Request],
        writer: Writer,
        served: Served,
        http: Request,
        prompt_field: str,
    ) -> Response:
        meter = Meter(served.name, _account(http), self.metrics)
        generation = Generation(request, requests, writer, served, meter, prompt_field)
        return await generation.respond(http.state.deadline - time.monotonic())

    async def _listed(self, served: Served) -> Model:
        info = await served.backend.describe()
        return Model(
            id=served.name,
            created=self.created,
            max_model_len=info.context,
            generates=info.generates,
            embeds=info.embeds,
            lineage=dict(served.lineage),
        )

    def _served(self, name: str, http: Request) -> Served:
        """The model of that name, if the request's key may use it."""
        if name in self.models and _account(http).allows(name):
            return self.models[name]
        there = ", ".join(repr(name) for name in self.models if _account(http).allows(name))
        message = f"no model {name!r:.80} here; there is {there or 'none'}"
        raise RequestError(message, status=404, param="model", code="model_not_found")

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function, *arguments)


def _account(http: Request) -> Account:
    return http.state.account


def _check_generates(served: Served, info: ModelInfo) -> None:
    if not info.generates:
        message = f"{served.name} fills in words, it can't continue a text"
        raise RequestError(message, param="model", code="model_not_supported")


def _check_inputs(prompts: list[list[int]], info: ModelInfo) -> int:
    """How many tokens the inputs have together. RequestError if the model couldn't read them."""
    count = sum(map(len, prompts))
    if count > MAX_INPUT_TOKENS:
        raise RequestError(f"input takes at most {MAX_INPUT_TOKENS} tokens together, got {count}", param="input")
    try:
        for prompt in prompts:
            check_prompt(prompt, 0, info)
    except ValueError as error:
        raise RequestError(f"input: {error}", param="input") from error
    return count


# In the encoding thread


def _encode(served: Served, texts: list[str] | list[list[int]]) -> list[list[int]]:
    return [encode_text(served.tokenizer, text) if isinstance(text, str) else text for text in texts]


def _render(served: Served, request: ChatRequest, context: int) -> tuple[list[int], int]:
    """The ids of the conversation's newest turns, which leave room for a reply, and how many turns they leave out.

    A reply whose length isn't given has a quarter of the context at least.
    """
    turns, tools = request.turns(), request.offered
    try:
        kept = fit_window(served.tokenizer, turns, context, request.reply_tokens or context // 4, tools)
        return render_turns(served.tokenizer, kept, tools), len(turns) - len(kept)
    except ValueError as error:
        raise RequestError(str(error), param="tools" if str(error).startswith("tools") else "messages") from error


def _tokenize(served: Served, request: TokenizeRequest) -> list[int]:
    if request.prompt is not None:
        return encode_text(served.tokenizer, request.prompt)
    try:
        tools = [tool.as_tool() for tool in request.tools]
        return render_turns(served.tokenizer, request.turns(), tools)
    except ValueError as error:
        raise RequestError(str(error), param="tools" if str(error).startswith("tools") else "messages") from error


# How requests are refused


def _refused(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_failure(_: Request, error: Any) -> Response:
    return _refused(refused(error))


async def _on_invalid(_: Request, error: Any) -> Response:
    return _refused(refusal(list(error.errors())))


async def _on_http_error(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _refused(RequestError(message, status=error.status_code, headers=error.headers))


async def _on_our_mistake(_: Request, error: Any) -> Response:
    return _refused(RequestError("internal error; the service's log has it", status=500))


ERROR_HANDLERS: dict[type[Exception], Any] = {
    **dict.fromkeys(KNOWN_FAILURES, _on_failure),
    RequestValidationError: _on_invalid,
    HTTPException: _on_http_error,
    Exception: _on_our_mistake,
}
