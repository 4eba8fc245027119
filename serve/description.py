"""What the API says of itself at /openapi.json: for each endpoint its statuses, their bodies, and the models there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve.chat import ChatResponse
from serve.completions import CompletionResponse
from serve.embeddings import EmbeddingResponse
from serve.models import Model, ModelList
from serve.protocol import ErrorBody
from serve.tokens import DetokenizeResponse, TokenizeResponse


class Health(BaseModel):
    status: str


class Readiness(BaseModel):
    status: str
    models: list[str]


# What the guards may answer, whatever is asked.
GUARDED = {
    408: "the body took too long to come",
    413: "the body is too long",
    414: "the address is too long",
    421: "the service isn't called that",
    429: "too much at once: Retry-After says when to come back",
    431: "the headers are too long",
    500: "an error of the service's own",
    503: "no model to answer: still loading, failed, or ending",
    504: "the answer took too long",
}
KEYED = {401: "no valid key"}
NAMING = {404: "there is no such model for this key"}
READING = {400: "the request isn't what the endpoint takes", 415: "the body isn't declared as JSON"}


def _endpoint(body: type[BaseModel], *statuses: dict[int, str], streams: bool = False) -> dict[str, Any]:
    """Arguments of FastAPI's routes."""
    described = {
        number: {"model": ErrorBody, "description": text} for each in statuses for number, text in each.items()
    }
    answered: dict[str, Any] = {"model": body, "description": "the answer"}
    if streams:
        events = {"type": "string", "description": "server-sent events, with stream=true"}
        answered["content"] = {"text/event-stream": {"schema": events}}
    return {"response_model": None, "responses": {200: answered, **described}}


HEALTH = _endpoint(Health, GUARDED)
READINESS = _endpoint(Readiness, GUARDED)
MODELS = _endpoint(ModelList, GUARDED, KEYED)
MODEL = _endpoint(Model, GUARDED, KEYED, NAMING)
COMPLETIONS = _endpoint(CompletionResponse, GUARDED, KEYED, NAMING, READING, streams=True)
CHAT_COMPLETIONS = _endpoint(ChatResponse, GUARDED, KEYED, NAMING, READING, streams=True)
EMBEDDINGS = _endpoint(EmbeddingResponse, GUARDED, KEYED, NAMING, READING)
TOKENIZE = _endpoint(TokenizeResponse, GUARDED, KEYED, NAMING, READING)
DETOKENIZE = _endpoint(DetokenizeResponse, GUARDED, KEYED, NAMING, READING)


def of(app: FastAPI, models: Iterable[str]) -> dict[str, Any]:
    """The description of `app`, with the names of `models` where a model is to be named."""
    names = list(models)
    said = get_openapi(title="Headwater", version="1", routes=app.routes)
    for path in said["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours is 400
            for parameter in operation.get("parameters", []):
                parameter["schema"]["enum"] = names
    schemas = said["components"]["schemas"]
    for name in [name for name in schemas if name in ("HTTPValidationError", "ValidationError")]:
        del schemas[name]
    for name, schema in schemas.items():
        if name.endswith("Request"):
            schema["properties"]["model"]["enum"] = names
    said["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    said["security"] = [{"key": []}, {}]
    return said
