"""The grammar of answers that call functions, asked of llguidance itself, and the reader of calls."""

from __future__ import annotations

import json

import llguidance
import llguidance.hf
import pytest

from llm.tools import CallReader, call_text, calls_grammar
from llm.vocabulary import TOOL_CALL, encode_text

ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"unit": {"enum": ["m", 's"']}},
    },
}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "clock"}}]
CLOCK = '{"name": "clock", "arguments": {}}'
ONE = '{"name": "add", "arguments": {"a": 1, "unit": "s\\""}}'


@pytest.fixture(scope="module")
def backend(tokenizer):
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer))


@pytest.fixture
def admits(tokenizer, backend):
    """Whether a grammar admits an answer of a text and calls, as the tokens that a model would make."""

    def check(grammar: str, text: str, *calls: str) -> bool:
        matcher = llguidance.LLMatcher(backend, llguidance.grammar_from("lark", grammar), log_level=0)
        assert not matcher.get_error()
        ids = encode_text(tokenizer, text)
        for call in calls:
            ids += [tokenizer.convert_tokens_to_ids(TOOL_CALL), *encode_text(tokenizer, call)]
        return matcher.consume_tokens(ids) and matcher.is_accepting()

    return check


def test_text_calls_or_both(admits):
    free = calls_grammar(TOOLS, text=True)
    assert admits(free, "Hello\n{}")
    assert admits(free, "", ONE, CLOCK)
    assert admits(free, "Well:", CLOCK)
    forced = calls_grammar(TOOLS, text=False)
    assert admits(forced, "", ONE, CLOCK)
    assert not admits(forced, "")
    assert not admits(forced, "Well:", CLOCK)


def test_one_call_where_one_is_allowed(admits):
    for text in (True, False):
        grammar = calls_grammar(TOOLS, text=text, most=1)
        assert admits(grammar, "", ONE)
        assert not admits(grammar, "", ONE, CLOCK)


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "sub", "arguments": {}}',
        '{"name": "add", "arguments": {}}',
        '{"name": "add", "arguments": {"a": "1"}}',
        '{"name": "add", "arguments": {"a": 1, "b": 2}}',
        '{"name": "add", "arguments": {"a": 1, "unit": "km"}}',
        '{"name": "clock", "arguments": {"a": 1}}',
        '{"name": "clock", "arguments": {}',
        '{"name": "clock",  "arguments": {}}',
    ],
)
def test_no_call_but_of_a_function_with_what_it_takes(admits, call):
    assert not admits(calls_grammar(TOOLS, text=True), "", call)


def test_an_answer_of_a_schema_in_place_of_calls(admits):
    grammar = calls_grammar(TOOLS, text=False, answer={"type": "object", "properties": {"x": {"type": "null"}}})
    assert admits(grammar, '{"x": null}')
    assert admits(grammar, "", CLOCK)
    assert not admits(grammar, "Hello")


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_call_is_read_in_pieces_of_any_size(size):
    arguments = {"a": {"b": ["}", {}]}, "é": '}"'}
    text = call_text({"function": {"name": "add", "arguments": arguments}})
    reader, pieces = CallReader(), []
    for start in range(0, len(text), size):
        assert not reader.whole
        pieces.append(reader.push(text[start : start + size]))
    assert (reader.name, reader.whole) == ("add", True)
    assert "".join(pieces) == reader.arguments == json.dumps(arguments, ensure_ascii=False)


def test_a_call_that_is_cut_off_is_not_whole():
    reader = CallReader()
    assert reader.push('{"name": "add", "argu') == ""
    assert (reader.name, reader.push('ments": {"a": 1'), reader.whole) == (None, '{"a": 1', False)
    assert reader.name == "add"
