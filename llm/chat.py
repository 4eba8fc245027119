"""A conversation as ids: the chat template, rendered so that nothing a turn says can pass for a special token.

A message is a mapping with `role` (one of `llm.vocabulary.ROLES`) and `content`, both text; the assistant's may have
`tool_calls`, and a conversation `tools` that it may call (`llm.tools`). For ordinary text the ids are those of the
tokenizer's own `apply_chat_template`; a special token spelt out in a content stays text here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm.tools import Tool, call_text, functions_text
from llm.vocabulary import CHAT_TEMPLATE, END_OF_TURN, PLAIN_CHAT_TEMPLATE, ROLES, TOOL_CALL, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ASSISTANT = "assistant"
# The header of a reply over HTTP that says how many of the request's oldest turns the context had no room for.
DROPPED_TURNS = "x-headwater-dropped-turns"

Message = Mapping[str, Any]


def render_turns(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> list[int]:
    """The prompt of a conversation that the assistant answers next: ids (T,), the assistant's header last.

    ValueError if `check_turns` refuses the messages, or if the tokenizer has another chat template.
    """
    check_turns(messages)
    ids, _ = render_conversation(tokenizer, messages, tools)
    return [*ids, _special_id(tokenizer, f"<|{ASSISTANT}|>")]


def render_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> tuple[list[int], list[int]]:
    """Ids (T,) of a whole conversation, and a mask (T,): 1 for what the assistant produces, its <|end|> included.

    ValueError if `check_messages` refuses the messages, or if the tokenizer has another chat template.
    """
    check_messages(messages)
    _check_template(tokenizer, messages, tools)
    ids = _functions_turn(tokenizer, tools)
    mask = [0] * len(ids)
    for message in messages:
        turn = _turn(tokenizer, message)
        ids += turn
        mask += [0] + [int(message["role"] == ASSISTANT)] * (len(turn) - 1)
    return ids, mask


def fit_window(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    context: int,
    reply_tokens: int,
    tools: Sequence[Tool] = (),
) -> list[Message]:
    """The newest messages whose prompt leaves room for `reply_tokens` in `context` tokens, in their order.

    Every system turn stays, and what is said of `tools`. Of the others the oldest go first, by whole exchanges: a
    user's turn with all that answers it. ValueError, with the numbers, if not even the newest exchange fits, or if
    `render_turns` would refuse.
    """
    check_turns(messages)
    _check_template(tokenizer, messages, tools)
    *older, newest = _exchanges(messages)
    kept = {*newest, *(index for index, message in enumerate(messages) if message["role"] == "system")}
    used = 1 + len(_functions_turn(tokenizer, tools))  # 1: the assistant's header
    used += sum(len(_turn(tokenizer, messages[index])) for index in kept)
    if used + reply_tokens > context:
        raise ValueError(
            f"messages: the newest turn's prompt of {used} tokens and a reply of {reply_tokens} make "
            f"{used + reply_tokens}, more than the context of {context}: shorten either"
        )
    for exchange in reversed(older):  # encoding no more of a long past than fits
        used += sum(len(_turn(tokenizer, messages[index])) for index in exchange)
        if used + reply_tokens > context:
            break
        kept.update(exchange)
    return [messages[index] for index in sorted(kept)]


def check_turns(messages: Sequence[Message]) -> None:
    """ValueError unless the assistant can answer `messages`: as `check_messages`, and the last turn isn't its own."""
    check_messages(messages)
    if messages[-1]["role"] == ASSISTANT:
        raise ValueError("messages end with the assistant's own turn: the last must be a user's, tool's or system's")


def check_messages(messages: Sequence[Message]) -> None:
    """ValueError, with the place, the value and what is allowed, unless `messages` are turns of a conversation."""
    if not messages:
        raise ValueError("messages are empty: a conversation has at least one turn")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} must be an object with role and content, got {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{place}.role must be one of {', '.join(ROLES)}, got {role!r:.80}")
    if not isinstance(content, str):
        raise ValueError(f"{place}.content must be text, got {content!r:.80}")
    if message.get("tool_calls") and role != ASSISTANT:
        raise ValueError(f"{place}.tool_calls: only the assistant calls functions, got them in a turn of role {role}")
    _check_unicode(f"{place}.content", content)
    for number, call in enumerate(message.get("tool_calls") or ()):
        _check_unicode(f"{place}.tool_calls[{number}]", call_text(call))


def _check_unicode(place: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} isn't valid Unicode: {error.reason} at character {error.start}") from error


def _check_template(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    if tokenizer.chat_template == CHAT_TEMPLATE:
        return
    if tokenizer.chat_template != PLAIN_CHAT_TEMPLATE:
        found = "no chat template" if tokenizer.chat_template is None else "another chat template"
        raise ValueError(f"messages can't be rendered: the tokenizer has {found}, use one that Headwater trained")
    if tools or any(message.get("tool_calls") for message in messages):
        raise ValueError("tools can't be rendered: the model's chat template has none, use a model whose has")


def _exchanges(messages: Sequence[Message]) -> list[list[int]]:
    """Indexes of all but the system turns, in groups that each begin with a user's turn; at least one group."""
    groups: list[list[int]] = [[]]
    for index, message in enumerate(messages):
        if message["role"] == "user" and groups[-1]:
            groups.append([])
        if message["role"] != "system":
            groups[-1].append(index)
    return groups


def _turn(tokenizer: PreTrainedTokenizerFast, message: Message) -> list[int]:
    header, end = _special_id(tokenizer, f"<|{message['role']}|>"), _special_id(tokenizer, END_OF_TURN)
    ids = [header, *encode_text(tokenizer, message["content"])]
    for call in message.get("tool_calls") or ():
        ids += [_special_id(tokenizer, TOOL_CALL), *encode_text(tokenizer, call_text(call))]
    return [*ids, end]


def _functions_turn(tokenizer: PreTrainedTokenizerFast, tools: Sequence[Tool]) -> list[int]:
    if not tools:
        return []
    text = functions_text(tools)
    _check_unicode("tools", text)
    return _turn(tokenizer, {"role": "system", "content": text})


def _special_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))
