"""Clients of a streaming service, as light as they can be: they run on the cores of what they measure.

A connection for each request; what comes is kept as it is, with the time of each read, and looked at afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.bench.measure import Invalid

READ_BYTES = 65536


class Answer(NamedTuple):
    """What came of one request. Times are of time.perf_counter.

    error: what the stream said instead of its end, or None. reason: why it ended.
    """

    status: int
    sent: float
    first: float  # when the first event came
    last: float
    text: str
    reason: str | None
    error: str | None


async def ask(address: str, body: dict[str, Any]) -> Answer:
    """One streamed completion. address: `http://HOST:PORT/v1`."""
    where = urlsplit(address)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    sent = time.perf_counter()
    writer.write(_request(where.netloc, f"{where.path}/completions", body))
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        pieces = []
        while piece := await reader.read(READ_BYTES):
            pieces.append((time.perf_counter(), piece))
    finally:
        writer.close()
    return _answer(head, pieces, sent)


async def vanish(address: str, body: dict[str, Any]) -> None:
    """Ask, wait for the first event, and be gone without a word."""
    where = urlsplit(address)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(_request(where.netloc, f"{where.path}/completions", body))
        await reader.readuntil(b"data:")
    finally:
        writer.transport.abort()


def closed_loop(address: str, clients: Sequence[Sequence[dict[str, Any]]]) -> list[list[Answer]]:
    """Each client sends its requests one after the other, all clients at once."""

    async def client(bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        return [await ask(address, body) for body in bodies]

    async def everyone() -> list[list[Answer]]:
        return await asyncio.gather(*map(client, clients))

    return asyncio.run(everyone())


def open_loop(address: str, bodies: Sequence[dict[str, Any]], starts: Sequence[float]) -> list[Answer]:
    """Each request is sent `starts` seconds after the beginning, whatever became of the others."""

    async def one(body: dict[str, Any], start: float) -> Answer:
        await asyncio.sleep(start)
        return await ask(address, body)

    async def everyone() -> list[Answer]:
        return await asyncio.gather(*map(one, bodies, starts))

    return asyncio.run(everyone())


def whole(answer: Answer) -> Answer:
    """The same, or Invalid if it isn't an answer to its end."""
    if answer.status != 200 or answer.error or not answer.reason:
        raise Invalid(f"status {answer.status}, ended for {answer.reason}: {answer.error or answer.text[-200:]}")
    return answer


def _request(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json",
        f"Content-Length: {len(content)}", "Connection: close", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + content


def _answer(head: bytes, pieces: list[tuple[float, bytes]], sent: float) -> Answer:
    status = int(head.split(None, 2)[1])
    body = b"".join(piece for _, piece in pieces)
    if b"transfer-encoding: chunked" in head.lower():
        body = _without_framing(body)
    first = next((at for at, piece in pieces if b"data:" in piece), float("nan"))
    last = pieces[-1][0] if pieces else float("nan")
    if status != 200:
        return Answer(status, sent, first, last, "", None, body.decode(errors="replace"))
    return Answer(status, sent, first, last, *_read(body))


def _read(body: bytes) -> tuple[str, str | None, str | None]:
    """Text, the reason for its end, and the error of a body of server-sent events."""
    text, reason, error = "", None, None
    for line in body.splitlines():
        if not line.startswith(b"data:") or line == b"data: [DONE]":
            continue
        event = json.loads(line[len(b"data:") :])
        if "error" in event:
            error = json.dumps(event["error"])
        for choice in event.get("choices", ()):
            text += choice.get("text") or ""
            reason = choice.get("finish_reason") or reason
    return text, reason, error


def _without_framing(body: bytes) -> bytes:
    """What the chunks of an HTTP/1.1 body hold."""
    parts, at = [], 0
    while at < len(body):
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)
