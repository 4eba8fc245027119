"""OpenAI's completions: the body of `POST /v1/completions` and the objects that answer it."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from llm.engine import Token
from serve.models import Served
from serve.protocol import MAX_CHOICES, MAX_LOGPROBS, GenerationRequest, Usage, check_text

FinishReason = Literal["stop", "length"]


class CompletionRequest(GenerationRequest):
    """Prompts as text or ids, each continued `n` times."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        prompts = self.prompts()
        if not prompts:
            raise ValueError("prompt is empty: it needs at least one token")
        if len(prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"n times the prompts may be at most {MAX_CHOICES}, got {self.n} times {len(prompts)}")
        for text in prompts:
            if isinstance(text, str):
                check_text("prompt", text)
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or ids."""
        return as_list(self.prompt)


def as_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """Texts or lists of ids, of which one may be given without its list."""
    if isinstance(given, str):
        return [given]
    return [given] if given and isinstance(given[0], int) else given  # type: ignore[return-value]


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
    finish_reason: FinishReason | None = None


class CompletionResponse(BaseModel):
    """A whole answer, or one event of a stream."""

    id: str = Field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class CompletionWriter:
    """Words the tokens of one request as completions; the choices are in the order of the prompts."""

    def __init__(self, request: CompletionRequest, served: Served):
        self.logprobs = request.logprobs is not None
        self.pieces = served.pieces
        self._response = CompletionResponse(model=request.model, choices=[])
        self._sent: Counter[int] = Counter()  # characters of each choice that the stream has shown

    def whole(self, answers: list[list[Token]], usage: Usage) -> CompletionResponse:
        choices = [self._choice(index, tokens) for index, tokens in enumerate(answers)]
        return self._response.model_copy(update={"choices": choices, "usage": usage})

    def opening(self) -> list[BaseModel]:
        return []

    def events(self, index: int, token: Token) -> list[BaseModel]:
        if not (token.text or token.finish_reason or self.logprobs):
            return []
        choice = self._choice(index, [token])
        self._sent[index] += len(token.text)
        return [self._response.model_copy(update={"choices": [choice]})]

    def closing(self, usage: Usage) -> CompletionResponse:
        return self._response.model_copy(update={"usage": usage})

    def _choice(self, index: int, tokens: list[Token]) -> Choice:
        """A choice, or its next piece."""
        return Choice(
            index=index,
            text="".join(token.text for token in tokens),
            logprobs=self._logprobs(tokens, self._sent[index]) if self.logprobs else None,
            finish_reason=_reason(tokens[-1]),
        )

    def _logprobs(self, tokens: list[Token], offset: int) -> Logprobs:
        offsets = [offset]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token.text))
        return Logprobs(
            tokens=[self.pieces.spelling(token.id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[{self.pieces.spelling(i): logprob for i, logprob in token.top} for token in tokens],
            text_offset=offsets,
        )


def _reason(token: Token) -> FinishReason | None:
    return None if token.finish_reason is None else "length" if token.finish_reason == "length" else "stop"
