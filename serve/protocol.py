"""What OpenAI's generation APIs share: a request's common settings, how one is refused, and who words the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm.engine import Token
from llm.grammar import Grammar, GrammarError
from llm.sampling import SamplingParams
from serve.refusals import RequestError

MAX_CHOICES = 128  # n, and n times the prompts of one request
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_LOGPROBS = 20
MAX_BIASES = 1024

# The engine's names of settings that have others here.
OUR_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_ids": "stop_token_ids"}

# What pydantic puts into the place of an error for the member of a union that it tried.
UNION_MEMBERS = ("str", "list[str]", "list[int]", "list[list[int]]", "NamedChoice")


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
            name: value
            for name, value in data.items()
            if value is not None and not any(_same(value, neutral) for neutral in cls.neutral.get(name, ()))
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """The JSON schema says that null stands for an absent field, and which neutral fields there are."""
        reference = handler(core)
        described = handler.resolve_ref_schema(reference)
        fields = described["properties"]
        for name in fields.keys() - described.get("required", []):
            fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
        for name, values in cls.neutral.items():
            fields[name] = {"enum": [*values, None], "description": "accepted, and changes nothing"}
        described["additionalProperties"] = {"type": "null"}
        return reference


def _same(value: Any, neutral: Any) -> bool:
    """Equal, but true isn't 1 and false isn't 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(Strict):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool = False


class NamedSchema(Strict):
    """A JSON schema that the answer is held to, `strict` or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer has to be: any text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and only then")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None if it may be any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None

    @property
    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema.schema_))
        return Grammar("json_object") if self.type == "json_object" else None


class GenerationRequest(Strict):
    """What every request for tokens may say.

    Additions to OpenAI's: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `guided_regex`.
    """

    model: str
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MAX_BIASES)
    min_tokens: int = Field(default=0, ge=0)
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks, in the client's words; nothing depends on it

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    @model_validator(mode="after")
    def _check_grammar(self) -> GenerationRequest:
        if self.guided_regex is not None and self.response_format is not None:
            raise ValueError("guided_regex and response_format both say what an answer must be: give one of them")
        return self

    @property
    def streams_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def grammar(self) -> Grammar | None:
        """What an answer must match. GrammarError if it is no grammar."""
        if self.guided_regex is not None:
            return Grammar("regex", self.guided_regex)
        return self.response_format.grammar if self.response_format else None

    @property
    def grammar_field(self) -> str:
        """The field that says what an answer must match."""
        return "guided_regex" if self.guided_regex is not None else "response_format"

    def settings(self, max_new_tokens: int, top_logprobs: int) -> list[SamplingParams]:
        """The engine's settings for each of the `n` answers to a prompt, which differ in their seeds.

        RequestError names the field that is out of bounds.
        """
        try:
            return [self._settings(choice, max_new_tokens, top_logprobs) for choice in range(self.n)]
        except ValueError as error:
            raise self.refusal(error) from error

    def _settings(self, choice: int, max_new_tokens: int, top_logprobs: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={_id(token): bias for token, bias in self.logit_bias.items()},
            seed=None if self.seed is None else self.seed + choice,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_ids=tuple(self.stop_token_ids),
            top_logprobs=top_logprobs,
            grammar=self.grammar,
        )

    def refusal(self, error: ValueError, prompt_field: str = "prompt") -> RequestError:
        """What the engine finds wrong, in the words of the request's fields."""
        if isinstance(error, GrammarError):
            return RequestError(f"{self.grammar_field}: {error}", param=self.grammar_field)
        message = str(error)
        for theirs, ours in OUR_NAMES.items():
            message = message.replace(f"{theirs} ", f"{ours} ")
        word = message.split()[0]
        return RequestError(message, param=word if word in type(self).model_fields else prompt_field)


def _id(token: str) -> int:
    if not (token.isascii() and token.isdigit() and len(token) < 10):
        raise ValueError(f"logit_bias must have token ids as its keys, got {token!r:.80}")
    return int(token)


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


class ErrorDetail(BaseModel):
    """What was wrong; `param` names the field, `code` the kind of error, where there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object: the body of every status but 200."""

    error: ErrorDetail


def check_text(field: str, text: str) -> None:
    """ValueError unless `text` is whole Unicode, not empty and not longer than a prompt may be."""
    if not text:
        raise ValueError(f"{field} is empty: it needs at least one token")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{field} takes at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}")
    check_unicode(field, text)


def check_unicode(field: str, text: str) -> None:
    """ValueError if `text` holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} isn't valid Unicode: {error.reason} at character {error.start}") from error


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
    path = takewhile(_is_field, error["loc"][1:])  # after "body"
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".") or None


def _is_field(part: str | int) -> bool:
    return isinstance(part, int) or (part not in UNION_MEMBERS and not part.startswith("literal["))


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
