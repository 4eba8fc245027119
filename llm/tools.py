"""Functions that the assistant may call: how they and their calls are written, read, and held to by a grammar.

A tool is `{"type": "function", "function": {"name": …, "description": …, "parameters": JSON schema}}`, a call
`{"function": {"name": …, "arguments": {…}}}`, as transformers' chat templates take them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm.vocabulary import TOOL_CALL

Tool = Mapping[str, Any]

MAX_CALLS = 16  # in one answer
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

# White space is as `json.dumps` writes it: left free, an unsure model fills its answer with blanks.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_HEAD = re.compile(r'\{"name": "([^"\\]*)", "arguments": ')


def functions_text(tools: Sequence[Tool]) -> str:
    """What the first system's turn says of the functions."""
    return "Functions:" + "".join(f"\n{_json(tool['function'])}" for tool in tools)


def call_text(call: Mapping[str, Any]) -> str:
    """A call as the assistant writes it, after the token TOOL_CALL."""
    function = call["function"]
    return f'{{"name": {_json(function["name"])}, "arguments": {_json(function["arguments"])}}}'


def calls_grammar(
    tools: Sequence[Tool], *, text: bool, most: int = MAX_CALLS, answer: Mapping[str, Any] | None = None
) -> str:
    """A grammar (llguidance's Lark) of answers that may call `tools`, with arguments that fit their schemas.

    With `text` any text may stand before the calls or for them; with `answer`, a JSON schema, what it describes may
    stand for them; with neither, something is called. At most `most` calls.
    """
    rules = [f"start: {'text call{0,%d}' if text else 'answer | call{1,%d}' if answer else 'call{1,%d}'}" % most]
    rules += [r"text: /(.|\n)*/"] if text else [f"answer: {_json_rule(answer)}"] if answer else []
    rules += [f"call: {TOOL_CALL} ({' | '.join(f'call_{index}' for index in range(len(tools)))})"]
    for index, tool in enumerate(tools):
        function = tool["function"]
        head = _json(f'{{"name": {_json(function["name"])}, "arguments": ')
        rules += [f'call_{index}: {head} arguments_{index} "}}"']
        rules += [f"arguments_{index}: {_json_rule(function.get('parameters') or NO_PARAMETERS)}"]
    return "\n".join(rules) + "\n"


class CallReader:
    """Reads one call out of its text as it comes: `name`, once it is there, and pieces of the arguments' JSON."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""  # what `push` has returned
        self._text = ""  # of the whole call
        self._start = 0  # of the arguments in it

    def push(self, text: str) -> str:
        """Take the next piece of the call's text; return the next piece of the arguments, often ""."""
        self._text += text
        if self.name is None:
            head = _HEAD.match(self._text)
            if head is None:
                return ""
            self.name, self._start = head[1], head.end()
        # The last bracket may be the call's own.
        sure = self._text[self._start :].removesuffix("}")
        piece = sure[len(self.arguments) :]
        self.arguments = sure
        return piece

    @property
    def whole(self) -> bool:
        """Whether the call is complete: the name of a function and an object of arguments."""
        try:
            return self.name is not None and isinstance(json.loads(self._text)["arguments"], dict)
        except ValueError:
            return False


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {_json({**schema, 'x-guidance': _SPACING})}"


def _json(value: Any) -> str:
    """As `tojson` of transformers' chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)
