"""Functions in chat completions, with OpenAI's client: what is rendered, called, held to schemas and refused."""

from __future__ import annotations

import copy
import json
from collections import defaultdict

import jsonschema
import pytest

from llm.chat import render_turns
from llm.engine import Token
from llm.tools import call_text
from llm.vocabulary import PLAIN_CHAT_TEMPLATE, TOOL_CALL, encode_text
from serve.api import _render
from serve.chat import ChatRequest
from serve.models import Served
from serve.refusals import RequestError
from serve.tools import AnswerReader
from tests.models import tiny_tokenizer

ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, "}"]}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "now"}}]
ASKED = [{"role": "user", "content": "Add"}]
CALL = str(tiny_tokenizer().convert_tokens_to_ids(TOOL_CALL))


@pytest.fixture
def chat(client):
    def create(**settings):
        return client.chat.completions.create(
            **{"model": "tiny", "messages": ASKED, "tools": TOOLS, "seed": 5, "max_tokens": 60, **settings}
        )

    return create


def streamed(chunks) -> tuple[str, list[dict], str]:
    """The text, the calls and the finish reason that a stream's deltas make."""
    text, calls, reason = "", defaultdict(lambda: {"id": None, "name": None, "arguments": ""}), None
    for chunk in chunks:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for piece in choice.delta.tool_calls or []:
            call = calls[piece.index]
            call["id"], call["name"] = piece.id or call["id"], piece.function.name or call["name"]
            call["arguments"] += piece.function.arguments or ""
    return text, list(calls.values()), reason


@pytest.mark.parametrize("seed", range(3))
def test_a_demanded_call_fits_the_functions_schema(chat, seed):
    named = {"type": "function", "function": {"name": "add"}}
    choice = chat(tool_choice=named, seed=seed).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.id[:5]) == ("function", "add", "call_")
    jsonschema.validate(json.loads(call.function.arguments), ADD["parameters"])
    text, (streamed_call,), reason = streamed(chat(tool_choice=named, seed=seed, stream=True))
    assert (text, reason) == ("", "tool_calls")
    assert streamed_call["name"] == "add"
    assert streamed_call["arguments"] == call.function.arguments


def test_some_function_can_be_demanded(chat):
    choices = chat(tool_choice="required", parallel_tool_calls=False, n=6).choices
    calls = [choice.message.tool_calls for choice in choices]
    assert all(len(each) == 1 for each in calls)
    assert {call.function.name for (call,) in calls} <= {"add", "now"}
    assert len({call.id for (call,) in calls}) == 6


def test_calls_at_once_and_one_that_is_cut_off(chat):
    """A bias makes one call follow the other until the answer may have no more tokens."""
    now = {"tools": TOOLS[1:], "logit_bias": {CALL: 100}, "max_tokens": 80, "temperature": 0}
    choice = chat(**now).choices[0]
    assert choice.finish_reason == "length"
    *whole, last = choice.message.tool_calls
    assert whole
    assert all((call.function.name, call.function.arguments) == ("now", "{}") for call in whole)
    _, calls, reason = streamed(chat(**now, stream=True))
    assert reason == "length"
    assert [(call["name"], call["arguments"]) for call in calls] == [
        (call.function.name, call.function.arguments) for call in [*whole, last]
    ]


def test_the_model_decides_whether_it_calls(chat, engine):
    called = chat(tool_choice="auto", logit_bias={CALL: 100}, parallel_tool_calls=False).choices[0]
    assert called.finish_reason == "tool_calls"
    said = chat(logit_bias={CALL: -100}, temperature=0).choices[0]
    assert said.message.tool_calls is None
    assert said.message.content
    none = chat(tool_choice="none", temperature=0, max_tokens=8)
    plain = render_turns(engine.tokenizer, ASKED)
    assert none.usage.prompt_tokens == len(plain)
    assert none.choices[0].message.tool_calls is None


def test_an_answer_is_of_the_format_or_calls(chat):
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    said = chat(response_format=answer, logit_bias={CALL: -100}).choices[0]
    assert json.loads(said.message.content) in ("yes", "no")
    called = chat(response_format=answer, logit_bias={CALL: 100}, parallel_tool_calls=False).choices[0]
    assert called.message.tool_calls


