"""Heads and bodies at their bounds; JSON against the standard's own parser."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.bounds import Bounds, Gone, check_content_type, check_head, parse, read_body
from serve.refusals import RequestError

BOUNDS = Bounds(url_bytes=40, headers=4, header_bytes=100, body_bytes=1000)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def scope(path: str = "/a", query: bytes = b"", headers: Any = ()) -> dict[str, Any]:
    return {"type": "http", "path": path, "raw_path": path.encode(), "query_string": query, "headers": list(headers)}


def status(call, *arguments) -> int:
    """200, or that of the refusal."""
    try:
        call(*arguments)
    except RequestError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (scope("/" + "a" * 39), 200),
        (scope("/" + "a" * 40), 414),
        (scope("/a", b"q" * 38), 200),
        (scope("/a", b"q" * 39), 414),
        (scope(headers=[(b"a", b"b")] * 4), 200),
        (scope(headers=[(b"a", b"b")] * 5), 431),
        (scope(headers=[(b"a", b"b" * 99)]), 200),
        (scope(headers=[(b"a", b"b" * 100)]), 431),
        (scope(headers=[(b"content-length", b"1000")]), 200),
        (scope(headers=[(b"content-length", b"1001")]), 413),
        (scope(headers=[(b"content-length", b"9" * 80)]), 413),
        (scope(headers=[(b"content-length", b"-1")]), 400),
        (scope(headers=[(b"content-length", "²".encode("latin-1"))]), 400),
    ],
)
def test_heads(head, expected):
    assert status(check_head, head, BOUNDS) == expected


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ('application/json; charset="utf-8"', 200),
        ("application/json; charset=latin-1", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
def test_bodies_are_declared_as_json(content_type, expected):
    assert status(check_content_type, scope(headers=[(b"content-type", content_type.encode())])) == expected
    assert status(check_content_type, scope()) == 415


def received(*messages: dict[str, Any]):
    """What a server hands over; then it is silent."""
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Future()
        return waiting.pop(0)

    return receive


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_is_counted_while_it_is_read():
    whole = asyncio.run(read_body(received(piece(b"a" * 999), piece(b"b", more=False)), BOUNDS))
    assert whole == b"a" * 999 + b"b"
    with pytest.raises(RequestError, match="more than 1000") as refused:
        asyncio.run(read_body(received(piece(b"a" * 999), piece(b"bc")), BOUNDS))
    assert (refused.value.status, refused.value.headers) == (413, {"Connection": "close"})


def test_a_body_that_does_not_end_is_given_up():
    with pytest.raises(RequestError, match=r"wasn't there within 0.05 s") as refused:
        asyncio.run(read_body(received(piece(b"a")), Bounds(body_deadline_s=0.05)))
    assert refused.value.status == 408


def test_a_client_may_leave_before_its_body_is_whole():
    with pytest.raises(Gone):
        asyncio.run(read_body(received(piece(b"a"), {"type": "http.disconnect"}), BOUNDS))


@settings(max_examples=30)
@given(VALUES)
def test_any_json_is_read_as_the_standard_library_reads_it(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse(text.encode(), 64) == json.loads(text)


@given(st.text(alphabet='[]{}"\\:,1a', max_size=40))
def test_no_text_gets_past_that_is_no_json_or_too_deep(text):
    """Against the parser, and against a depth counted by walking over the value."""
    try:
        value = json.loads(text)
    except ValueError:
        assert status(parse, text.encode(), 3) == 400
    else:
        twice = text.count(":") > sum(map(len, _objects(value)))
        assert status(parse, text.encode(), 3) == (400 if _depth(value) > 3 or twice else 200)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _objects(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict) else []) + [found for part in inner for found in _objects(part)]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth(opening):
    closing = "]" if opening == "[" else "}"
    assert parse((opening * 64 + "1" + closing * 64).encode(), 64)
    for depth in (65, 100_000):
        for text in (opening * depth + "1" + closing * depth, opening * depth):
            with pytest.raises(RequestError, match="64 deep") as refused:
                parse(text.encode(), 64)
            assert refused.value.status == 400
    in_a_string = json.dumps({"a": "[" * 1000 + '\\"' + "{" * 1000})
    assert parse(in_a_string.encode(), 1) == json.loads(in_a_string)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "isn't valid JSON"),
        (b'{"a": 1', "brackets don't match"),
        (b'{"a": 1, "a": 1}', "'a' is there more than once"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "'b' is there more than once"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[Infinity]", "Infinity is not"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"[1e999]", "1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "isn't valid JSON"),
        (b'"\xff"', "isn't UTF-8: invalid start byte at byte 1"),
        (b'"\xed\xa0\x80"', "isn't UTF-8"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDC00a": 1}', "surrogate"),
        (b'"\\udc00\\ud800"', "surrogate"),
        ("﻿{}".encode(), "isn't valid JSON"),
        (b"{} {}", "isn't valid JSON"),
    ],
)
def test_json_that_is_none(body, said):
    with pytest.raises(RequestError, match=said) as refused:
        parse(body, 64)
    assert refused.value.status == 400


def test_a_pair_of_surrogates_is_a_character():
    assert parse(b'"\\ud83d\\ude00 \\\\ud800"', 64) == "😀 \\ud800"
