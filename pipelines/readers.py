"""Files to documents: text, HTML, WARC and source code, read one at a time. What isn't taken is said, with the reason.

How a file is read follows from its suffix; what it is *kind* follows from the source, or from the suffix where the
source says 'auto':

    .txt .md .rst ...            text    book
    .html .htm .xhtml            HTML    web      main text only, the lines of code blocks kept
    .warc .warc.gz               WARC    web      responses with status 2xx and HTML
    .py .c .rs ...               text    code     the language goes into `meta`
    no suffix                    text    article
    anything else                text    only where the source says its kind
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding
from resiliparse.parse.html import HTMLParserException, HTMLTree

PROSE = frozenset({"txt", "text", "md", "markdown", "rst", "adoc", "tex"})
MARKUP = frozenset({"html", "htm", "xhtml"})
SUFFIXES = {
    "c": ["c", "h"],
    "c#": ["cs"],
    "c++": ["cc", "cpp", "cxx", "hpp"],
    "clojure": ["clj"],
    "css": ["css"],
    "cuda": ["cu"],
    "elixir": ["ex", "exs"],
    "erlang": ["erl"],
    "go": ["go"],
    "haskell": ["hs"],
    "java": ["java"],
    "javascript": ["js", "jsx", "mjs"],
    "json": ["json"],
    "julia": ["jl"],
    "kotlin": ["kt"],
    "lua": ["lua"],
    "objective-c": ["m"],
    "ocaml": ["ml"],
    "perl": ["pl", "pm"],
    "php": ["php"],
    "python": ["py", "pyi"],
    "r": ["r"],
    "ruby": ["rb"],
    "rust": ["rs"],
    "scala": ["scala"],
    "shell": ["sh", "bash"],
    "sql": ["sql"],
    "swift": ["swift"],
    "toml": ["toml"],
    "typescript": ["ts", "tsx"],
    "yaml": ["yaml", "yml"],
}
LANGUAGES = {suffix: language for language, suffixes in SUFFIXES.items() for suffix in suffixes}

# Beside the text: navigation (also DocBook's and pydoc's), and links to files of the machine that served it.
FURNITURE = [
    *("nav", "footer", ".navheader", ".navfooter", ".sphinxsidebar"),
    *("div[style='float:left']", "div[style='float:right']", "a[href^='file:']"),
]
# Git's rule: a file with a NUL byte near its beginning isn't text.
BINARY_PROBE_BYTES = 8_000
# Where a record may begin again after a damaged one: a gzip member, or a plain record after the end of another.
RECORD_STARTS = (b"\x1f\x8b\x08", b"\r\n\r\nWARC/1.")
# These say something about other records and hold no document.
HOUSEKEEPING = WarcRecordType.warcinfo | WarcRecordType.request | WarcRecordType.metadata | WarcRecordType.continuation
SCAN_BYTES = 1 << 20
MAX_PAGE_BYTES = 64 << 20
# A text file is read whole.
MAX_FILE_BYTES = 1 << 30


class Document(NamedTuple):
    """A row of `documents`. `meta` is a JSON object."""

    id: str
    text: str
    kind: str
    source: str
    url: str
    licence: str
    meta: str


class Dropped(NamedTuple):
    """A row of `dropped`: a document that wasn't taken. `reason` is one of a few; `detail` says more."""

    source: str
    url: str
    kind: str
    reason: str
    detail: str


class Origin(NamedTuple):
    """What documents say of the source they come from; `kind` may be 'auto'."""

    name: str
    kind: str
    licence: str


class Bounds(NamedTuple):
    """Shorter documents are dropped, longer ones are cut. In characters."""

    shortest: int
    longest: int


class Page(NamedTuple):
    """A text as it was found, not yet cleaned and cut."""

    url: str
    text: str
    meta: dict[str, str]


