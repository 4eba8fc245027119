"""OpenAI's completions API: what a request may say, how it is refused, and the objects that answer it."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm.sampling import SamplingParams

MAX_CHOICES = 16  # n
MAX_ANSWERS = 64  # n times the prompts of one request
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_LOGPROBS = 20

# Fields of OpenAI's API that the service doesn't have, with the values at which they change nothing: clients send them
# all the same.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "suffix": ("",),
}


class RequestError(Exception):
    """A request that is refused: the HTTP status and the fields of OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    """Nothing is converted and nothing unknown is ignored; null and a neutral value mean that the field is absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if value is not None and value not in NEUTRAL.get(name, ())
        }


class StreamOptions(_Strict):
    include_usage: bool = False


class CompletionRequest(_Strict):
    """Body of `POST /v1/completions`; `top_k` and `min_p` are additions to OpenAI's."""

    model: str
    prompt: str | list[str] | list[int]
    max_tokens: int = Field(default=16, ge=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks, in the client's words; nothing depends on it

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        prompts = self.prompts()
        if not prompts:
            raise ValueError("prompt is empty: it needs at least one token")
        if len(prompts) * self.n > MAX_ANSWERS:
            raise ValueError(f"n times the prompts may be at most {MAX_ANSWERS}, got {self.n} times {len(prompts)}")
        for text in prompts:
            if isinstance(text, str):
                _check_text(text)
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [token for token in self.prompt if isinstance(token, int)]
        return [ids] if ids else [text for text in self.prompt if isinstance(text, str)]

    def sampling(self, choice: int) -> SamplingParams:
        """The engine's settings for answer number `choice` to a prompt; each has a seed of its own.

        RequestError names the field that is out of bounds.
        """
        try:
            return SamplingParams(
                max_new_tokens=self.max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                seed=None if self.seed is None else self.seed + choice,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                top_logprobs=self.logprobs or 0,
            )
        except ValueError as error:
            raise RequestError(str(error), param=str(error).split()[0]) from error


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("prompt is empty: it needs at least one token")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"prompt takes at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt isn't valid Unicode: {error.reason} at character {error.start}") from error


def refusal(errors: list[Any]) -> RequestError:
    """The error that says all that pydantic found wrong (`ValidationError.errors()`), with the fields' names."""
    if any(error["type"] == "json_invalid" for error in errors):
        return RequestError(f"the body isn't valid JSON: {errors[0].get('ctx', {}).get('error', '')}")
    unknown = [str(_field(error)) for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        return RequestError(f"unsupported fields: {', '.join(unknown)}", param=unknown[0], code="unsupported_field")
    if any(tuple(error["loc"]) == ("body",) and error["type"] != "value_error" for error in errors):
        return RequestError("the body must be a JSON object, sent with Content-Type: application/json")
    said = dict.fromkeys(_sentence(error) for error in errors)
    return RequestError("; ".join(said), param=_field(errors[0]) or _first_word(errors[0]))


def _field(error: Any) -> str | None:
    """The name of the field that an error is about, without the request's part and the union's member."""
    names = [str(part) for part in error["loc"] if part != "body"]
    return names[0] if names else None


def _first_word(error: Any) -> str:
    """Checks over several fields have no place of their own; their messages begin with the field's name."""
    return _message(error).split()[0]


def _message(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ")


def _sentence(error: Any) -> str:
    field = _field(error)
    if field is None:
        return _message(error)
    given = error.get("input")
    got = f", got {given!r}" if isinstance(given, str | int | float | bool) and len(repr(given)) < 80 else ""
    return f"{field}: {_message(error)}{got}" if error["type"] != "missing" else f"{field} is required"


class Logprobs(BaseModel):
    """Of a choice's tokens, each spelt as text or `bytes:\\x…`; `text_offset` is where their text starts in `text`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A whole answer, or one event of a stream."""

    id: str = Field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headwater"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
