"""Texts as ids and ids as text: the bodies of `POST /tokenize` and `POST /detokenize`, and what answers them."""

from __future__ import annotations

from pydantic import BaseModel, Field, model_validator

from llm.chat import Message, check_turns
from serve.chat import MAX_MESSAGES, ChatMessage, as_turns
from serve.protocol import MAX_PROMPT_CHARACTERS, Strict, check_text
from serve.tools import MAX_TOOLS, ToolDefinition


class TokenizeRequest(Strict):
    """A text, or a conversation that the assistant is to answer."""

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, max_length=MAX_MESSAGES)
    tools: list[ToolDefinition] = Field(default_factory=list, max_length=MAX_TOOLS)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_either(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        if self.tools and self.messages is None:
            raise ValueError("tools are only allowed with messages")
        if self.prompt is not None:
            check_text("prompt", self.prompt)
        elif sum(len(message.content) for message in self.messages or ()) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"messages take at most {MAX_PROMPT_CHARACTERS} characters together")
        else:
            check_turns(self.turns())
        return self

    def turns(self) -> list[Message]:
        return as_turns(self.messages or [])


class TokenizeResponse(BaseModel):
    """The ids and, if asked for, each of them spelt as text or `bytes:\\x…`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    model: str
    tokens: list[int] = Field(max_length=MAX_PROMPT_CHARACTERS)


class DetokenizeResponse(BaseModel):
    """The text, with special tokens spelt out."""

    prompt: str