class Refusal(Exception):
    """Why a text isn't taken: the reason, and a detail."""

    def __init__(self, reason: str, detail: str = "", url: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail, self.url = reason, detail, url


def read_file(path: Path, url: str, origin: Origin, bounds: Bounds) -> Iterator[Document | Dropped]:
    """Every document in the file at `path`, whose address is `url`, and every one that was dropped."""
    kind = kind_of(url) if origin.kind == "auto" else origin.kind
    for found in _found(path, url, declared=origin.kind != "auto"):
        if isinstance(found, Refusal):
            yield Dropped(origin.name, found.url or url, kind, found.reason, found.detail)
        else:
            yield from _documents(found, kind, origin, bounds)


def kind_of(url: str) -> str:
    """The kind that a file's suffix stands for."""
    suffix = _suffix(url)
    if suffix in LANGUAGES:
        return "code"
    if suffix in MARKUP or suffix in ("warc", "warc.gz"):
        return "web"
    return "book" if suffix in PROSE else "article"


def clean(text: str) -> str:
    """`text` in Unicode NFC with \\n for every line end, without NULs, blank first lines and trailing white space."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")
    return re.sub(r"\A(?:[ \t]*\n)+", "", unicodedata.normalize("NFC", plain)).rstrip()


def cut(text: str, longest: int) -> list[str]:
    """`text` in pieces of at most `longest` characters that join to it again.

    Each ends, if one lies in its second half, after the last blank line, else line, else space.
    """
    pieces, start = [], 0
    while len(text) - start > longest:
        end = _break(text, start + longest // 2, start + longest)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def document_id(source: str, url: str, piece: int, text: str) -> str:
    """16 hex digits that name a document by where it comes from and what it says."""
    return hashlib.sha256("\0".join([source, url, str(piece), text]).encode()).hexdigest()[:16]


def _break(text: str, earliest: int, latest: int) -> int:
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, earliest, latest)
        if at >= 0:
            return at + len(mark)
    return latest


def _documents(page: Page, kind: str, origin: Origin, bounds: Bounds) -> Iterator[Document | Dropped]:
    text = clean(page.text)
    if len(text) < bounds.shortest:
        yield Dropped(origin.name, page.url, kind, "too short", f"{len(text)} of {bounds.shortest} characters")
        return
    pieces = cut(text, bounds.longest)
    for number, piece in enumerate(pieces, start=1):
        place = {"piece": number, "pieces": len(pieces)} if len(pieces) > 1 else {}
        meta = json.dumps({**page.meta, **place}, ensure_ascii=False, sort_keys=True)
        name = document_id(origin.name, page.url, number, piece)
        yield Document(name, piece, kind, origin.name, page.url, origin.licence, meta)


# Files


def _found(path: Path, url: str, declared: bool) -> Iterator[Page | Refusal]:
    try:
        size = path.stat().st_size
        if size == 0:
            yield Refusal("empty", "0 bytes")
        elif _suffix(url) in ("warc", "warc.gz"):
            yield from _warc_pages(path)
        elif size > MAX_FILE_BYTES:
            yield Refusal("too large", f"{size:,} bytes, at most {MAX_FILE_BYTES:,} are read: split the file")
        else:
            yield _whole_page(path, url, declared)
    except Refusal as refusal:
        yield refusal
    except OSError as error:
        yield Refusal("unreadable", str(error.strerror or error))


def _whole_page(path: Path, url: str, declared: bool) -> Page:
    suffix = _suffix(url)
    data = path.read_bytes()
    if suffix in MARKUP:
        return html_page(url, data)
    text = decode(data)
    if suffix in LANGUAGES:
        return Page(url, text, {"language": LANGUAGES[suffix]})
    if suffix and suffix not in PROSE and not declared:
        raise Refusal("unknown suffix", f".{suffix}: a source that declares its kind reads it as text")
    return Page(url, text, {})


def decode(data: bytes) -> str:
    """UTF-8 bytes, with or without a byte order mark, as text. Raises Refusal 'binary' or 'not utf-8'."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refusal("not utf-8", "it begins with the byte order mark of UTF-16")
    if b"\0" in data[:BINARY_PROBE_BYTES]:
        raise Refusal("binary", f"NUL byte at offset {data.index(0)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal("not utf-8", f"byte 0x{data[error.start]:02x} at offset {error.start}") from None


def _suffix(url: str) -> str:
    """Lower-case suffix without its dot; 'warc.gz' is one. '' if there is none."""
    name = PurePosixPath(url).name.lower()
    return "warc.gz" if name.endswith(".warc.gz") else PurePosixPath(name).suffix[1:]


# HTML


def html_page(url: str, data: bytes, charset: str | None = None) -> Page:
    """Title and main text of an HTML page. `charset` is what the server said, if it did."""
    if b"\0" in data[:BINARY_PROBE_BYTES] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refusal("binary", f"NUL byte at offset {data.index(0)}", url)
    markup = bytes_to_str(data, charset or detect_encoding(data, from_html_meta=True) or "utf-8")
    try:
        tree = HTMLTree.parse(markup)
        text = extract_plain_text(tree, main_content=True, alt_texts=False, skip_elements=FURNITURE)
    except HTMLParserException as error:
        raise Refusal("not HTML", str(error)) from None
    title = " ".join((tree.title or "").split())
    return Page(url, _tidy(text), {"title": title} if title else {})


def _tidy(text: str) -> str:
    """Plain spaces, no empty table cells before a line or white space after it, no two blank lines in a row."""
    lines = re.sub(r"^ +\t[ \t]*|[ \t]+$", "", text.replace("\xa0", " "), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", lines)


# WARC


def _warc_pages(path: Path) -> Iterator[Page | Refusal]:
    """Pages of a WARC file. Damage costs the records that it hits, the rest is read."""
    with open(path, "rb") as handle:
        start: int | None = 0
        while start is not None:
            last = start
            try:
                for record in _records(handle, start):
                    last = record.stream_pos
                    yield from _response_page(record)
                return
            except OSError as error:
                yield Refusal("damaged record", f"after offset {last}: {error}")
            start = _next_record(handle, last + 1)


def _records(handle: BinaryIO, start: int) -> Iterator[WarcRecord]:
    handle.seek(start)
    yield from ArchiveIterator(handle, parse_http=False)


def _next_record(handle: BinaryIO, start: int) -> int | None:
    """Offset of the next place from `start` on where records can be read again, or None."""
    while (start := _scan(handle, start)) >= 0:
        try:
            next(_records(handle, start))
            return start
        except (OSError, StopIteration):
            start += 1
    return None


def _scan(handle: BinaryIO, start: int) -> int:
    """Offset of the next byte pattern that a record may begin with, or -1."""
    overlap = max(map(len, RECORD_STARTS)) - 1
    while True:
        handle.seek(start)
        window = handle.read(SCAN_BYTES)
        hits = [window.find(mark) + (4 if mark.startswith(b"\r") else 0) for mark in RECORD_STARTS if mark in window]
        if hits:
            return start + min(hits)
        if len(window) < SCAN_BYTES:
            return -1
        start += SCAN_BYTES - overlap


def _response_page(record: WarcRecord) -> Iterator[Page | Refusal]:
    if record.record_type & HOUSEKEEPING:
        return
    url = (record.headers.get("WARC-Target-URI") or record.record_id or "").strip("<>")
    try:
        yield _response(record, url)
    except Refusal as refusal:
        yield Refusal(refusal.reason, refusal.detail, url)


def _response(record: WarcRecord, url: str) -> Page:
    if record.record_type != WarcRecordType.response:
        raise Refusal("not a response", f"WARC-Type: {record.headers.get('WARC-Type')}")
    page = _take_whole(record)
    try:
        page.parse_http(auto_decode="all")
        _check_head(page)
        body = page.reader.read(MAX_PAGE_BYTES + 1)
    except OSError as error:
        raise Refusal("undecodable response", str(error)) from None
    if len(body) > MAX_PAGE_BYTES:
        raise Refusal("too large", f"more than {MAX_PAGE_BYTES:,} bytes decoded")
    return html_page(url, body, page.http_charset)


def _take_whole(record: WarcRecord) -> WarcRecord:
    """A copy of the record in memory: what goes wrong while it is decoded doesn't touch the file's reader."""
    expected = int(record.headers["Content-Length"])
    if expected > MAX_PAGE_BYTES:
        raise Refusal("too large", f"{expected:,} bytes, at most {MAX_PAGE_BYTES:,} are read")
    block = record.reader.read()
    if len(block) < expected:
        raise Refusal("truncated record", f"{len(block)} of {expected} bytes")
    copy = WarcRecord()
    copy.set_bytes_content(block)
    copy.is_http = True
    return copy


def _check_head(record: WarcRecord) -> None:
    status = record.http_headers.status_code if record.http_headers else None
    if status is None:
        raise Refusal("not HTTP", "the response has no status line")
    if not 200 <= status < 300:
        raise Refusal("HTTP error" if status >= 400 else "HTTP redirect", f"status {status}")
    if record.http_content_type not in ("text/html", "application/xhtml+xml"):
        raise Refusal("not HTML", f"Content-Type: {record.http_content_type or 'none'}")
