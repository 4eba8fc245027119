"""Functions in chat completions: what a request says of them, and an answer split into its text and its calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from llm.engine import Token
from llm.text_stream import TextStream
from llm.tools import CallReader
from serve.protocol import Strict

MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 65_536  # all of them as JSON
NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class Function(Strict):
    """A function that the model may call. Its arguments are held to `parameters`, `strict` or not."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _check_object(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("type", "object") != "object":
            raise ValueError(f'must be a JSON schema of type "object", got type {schema["type"]!r:.80}')
        return {"type": "object", **schema}


class ToolDefinition(Strict):
    type: Literal["function"]
    function: Function

    def as_tool(self) -> dict[str, Any]:
        """As `llm.tools` takes it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionName(Strict):
    name: str


class NamedChoice(Strict):
    """The one function that has to be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    name: str = Field(pattern=NAME)
    arguments: str  # a JSON object

    def as_object(self) -> dict[str, Any]:
        """The arguments. ValueError if they are no JSON object."""
        try:
            arguments = json.loads(self.arguments, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments must be a JSON object as text, got {self.arguments!r:.80}")
        return arguments


class SentCall(Strict):
    """A call of an earlier answer, sent back."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Called(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an answer. `arguments` is JSON that fits the function's schema, unless the answer was cut off."""

    id: str
    type: Literal["function"] = "function"
    function: Called


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} isn't JSON")


class AnswerReader:
    """Splits one answer into its text and its calls as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], call_token: int | None):
        """`call_token` begins a call; None: the answer is all text."""
        self.text = ""
        self.calls: list[_Call] = []
        self._decode, self._call_token = decode, call_token
        self._ids: list[int] = []  # of the text

    def push(self, token: Token) -> Iterator[dict[str, Any]]:
        """Take the next token; the deltas of a stream that it makes."""
        if token.id == self._call_token:
            yield from self._end_text() if not self.calls else self.calls[-1].finish()
            self.calls.append(_Call(len(self.calls), self._decode))
        elif self.calls:
            yield from self.calls[-1].push(token.id)
        else:
            self._ids.append(token.id)
            yield from self._say(token.text)
        if token.finish_reason and self.calls:
            yield from self.calls[-1].finish()

    @property
    def called(self) -> bool:
        """Whether functions were called, and no call is cut off."""
        return bool(self.calls) and all(call.reader.whole for call in self.calls)

    def tool_calls(self) -> list[ToolCall]:
        """The calls as far as they came, less one whose function isn't known yet."""
        return [call.whole(call.reader.name) for call in self.calls if call.reader.name is not None]

    def _end_text(self) -> Iterator[dict[str, Any]]:
        # The engine may hold text back that could have begun a stop string.
        yield from self._say(self._decode(self._ids)[len(self.text) :])

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        self.text += text
        if text:
            yield {"content": text}


class _Call:
    def __init__(self, index: int, decode: Callable[[list[int]], str]):
        self.index, self.id = index, f"call_{uuid.uuid4().hex[:24]}"
        self.reader = CallReader()
        self._stream = TextStream(decode)
        self._named = False  # whether the stream has shown the name

    def push(self, token: int) -> Iterator[dict[str, Any]]:
        yield from self._read(self._stream.push(token))

    def finish(self) -> Iterator[dict[str, Any]]:
        yield from self._read(self._stream.finish())

    def whole(self, name: str) -> ToolCall:
        return ToolCall(id=self.id, function=Called(name=name, arguments=self.reader.arguments))

    def _read(self, text: str) -> Iterator[dict[str, Any]]:
        piece = self.reader.push(text)
        if self.reader.name is not None and not self._named:
            self._named = True
            function = {"name": self.reader.name, "arguments": piece}
            yield {"tool_calls": [{"index": self.index, "id": self.id, "type": "function", "function": function}]}
        elif piece:
            yield {"tool_calls": [{"index": self.index, "function": {"arguments": piece}}]}
