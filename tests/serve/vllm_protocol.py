"""A server that speaks as vLLM's does (0.33), over our own engine: what the adapter for vLLM is tested against.

Written after vLLM's description of its API, and apart from the adapter. Fields that the description hasn't are
refused, where vLLM would pass over them: a misspelt one is to be seen. As vLLM may, it sends several tokens at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm.engine import Token
from llm.grammar import Grammar
from llm.sampling import SamplingParams
from serve.backend import Unavailable
from serve.replica import Replica

MAX_LOGPROBS = 100


class StructuredOutputs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None

    def grammar(self) -> Grammar:
        if self.json_ is not None:
            return Grammar("json_schema", self.json_ if isinstance(self.json_, str) else json.dumps(self.json_))
        return Grammar("regex", self.regex) if self.regex is not None else Grammar("json_object")


class Completion(BaseModel):
    """The fields of vLLM's that the server knows."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: list[Annotated[int, Field(ge=0)]]
    stream: Literal[True]
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = Field(1.0, ge=0)
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = Field(None, le=MAX_LOGPROBS)
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_tokens,
            min_new_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_ids=tuple(self.stop_token_ids),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            top_logprobs=self.logprobs or 0,
            grammar=self.structured_outputs.grammar() if self.structured_outputs else None,
        )


class Server:
    """The application; what tests do to it are its attributes."""

    def __init__(self, replica: Replica, name: str, *, at_once: int = 3):
        self.replica, self.name, self.at_once = replica, name, at_once
        self.healthy = True
        self.asked: list[dict[str, Any]] = []  # bodies, as they came
        self.refuse: Response | None = None  # what is answered instead
        self.fail_after: int | None = None  # events of a stream, after which it says that the engine failed

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.post("/v1/completions")(self.completions)
        return app

    async def health(self) -> Response:
        return Response(status_code=200 if self.healthy and self.replica.ready else 503)

    async def models(self) -> Response:
        card = {"id": self.name, "object": "model", "owned_by": "vllm", "max_model_len": self.replica.engine.context}
        return JSONResponse({"object": "list", "data": [card]})

    async def completions(self, request: Request) -> Response:
        self.asked.append(await request.json())
        if self.refuse is not None:
            return self.refuse
        try:
            asked = Completion.model_validate(self.asked[-1])
            self.replica.check([(asked.prompt, asked.params())])
        except (ValidationError, ValueError) as error:
            return JSONResponse(_error(str(error), "BadRequestError", 400), status_code=400)
        return StreamingResponse(self.events(asked), media_type="text/event-stream")

    async def events(self, asked: Completion) -> AsyncIterator[str]:
        held: list[Token] = []
        sent = 0
        try:
            async for _, token in self.replica.tokens([(asked.prompt, asked.params())]):
                held.append(token)
                if len(held) == self.at_once or token.finish_reason or not sent:
                    yield _event(self._chunk(asked, held, first=not sent))
                    held, sent = [], sent + 1
                if sent == self.fail_after:
                    raise Unavailable("EngineCore encountered an issue")
        except Unavailable as error:
            yield _event(_error(str(error), "InternalServerError", 500))
        yield "data: [DONE]\n\n"

    def _chunk(self, asked: Completion, tokens: list[Token], first: bool) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": "".join(token.text for token in tokens),
            "logprobs": _logprobs(tokens) if asked.logprobs is not None else None,
            "finish_reason": tokens[-1].finish_reason,
            "stop_reason": None,
            "prompt_token_ids": asked.prompt if first and asked.return_token_ids else None,
            "token_ids": [token.id for token in tokens] if asked.return_token_ids else None,
        }
        about = {"id": "cmpl-0", "object": "text_completion", "created": int(time.time()), "model": asked.model}
        return {**about, "choices": [choice]}


def _logprobs(tokens: list[Token]) -> dict[str, Any]:
    """Under the drawn token's id its own, and then the likeliest ones'."""
    return {
        "tokens": [_spelt(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {_spelt(token.id): token.logprob} | {_spelt(likely): logprob for likely, logprob in token.top}
            for token in tokens
        ],
        "text_offset": [0 for _ in tokens],
    }


def _spelt(token: int) -> str:
    return f"token_id:{token}"


def _error(message: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def main(words: list[str]) -> None:
    """`vllm serve FOLDER` with the flags that ours is started with."""
    import uvicorn

    from llm.loading import load

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("folder")
    backend = "--structured-outputs-config.backend"
    for flag in ("--served-model-name", "--host", "--dtype", "--logprobs-mode", "--generation-config", backend):
        parser.add_argument(flag, required=True)
    for flag in ("--port", "--max-num-seqs", "--tensor-parallel-size", "--max-logprobs"):
        parser.add_argument(flag, type=int, required=True)
    given = parser.parse_args(words)

    def app() -> FastAPI:  # made by the server, in its event loop
        replica = Replica(lambda: load(given.folder, slots=given.max_num_seqs))
        return Server(replica, given.served_model_name).app()

    uvicorn.run(app, factory=True, host=given.host, port=given.port, log_level="warning")


async def until(condition) -> None:
    """Wait for as long as it takes, within the test's own limit."""
    while not condition():
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1:])
