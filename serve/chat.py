"""OpenAI's chat completions: the body of `POST /v1/chat/completions` and the objects that answer it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from llm.chat import ASSISTANT, Message, check_turns
from llm.engine import FinishReason, Token
from llm.pieces import Pieces
from serve.protocol import (
    MAX_LOGPROBS,
    MAX_PROMPT_CHARACTERS,
    GenerationRequest,
    Strict,
    Usage,
)

MAX_MESSAGES = 4096


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn; a list of text parts is joined as it stands."""

    role: str
    content: str
    # Which call a tool's turn answers: the conversation's order says the same.
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        try:
            return "".join(TextPart.model_validate(part).text for part in content)
        except ValidationError:
            raise ValueError('a list must hold text parts only, {"type": "text", "text": "…"}') from None


class ChatRequest(GenerationRequest):
    """A conversation that the assistant is to answer `n` times."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "presence_penalty": (0,),
        "response_format": ({"type": "text"},),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    }

    messages: list[ChatMessage] = Field(max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        length = sum(len(message.content) for message in self.messages)
        if length > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"messages take at most {MAX_PROMPT_CHARACTERS} characters together, got {length}")
        check_turns(self.turns())
        return self

    @property
    def reply_tokens(self) -> int | None:
        """How long an answer may be; None: as long as the context has room."""
        return self.max_tokens or self.max_completion_tokens

    def turns(self) -> list[Message]:
        return [{"role": message.role, "content": message.content} for message in self.messages]


class LikelyToken(BaseModel):
    """A token as text or `bytes:\\x…`, its bytes, and the natural logarithm of the model's probability for it."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """One entry for each token that was generated, the end of the turn included."""

    content: list[TokenLogprob]
    refusal: None = None


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChoicePiece(BaseModel):
    index: int
    delta: dict[str, str]  # what is new: the role, then content; nothing at the end
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class _Response(BaseModel):
    id: str = Field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str


class ChatResponse(_Response):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Response):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChoicePiece]
    usage: Usage | None = None


class ChatWriter:
    """Words the tokens of one request as chat completions."""

    def __init__(self, request: ChatRequest, pieces: Pieces):
        self.request = request
        self.pieces = pieces
        self._chunk = ChatChunk(model=request.model, choices=[])

    def whole(self, answers: list[list[Token]], usage: Usage) -> ChatResponse:
        choices = [self._choice(index, tokens) for index, tokens in enumerate(answers)]
        return ChatResponse(model=self.request.model, choices=choices, usage=usage)

    def opening(self) -> list[BaseModel]:
        delta = {"role": ASSISTANT, "content": ""}
        return [self._event(ChoicePiece(index=index, delta=delta)) for index in range(self.request.n)]

    def events(self, index: int, token: Token) -> list[BaseModel]:
        pieces = []
        if token.text or self.request.logprobs:
            delta, logprobs = {"content": token.text}, self._logprobs([token])
            pieces.append(ChoicePiece(index=index, delta=delta, logprobs=logprobs))
        if token.finish_reason:
            pieces.append(ChoicePiece(index=index, delta={}, finish_reason=token.finish_reason))
        return [self._event(piece) for piece in pieces]

    def closing(self, usage: Usage) -> ChatChunk:
        return self._chunk.model_copy(update={"usage": usage})

    def _event(self, piece: ChoicePiece) -> BaseModel:
        return self._chunk.model_copy(update={"choices": [piece]})

    def _choice(self, index: int, tokens: list[Token]) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=Answer(content="".join(token.text for token in tokens)),
            logprobs=self._logprobs(tokens),
            finish_reason=tokens[-1].finish_reason,
        )

    def _logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return ChatLogprobs(content=[self._token_logprob(token) for token in tokens])

    def _token_logprob(self, token: Token) -> TokenLogprob:
        top = [LikelyToken(**self._spelt(i, logprob)) for i, logprob in token.top]
        return TokenLogprob(**self._spelt(token.id, token.logprob), top_logprobs=top)

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.pieces.spelling(token), "logprob": logprob, "bytes": list(self.pieces.bytes(token))}
