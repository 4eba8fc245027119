"""What OpenAI's generation APIs share: a request's common settings, how one is refused, and who words the answer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm.engine import Token
from llm.sampling import SamplingParams

MAX_CHOICES = 16  # n
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_LOGPROBS = 20

UNION_MEMBERS = ("str", "list[str]", "list[int]")  # as pydantic puts them into the place of an error


class RequestError(Exception):
    """A request that is refused: the HTTP status and the fields of OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """Nothing is converted and nothing unknown is ignored; null and a neutral value mean that the field is absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # Fields of OpenAI's API that the service doesn't have, with the values at which they change nothing: clients send
    # them all the same.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if value is not None and value not in cls.neutral.get(name, ())
        }


class StreamOptions(Strict):
    include_usage: bool = False


class GenerationRequest(Strict):
    """What every request for tokens may say; `top_k` and `min_p` are additions to OpenAI's."""

    model: str
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks, in the client's words; nothing depends on it

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    @property
    def streams_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self, max_new_tokens: int, top_logprobs: int) -> list[SamplingParams]:
        """The engine's settings for each of the `n` answers to a prompt, which differ in their seeds.

        RequestError names the field that is out of bounds.
        """
        try:
            return [
                SamplingParams(
                    max_new_tokens=max_new_tokens,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    seed=None if self.seed is None else self.seed + choice,
                    stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                    top_logprobs=top_logprobs,
                )
                for choice in range(self.n)
            ]
        except ValueError as error:
            raise RequestError(str(error), param=str(error).split()[0]) from error


class Usage(BaseModel):
    """Tokens counted; a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Writer(Protocol):
    """Words the tokens of one request as its endpoint does; a choice is known by the index of its request."""

    def whole(self, answers: list[list[Token]], usage: Usage) -> BaseModel:
        """The object that holds every choice, given its tokens."""

    def opening(self) -> list[BaseModel]:
        """The events of a stream before its first token."""

    def events(self, index: int, token: Token) -> list[BaseModel]:
        """The events that the next token of choice `index` makes; none if it shows nothing."""

    def closing(self, usage: Usage) -> BaseModel:
        """The last event of a stream that was asked for its usage."""


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headwater"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


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
    """The field that an error is about, as in `messages[0].content`, whichever member of a union it was tried as."""
    path = takewhile(lambda part: part not in UNION_MEMBERS, error["loc"][1:])  # after "body"
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".") or None


def _first_word(error: Any) -> str:
    """Checks over several fields have no place of their own; their messages begin with the field's name."""
    return _message(error).split()[0].removesuffix(":")


def _message(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ")


def _sentence(error: Any) -> str:
    field = _field(error)
    if field is None:
        return _message(error)
    given = error.get("input")
    got = f", got {given!r}" if isinstance(given, str | int | float | bool) and len(repr(given)) < 80 else ""
    return f"{field}: {_message(error)}{got}" if error["type"] != "missing" else f"{field} is required"
