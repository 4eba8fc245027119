"""Files as streams: unpacked within bounds, a line at a time, and bytes as text.

    .gz .bz2 .xz .zst .dz       unpacked while they are read; more than MAX_STREAM_BYTES, or MAX_RATIO times what was
                                packed, is refused as 'decompression bomb'
    damaged or cut short        what comes before the damage is read, then Refusal 'damaged file'

However large the file, memory holds a chunk of it and the line at hand.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
from resiliparse.parse.encoding import detect_encoding

from pipelines.corpus.records import Refusal

MAX_STREAM_BYTES = 1 << 39
MAX_RATIO = 200
# The first of it may be anything: a few megabytes of one letter are harmless, and pack to next to nothing.
RATIO_FREE_BYTES = 16 << 20
# A document is read whole.
MAX_FILE_BYTES = 1 << 30
MAX_LINE_BYTES = 64 << 20
CHUNK_BYTES = 1 << 16
# How much of a file decides on its encoding.
HEAD_BYTES = 1 << 20
# Git's rule: a file with a NUL byte near its beginning isn't text.
BINARY_PROBE_BYTES = 8_000
# Largest share of characters that may be lost to decoding.
MAX_MENDED = 0.01
REPLACEMENT = "\ufffd"

# UTF-32's little-endian mark begins with that of UTF-16, so it is looked for first.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
SURROGATE = re.compile("[\ud800-\udfff]")

Meta = dict[str, str | int]


class TextFile(NamedTuple):
    """A file to read: where it lies, its address, what its pages are, and how it is packed (a suffix, or None)."""

    path: Path
    url: str
    kind: str
    packing: str | None


class Line(NamedTuple):
    """A line without its end; numbers begin at 1. meta: how it was decoded, as `decode` tells it."""

    number: int
    text: str
    meta: Meta


def open_stream(file: TextFile) -> io.BufferedReader:
    """The unpacked bytes of a file. Reading raises Refusal 'damaged file' or 'decompression bomb'."""
    return io.BufferedReader(_Joined(_chunks(file)), CHUNK_BYTES)


def read_whole(file: TextFile) -> bytes:
    """All bytes, unpacked. Raises Refusal 'too large' for more than MAX_FILE_BYTES."""
    data = bytearray()
    with open_stream(file) as stream:
        # A single read of so many bytes would claim the memory for all of them at once.
        while chunk := stream.read1(CHUNK_BYTES):
            data += chunk
            if len(data) > MAX_FILE_BYTES:
                raise Refusal("too large", f"more than {MAX_FILE_BYTES:,} bytes: split the file")
    return bytes(data)


def read_head(file: TextFile) -> bytes:
    """The first HEAD_BYTES, or as many as can be read before damage."""
    head = b""
    with open_stream(file) as stream:
        try:
            while len(head) < HEAD_BYTES and (more := stream.read1(HEAD_BYTES - len(head))):
                head += more
        except Refusal:
            pass
    return head


def read_lines(file: TextFile) -> Iterator[Line | Refusal]:
    """Lines of a text file, refusals among them: 'line too long', 'undecodable', and at the end 'damaged file'.

    The head of the file decides on the encoding of all of it, by the rule of `decode`; but stray NULs, at most
    MAX_MENDED of its bytes, are removed. Raises Refusal 'binary' or 'undecodable' where the file isn't text.
    """
    encoding = _encoding(_without_stray_nuls(read_head(file)), whole=False)
    with io.BufferedReader(_Joined(_recoded(_chunks(file), encoding)), CHUNK_BYTES) as stream:
        try:
            yield from _decoded(_cut(stream, file.url), file.url, {"encoding": encoding} if encoding else {})
        except Refusal as damage:
            yield damage


def decode(data: bytes) -> tuple[str, Meta]:
    """Bytes as text, and how they were decoded. Raises Refusal 'binary' or 'undecodable'.

    In this order: UTF-16 or UTF-32 if it begins with a byte order mark; UTF-8, with or without one; UTF-8 with U+FFFD
    for bad bytes, where that is at most MAX_MENDED of the characters; the encoding that uchardet finds (resiliparse),
    where at most MAX_MENDED of the characters are U+FFFD or controls. meta: `mended`, the number of U+FFFD put in;
    `encoding`, unless it is UTF-8.
    """
    encoding = _encoding(data, whole=True)
    if encoding is None:
        text, mended = _replaced(data)
        return text, {"mended": mended} if mended else {}
    text = data.decode(encoding, "replace")
    mended = text.count(REPLACEMENT)
    return text, {"encoding": encoding} | ({"mended": mended} if mended else {})


def mend(text: str) -> tuple[str, Meta]:
    """`text` without lone surrogates and NULs: surrogates in pairs are joined, others become U+FFFD, counted in
    `mended`."""
    text = text.replace("\0", "")
    if text.isascii() or not SURROGATE.search(text):
        return text, {}
    joined = SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)
    whole, mended = SURROGATE.subn(REPLACEMENT, joined)
    return whole, {"mended": mended} if mended else {}


def mended_bytes(data: bytes) -> tuple[str, Meta]:
    """UTF-8 as text without NULs, U+FFFD for bad bytes. Raises Refusal 'undecodable' above MAX_MENDED of them."""
    text, mended = _replaced(data)
    if mended > MAX_MENDED * len(text):
        raise Refusal("undecodable", f"{mended:,} of {len(text):,} characters are not UTF-8", text=text)
    return text.replace("\0", ""), {"mended": mended} if mended else {}


# Unpacking


class _Joined(io.RawIOBase):
    """Chunks as a file to read from."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer)
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(target), len(self._rest))
        target[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _chunks(file: TextFile) -> Iterator[bytes]:
    with open(file.path, "rb") as packed:
        if file.packing is None:
            yield from iter(lambda: packed.read(CHUNK_BYTES), b"")
        else:
            yield from _unpacked(packed, UNPACKERS[file.packing])


def _unpacked(packed: IO[bytes], unpacker: Callable[[IO[bytes]], Callable[[int], bytes]]) -> Iterator[bytes]:
    """Damage in the packed bytes ends the chunks with a Refusal; an error of the disk stays an OSError (it has a
    number, the libraries' own have none)."""
    size = 0
    try:
        read = unpacker(packed)
        while chunk := read(CHUNK_BYTES):
            size += len(chunk)
            _check_growth(size, packed.tell())
            yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Refusal("damaged file", f"after {size:,} bytes unpacked: {error}") from None


def _check_growth(size: int, packed: int) -> None:
    if size > MAX_STREAM_BYTES:
        raise Refusal("decompression bomb", f"more than {MAX_STREAM_BYTES:,} bytes unpacked")
    if size > RATIO_FREE_BYTES and size > MAX_RATIO * packed:
        raise Refusal("decompression bomb", f"{size:,} bytes out of {packed:,}", value=size / packed)


# What is read at once is what one step unpacks, so that damage doesn't take with it what came before.
UNPACKERS: dict[str, Callable[[Any], Callable[[int], bytes]]] = {
    "gz": lambda packed: gzip.GzipFile(fileobj=packed).read1,
    "dz": lambda packed: gzip.GzipFile(fileobj=packed).read1,
    "bz2": lambda packed: bz2.BZ2File(packed).read1,
    "xz": lambda packed: lzma.LZMAFile(packed).read1,  # noqa: SIM115
    "zst": lambda packed: pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd").read,
}


# Lines


def _cut(stream: IO[bytes], url: str) -> Iterator[tuple[int, bytes] | Refusal]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")
        else:
            size = len(line) + _skip_line(stream)
            yield Refusal("line too long", f"line {number}: {size:,} bytes", f"{url}#{number}", value=size)


def _skip_line(stream: IO[bytes]) -> int:
    size = 0
    while more := stream.readline(CHUNK_BYTES):
        size += len(more)
        if more.endswith(b"\n"):
            break
    return size


def _decoded(lines: Iterator[tuple[int, bytes] | Refusal], url: str, meta: Meta) -> Iterator[Line | Refusal]:
    for line in lines:
        if isinstance(line, Refusal):
            yield line
            continue
        number, data = line
        try:
            text, mended = mended_bytes(data)
            yield Line(number, text, meta | mended)
        except Refusal as refusal:
            yield Refusal(refusal.reason, f"line {number}: {refusal.detail}", f"{url}#{number}", refusal.text)


# Encodings


def _encoding(data: bytes, whole: bool) -> str | None:
    """The encoding of `data`, None for UTF-8 that may need mending. Raises Refusal 'binary' or 'undecodable'.

    `whole` is false where `data` is the head of more, and may end within a character.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return _checked(data, encoding, whole)
    if b"\0" in data[:BINARY_PROBE_BYTES]:
        raise Refusal("binary", f"NUL byte at offset {data.index(0)}")
    text, mended = _replaced(data, whole)
    return None if mended <= MAX_MENDED * len(text) else _checked(data, _detected(data), whole)


def _without_stray_nuls(head: bytes) -> bytes:
    return head.replace(b"\0", b"") if head.count(0) <= MAX_MENDED * len(head) else head


def _detected(data: bytes) -> str:
    encoding = str(detect_encoding(data)).lower()
    if encoding == "utf-8":  # also what it says where it can't tell
        raise Refusal("undecodable", "neither UTF-8 nor any encoding that could be told")
    return encoding


def _checked(data: bytes, encoding: str, whole: bool) -> str:
    """`encoding`, if it makes text out of `data`."""
    try:
        text = codecs.getincrementaldecoder(encoding)("replace").decode(data, whole)
    except (LookupError, UnicodeError):
        raise Refusal("undecodable", f"it looks like {encoding}, but isn't") from None
    bad = text.count(REPLACEMENT) + len(CONTROLS.findall(text))
    if bad > MAX_MENDED * len(text):
        raise Refusal("undecodable", f"{bad:,} of {len(text):,} characters as {encoding}", value=bad / len(text))
    return encoding


def _replaced(data: bytes, whole: bool = True) -> tuple[str, int]:
    """UTF-8 as text, and how many U+FFFD stand for bad bytes; those that were in the text don't count."""
    text = codecs.getincrementaldecoder("utf-8-sig")("replace").decode(data, whole)
    return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode()) if REPLACEMENT in text else 0


def _recoded(chunks: Iterator[bytes], encoding: str | None) -> Iterator[bytes]:
    """Chunks as UTF-8. Of what can't be decoded U+FFFD is left."""
    if encoding is None:
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for chunk in chunks:
        if text := decoder.decode(chunk):
            yield text.encode()
    yield decoder.decode(b"", True).encode()
