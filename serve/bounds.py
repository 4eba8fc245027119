"""What a request may look like at most: its address, headers and body, judged before anything is made of them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope

from serve.refusals import RequestError

CLOSING = {"Connection": "close"}  # for what has more to send than is read
ONLY_BRACKETS = bytes.maketrans(b"{}", b"[]")
NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


@dataclass(frozen=True)
class Bounds:
    """The most of everything."""

    url_bytes: int = 8192
    headers: int = 100
    header_bytes: int = 16 * 1024  # names and values together
    body_bytes: int = 8 * 2**20
    json_depth: int = 64
    body_deadline_s: float = 60.0  # from the request's head to the end of its body


class Gone(Exception):
    """The client went away."""


def check_head(scope: Scope, bounds: Bounds) -> None:
    """RequestError for an address, headers or a declared body that are too long: 414, 431, 413."""
    url = len(scope.get("raw_path") or scope["path"].encode()) + len(scope.get("query_string", b""))
    if url > bounds.url_bytes:
        raise RequestError(f"the address has {url} bytes, the most is {bounds.url_bytes}", status=414)
    if len(headers := scope["headers"]) > bounds.headers:
        raise RequestError(f"{len(headers)} headers, the most is {bounds.headers}", status=431, headers=CLOSING)
    size = sum(len(name) + len(value) for name, value in headers)
    if size > bounds.header_bytes:
        message = f"the headers have {size} bytes, the most is {bounds.header_bytes}"
        raise RequestError(message, status=431, headers=CLOSING)
    length = header(scope, b"content-length") or b"0"
    if not length.isdigit():
        raise RequestError(f"Content-Length isn't a number: {length[:20]!r}", headers=CLOSING)
    # Not as a number: int() refuses more than 4300 digits.
    if len(length) > 18 or int(length) > bounds.body_bytes:
        raise _too_large(length[:20].decode(), bounds)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that name (in lower case)."""
    return next((value for given, value in scope["headers"] if given == name), None)


def check_content_type(scope: Scope) -> None:
    """RequestError, 415, unless the body is said to be JSON.

    Browsers send other types to foreign addresses without asking first, from any page that their user looks at.
    """
    given = (header(scope, b"content-type") or b"").decode("latin-1")
    kind, _, parameters = given.partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        message = f"the body must be a JSON object, sent with Content-Type: application/json, got {given[:80]!r}"
        raise RequestError(message, status=415, headers=CLOSING)


async def read_body(receive: Receive, bounds: Bounds) -> bytes:
    """The whole body. RequestError if it is too long (413) or too slow (408); Gone."""
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(bounds.body_deadline_s):
            async for piece in _pieces(receive):
                size += len(piece)
                if size > bounds.body_bytes:
                    raise _too_large(f"more than {bounds.body_bytes}", bounds)
                pieces.append(piece)
    except TimeoutError:
        message = f"the body wasn't there within {bounds.body_deadline_s:g} s"
        raise RequestError(message, status=408, headers=CLOSING) from None
    return b"".join(pieces)


async def _pieces(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _too_large(size: str, bounds: Bounds) -> RequestError:
    message = f"the body has {size} bytes, the most is {bounds.body_bytes}"
    return RequestError(message, status=413, headers=CLOSING)


def parse(body: bytes, max_depth: int) -> Any:
    """The value of a body in JSON, as strict as the standard is. RequestError, 400, says what is wrong.

    Refused are: what isn't UTF-8, fields that are there twice, NaN and infinity (1e999 too), half of a surrogate pair,
    and nesting of more than `max_depth`, which is counted before the parser recurses into it.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body isn't UTF-8: {error.reason} at byte {error.start}") from None
    if _too_deep(body, max_depth):
        raise RequestError(f"the body's brackets don't match, or are nested more than {max_depth} deep")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
    except ValueError as error:
        raise RequestError(f"the body isn't valid JSON: {error}") from None
    _check_surrogates(text, value)
    return value


def _too_deep(body: bytes, max_depth: int) -> bool:
    """Whether brackets are left after the innermost pairs have been taken out `max_depth` times.

    Each round is one pass of a C function: four million brackets take a tenth of a second, a loop takes whole ones.
    """
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    outside_strings = b"".join(plain.split(b'"')[::2])
    brackets = outside_strings.translate(ONLY_BRACKETS, NO_BRACKETS)
    for _ in range(max_depth):
        before, brackets = len(brackets), brackets.replace(b"[]", b"")
        if len(brackets) == before:
            break
    return bool(brackets)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the field {name[:80]!r} is there more than once")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _check_surrogates(text: str, value: Any) -> None:
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(
            "the body has half of a surrogate pair (\\ud800 to \\udfff): that is no character"
        ) from None