def test_functions_calls_and_results_are_in_the_prompt(chat, engine):
    first = chat(tool_choice={"type": "function", "function": {"name": "add"}}).choices[0].message
    second = {"id": "call_b", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    calling = {**first.model_dump(), "tool_calls": [first.model_dump()["tool_calls"][0], second]}
    results = [
        {"role": "tool", "tool_call_id": "call_b", "content": "noon"},
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "3"},
    ]
    answer = chat(messages=[*ASKED, calling, *results], tools=TOOLS[1:], max_tokens=1)
    functions = [
        {"function": {"name": "add", "arguments": json.loads(first.tool_calls[0].function.arguments)}},
        {"function": {"name": "now", "arguments": {}}},
    ]
    said = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": functions},
        {"role": "tool", "content": "3"},  # in the order of the calls
        {"role": "tool", "content": "noon"},
    ]
    own = engine.tokenizer.apply_chat_template(said, TOOLS[1:], add_generation_prompt=True)["input_ids"]
    assert answer.usage.prompt_tokens == len(own)
    request = ChatRequest.model_validate(
        {"model": "tiny", "messages": [*ASKED, calling, *results], "tools": TOOLS[1:], "max_tokens": 1}
    )
    assert _render(Served("tiny", None, engine.tokenizer), request, 256)[0] == own


def test_a_template_without_functions_refuses_them():
    plain = copy.deepcopy(tiny_tokenizer())
    plain.chat_template = PLAIN_CHAT_TEMPLATE
    request = ChatRequest.model_validate({"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 8})
    with pytest.raises(RequestError, match="the model's chat template has none") as refused:
        _render(Served("tiny", None, plain), request, 256)
    assert (refused.value.status, refused.value.param) == (400, "tools")


def test_text_before_calls_is_the_answers_text():
    """The engine holds back what could begin a stop string; when a call begins, that is text after all."""
    tokenizer = tiny_tokenizer()
    text, call = (
        encode_text(tokenizer, "Well: "),
        encode_text(tokenizer, call_text({"function": {"name": "now", "arguments": {}}})),
    )
    reader = AnswerReader(Served("tiny", None, tokenizer).decode, int(CALL))
    shown = [Token("", token, "", 0.0, [], None) for token in [*text, int(CALL), *call]]
    end = Token("", tokenizer.eos_token_id, "", 0.0, [], "stop")
    deltas = [delta for token in [*shown, end] for delta in reader.push(token)]
    assert deltas[0] == {"content": "Well: "}
    assert reader.text == "Well: "
    assert reader.called
    (told,) = reader.tool_calls()
    assert (told.function.name, told.function.arguments) == ("now", "{}")


def function(**fields):
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def calls(arguments: str = "{}", answers: str = "a"):
    sent = {"id": "a", "type": "function", "function": {"name": "now", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [sent]}
    return {"messages": [*ASKED, turn, {"role": "tool", "tool_call_id": answers, "content": "x"}]}


BAD = [
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
    (function(name="a b"), "tools[0].function.name", "a b"),
    (function(parameters=[]), "tools[0].function.parameters", "dictionary"),
    (function(parameters={"type": "string"}), "tools[0].function.parameters", "type \"object\", got type 'string'"),
    (function(parameters={"type": 3}), "tools[0].function.parameters", "got type 3"),
    (function(parameters={"properties": {"a": {"type": "strange"}}}), "tools", "tools: "),
    (function(parameters={"properties": {"a": {"pattern": "("}}}), "tools", "tools: "),
    (function(parameters={"properties": {"a": {"$ref": "http://169.254.169.254/"}}}), "tools", "tools: "),
    (function(description="x" * 65_536), "tools", "at most 65536 characters"),
    (function(code="1 + 1"), "tools[0].function.code", "unsupported fields"),
    ({"tools": TOOLS[:1] * 2}, "tools", "twice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "demands a function"),
    ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "demands a function"),
    ({"tool_choice": "always"}, "tool_choice", "'required'"),
    ({"guided_regex": "x"}, "guided_regex", "don't go together"),
    (calls("{"), "messages[1].tool_calls", "arguments must be a JSON object as text, got '{'"),
    (calls("[NaN]"), "messages[1].tool_calls", "arguments must be a JSON object"),
    (calls(answers="b"), "messages[2].tool_call_id", "one of the calls before it, got 'b'"),
    (
        {"messages": [{**ASKED[0], "tool_calls": calls()["messages"][1]["tool_calls"]}]},
        "messages[0].tool_calls",
        "only the assistant",
    ),
]


@pytest.mark.parametrize(("change", "param", "words"), BAD, ids=[str(case[0])[:50] for case in BAD])
def test_bad_functions_are_refused_by_name(post, change, param, words):
    body = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 8, **change}
    answer = post("chat/completions", **body)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert words in error["message"]
    assert error["param"] == param
