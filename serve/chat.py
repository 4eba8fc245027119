"""OpenAI's chat completions: the body of `POST /v1/chat/completions` and the objects that answer it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from llm.chat import ASSISTANT, Message, check_turns
from llm.engine import Token
from llm.grammar import Grammar
from llm.tools import MAX_CALLS, calls_grammar
from llm.vocabulary import TOOL_CALL
from serve.models import Served
from serve.protocol import MAX_LOGPROBS, MAX_PROMPT_CHARACTERS, GenerationRequest, Strict, Usage, check_unicode
from serve.tools import (
    MAX_TOOLS,
    MAX_TOOLS_CHARACTERS,
    AnswerReader,
    NamedChoice,
    SentCall,
    ToolCall,
    ToolDefinition,
)

MAX_MESSAGES = 4096

FinishReason = Literal["stop", "length", "tool_calls"]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn; a list of text parts is joined as it stands."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
    }

    role: str
    content: str
    tool_calls: list[SentCall] = Field(default_factory=list)  # of the assistant
    tool_call_id: str | None = None  # which call a tool's turn answers

    @model_validator(mode="before")
    @classmethod
    def _calls_may_be_all(cls, data: Any) -> Any:
        silent = isinstance(data, dict) and data.get("tool_calls") and data.get("content") is None
        return {**data, "content": ""} if silent else data

    @field_validator("role")
    @classmethod
    def _same_role(cls, role: str) -> str:
        return "system" if role == "developer" else role

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        try:
            return "".join(TextPart.model_validate(part).text for part in content)
        except ValidationError:
            raise ValueError('a list must hold text parts only, {"type": "text", "text": "…"}') from None

    def as_turn(self) -> Message:
        """As `llm.chat` takes it. ValueError if a call's arguments are no JSON object."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            functions = [call.function for call in self.tool_calls]
            calls = [{"name": function.name, "arguments": function.as_object()} for function in functions]
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return turn


class ChatRequest(GenerationRequest):
    """A conversation that the assistant is to answer `n` times."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "metadata": ({},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }

    messages: list[ChatMessage] = Field(max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[ToolDefinition] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True

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

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools must have names of their own, and one is there twice")
        text = json.dumps([tool.as_tool() for tool in self.tools], ensure_ascii=False)
        if len(text) > MAX_TOOLS_CHARACTERS:
            raise ValueError(f"tools take at most {MAX_TOOLS_CHARACTERS} characters together, got {len(text)}")
        check_unicode("tools", text)
        if self.forced and not self.called_tools():
            raise ValueError("tool_choice demands a function that tools don't have")
        if self.offered and self.guided_regex is not None:
            raise ValueError("guided_regex and tools don't go together: give one of them, or tool_choice none")
        return self

    @property
    def reply_tokens(self) -> int | None:
        """How long an answer may be; None: as long as the context has room."""
        return self.max_tokens or self.max_completion_tokens

    def turns(self) -> list[Message]:
        """The conversation as `llm.chat` takes it. ValueError says what no template can render."""
        return as_turns(self.messages)

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The functions that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.as_tool() for tool in self.tools]

    @property
    def forced(self) -> bool:
        """Whether a function has to be called."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)

    def called_tools(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        if not isinstance(self.tool_choice, NamedChoice):
            return self.offered
        name = self.tool_choice.function.name
        return [tool for tool in self.offered if tool["function"]["name"] == name]

    @property
    def grammar(self) -> Grammar | None:
        tools = self.called_tools()
        if not tools:
            return super().grammar
        answer = self.response_format.schema_of_answer if self.response_format and not self.forced else None
        most = MAX_CALLS if self.parallel_tool_calls and not isinstance(self.tool_choice, NamedChoice) else 1
        free = not self.forced and answer is None
        return Grammar("lark", calls_grammar(tools, text=free, most=most, answer=answer))

    @property
    def grammar_field(self) -> str:
        return "tools" if self.called_tools() else super().grammar_field


def as_turns(messages: list[ChatMessage]) -> list[Message]:
    """Messages as `llm.chat` takes them. ValueError says what no template can render."""
    return [message.as_turn() for message in _in_order_of_calls(messages)]


def _in_order_of_calls(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The turns, those of tools that follow calls in the order of the calls, by which they are told apart.

    ValueError for one that names another call.
    """
    ordered: list[ChatMessage] = []
    place: dict[str, int] = {}  # of the newest calls
    answers: list[ChatMessage] = []
    for index, message in enumerate(messages):
        if message.role != "tool":
            ordered += sorted(answers, key=lambda answer: place[str(answer.tool_call_id)])
            place, answers = {call.id: number for number, call in enumerate(message.tool_calls)}, []
            ordered.append(message)
        elif not place:
            ordered.append(message)
        elif message.tool_call_id not in place:
            given = message.tool_call_id
            raise ValueError(f"messages[{index}].tool_call_id must name one of the calls before it, got {given!r:.80}")
        else:
            answers.append(message)
    return ordered + sorted(answers, key=lambda answer: place[str(answer.tool_call_id)])


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


class CallingAnswer(BaseModel):
    """An answer that calls functions; it may say something too."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall]


class ChatChoice(BaseModel):
    index: int
    message: Answer | CallingAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChoicePiece(BaseModel):
    index: int
    delta: dict[str, Any]  # what is new: the role, then content and pieces of tool_calls; nothing at the end
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

    def __init__(self, request: ChatRequest, served: Served):
        self.request, self.served = request, served
        self._chunk = ChatChunk(model=request.model, choices=[])
        self._readers = [self._reader() for _ in range(request.n)]

    def whole(self, answers: list[list[Token]], usage: Usage) -> ChatResponse:
        choices = [self._choice(index, tokens) for index, tokens in enumerate(answers)]
        return ChatResponse(model=self.request.model, choices=choices, usage=usage)

    def opening(self) -> list[BaseModel]:
        delta = {"role": ASSISTANT, "content": ""}
        return [self._event(ChoicePiece(index=index, delta=delta)) for index in range(self.request.n)]

    def events(self, index: int, token: Token) -> list[BaseModel]:
        deltas = list(self._readers[index].push(token))
        if self.request.logprobs and not deltas:
            deltas = [{"content": ""}]
        pieces = [ChoicePiece(index=index, delta=delta) for delta in deltas]
        if pieces:
            pieces[0].logprobs = self._logprobs([token])
        if token.finish_reason:
            pieces.append(ChoicePiece(index=index, delta={}, finish_reason=self._reason(index, token)))
        return [self._event(piece) for piece in pieces]

    def closing(self, usage: Usage) -> ChatChunk:
        return self._chunk.model_copy(update={"usage": usage})

    def _reader(self) -> AnswerReader:
        tokenizer = self.served.pieces.tokenizer
        call_token = int(tokenizer.convert_tokens_to_ids(TOOL_CALL)) if self.request.offered else None
        return AnswerReader(self.served.decode, call_token)

    def _event(self, piece: ChoicePiece) -> BaseModel:
        return self._chunk.model_copy(update={"choices": [piece]})

    def _choice(self, index: int, tokens: list[Token]) -> ChatChoice:
        for token in tokens:
            for _ in self._readers[index].push(token):
                pass
        return ChatChoice(
            index=index,
            message=self._message(self._readers[index]),
            logprobs=self._logprobs(tokens),
            finish_reason=self._reason(index, tokens[-1]),
        )

    def _message(self, reader: AnswerReader) -> Answer | CallingAnswer:
        if calls := reader.tool_calls():
            return CallingAnswer(content=reader.text or None, tool_calls=calls)
        return Answer(content=reader.text)

    def _reason(self, index: int, token: Token) -> FinishReason:
        if token.finish_reason == "stop" and self._readers[index].called:
            return "tool_calls"
        return "length" if token.finish_reason == "length" else "stop"

    def _logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return ChatLogprobs(content=[self._token_logprob(token) for token in tokens])

    def _token_logprob(self, token: Token) -> TokenLogprob:
        top = [LikelyToken(**self._spelt(i, logprob)) for i, logprob in token.top]
        return TokenLogprob(**self._spelt(token.id, token.logprob), top_logprobs=top)

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        pieces = self.served.pieces
        return {"token": pieces.spelling(token), "logprob": logprob, "bytes": list(pieces.bytes(token))}
