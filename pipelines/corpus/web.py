"""Web pages: the main text of HTML, the responses of a WARC file, and which of them their owners or ours keep out.

HTML    main text only, the lines of code blocks kept; the title goes into `meta`
WARC    responses with status 2xx and HTML, plain or gzip; damage costs the records that it hits
marks   `<meta name="robots">` (or "headwater"), `X-Robots-Tag`, `tdm-reservation` as header or meta
list    domains and address prefixes, one a line
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLParserException, HTMLTree
from resiliparse.parse.lang import detect_fast

from cluster.errors import BadInput, Problem
from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.streams import BINARY_PROBE_BYTES

# The names by which a mark speaks to us.
AGENTS = frozenset({"robots", "headwater", "*"})
# Directives that hold a colon themselves: what stands before it names no agent.
VALUED = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
TDM = "tdm-reservation"
DOMAIN = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
# Beside the text: navigation (also DocBook's and pydoc's), and links to files of the machine that served it.
FURNITURE = [
    *("nav", "footer", ".navheader", ".navfooter", ".sphinxsidebar"),
    *("div[style='float:left']", "div[style='float:right']", "a[href^='file:']"),
]
# Where a record may begin again after a damaged one: a gzip member, or a plain record after the end of another.
RECORD_STARTS = (b"\x1f\x8b\x08", b"\r\n\r\nWARC/1.")
# These say something about other records and hold no document.
HOUSEKEEPING = WarcRecordType.warcinfo | WarcRecordType.request | WarcRecordType.metadata | WarcRecordType.continuation
SCAN_BYTES = 1 << 20
MAX_PAGE_BYTES = 64 << 20

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class BlockList:
    """Domains, and addresses without their scheme, whose pages aren't taken."""

    domains: frozenset[str]
    prefixes: tuple[str, ...]

    def refuse(self, url: str) -> None:
        """Raises Refusal 'blocked address', or 'malformed address' where a web address can't be compared."""
        if not url.lower().startswith(("http://", "https://")):
            return
        host, address = _address(url)
        parents = [host[at:] for at in [0, *(dot.end() for dot in re.finditer(r"\.", host))]]
        blocked = [*(self.domains.intersection(parents)), *(one for one in self.prefixes if address.startswith(one))]
        if blocked:
            raise Refusal("blocked address", blocked[0], url)


def read_block_list(path: Path) -> BlockList:
    """A file with a domain (which stands for its subdomains too) or an address prefix a line; # begins a comment.

    http and https are the same. Raises BadInput that names every line that is neither, or a file that can't be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(Problem(f"cannot read the block list {path}: {error}", "check `block_list`")) from None
    domains, prefixes, problems = set(), [], []
    for number, line in enumerate(lines, start=1):
        entry = re.sub(r"(?:^|\s)#.*", "", line).strip()
        try:
            if "://" in entry:
                prefixes.append(_address(entry)[1])
            elif entry:
                domains.add(_domain(entry))
        except Refusal:
            problems.append(_malformed(path, number, entry))
    if problems:
        raise BadInput(*problems)
    return BlockList(frozenset(domains), tuple(prefixes))


def html_page(
    url: str,
    data: bytes,
    kind: str,
    respect: Collection[str],
    headers: Headers | None = None,
    charset: str | None = None,
) -> Page:
    """Title and main text of an HTML page. `headers` and `charset` are what the server said, if it did.

    Raises Refusal 'binary', 'not HTML', 'robots: MARK' or 'tdm-reservation' for a mark in `respect`.
    """
    if b"\0" in data[:BINARY_PROBE_BYTES] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refusal("binary", f"NUL byte at offset {data.index(0)}", url)
    # Only names that HTML knows: Python's codecs are open, and a package may answer to any name.
    known = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    markup = bytes_to_str(data, known or detect_encoding(data, from_html_meta=True) or "utf-8")
    try:
        tree = HTMLTree.parse(markup)
        check_marks([*_header_marks(headers or []), *_meta_marks(tree)], respect)
        text = extract_plain_text(tree, main_content=True, alt_texts=False, skip_elements=FURNITURE)
    except HTMLParserException as error:
        raise Refusal("not HTML", str(error)) from None
    title = " ".join((tree.title or "").split())
    return Page(url, _tidy(text), kind, {"title": title} if title else {})


def warc_pages(path: Path, kind: str, respect: Collection[str]) -> Iterator[Page | Refusal]:
    """Pages of a WARC file. Damage costs the records that it hits, the rest is read."""
    with open(path, "rb") as handle:
        start: int | None = 0
        while start is not None:
            last = start
            try:
                for record in _records(handle, start):
                    last = record.stream_pos
                    yield from _response_page(record, kind, respect)
                return
            except OSError as error:
                yield Refusal("damaged record", f"after offset {last}: {error}")
            start = _next_record(handle, last + 1)


def language_of(text: str) -> tuple[str, int]:
    """ISO 639-1 code of the language that `text` is most like ('unknown' if like none), and how unlike it is.

    resiliparse's comparison of n-gram ranks; a few words are too short for it.
    """
    language, distance = detect_fast(text)
    return str(language), int(distance)


# Block list


def _address(url: str) -> tuple[str, str]:
    """The host of a web address, and the address without scheme, user and default port."""
    try:
        parts = urlsplit(url.strip())
        host, port = _domain(parts.hostname or ""), parts.port
    except ValueError:
        raise Refusal("malformed address", url=url) from None
    if parts.scheme not in ("http", "https"):
        raise Refusal("malformed address", url=url)
    place = host if port in (None, 80, 443) else f"{host}:{port}"
    return host, f"{place}{parts.path or '/'}{'?' + parts.query if parts.query else ''}"


def _domain(name: str) -> str:
    """A domain in lower case and ASCII. Raises Refusal 'malformed address'."""
    try:
        plain = name.rstrip(".").encode("idna").decode().lower()
    except UnicodeError:
        plain = ""
    if not DOMAIN.fullmatch(plain) and not re.fullmatch(r"[0-9a-f:.]*:[0-9a-f:.]*", plain):
        raise Refusal("malformed address", name)
    return plain


def _malformed(path: Path, number: int, entry: str) -> Problem:
    return Problem(
        f"block list {path}, line {number}: '{entry}' is neither a domain nor an address",
        "write a domain (example.org) or an address prefix (https://example.org/private/)",
    )


# Marks


def check_marks(marks: Iterable[str], respect: Collection[str]) -> None:
    """Raises Refusal for the first mark in `respect`: 'robots: MARK', or 'tdm-reservation' for that."""
    for mark in marks:
        if mark in respect:
            raise Refusal(TDM if mark == TDM else f"robots: {mark}")


def _header_marks(headers: Headers) -> Iterator[str]:
    """Marks of an HTTP response.

    X-Robots-Tag: https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag
    TDM-Reservation: https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/
    """
    for name, value in headers:
        if name.lower() == "x-robots-tag":
            yield from _directives(value)
        elif name.lower() == TDM and value.strip() == "1":
            yield TDM


def _meta_marks(tree: HTMLTree) -> Iterator[str]:
    for element in [] if tree.document is None else tree.document.get_elements_by_tag_name("meta"):
        name, content = (str(element.getattr(key) or "").strip().lower() for key in ("name", "content"))
        if name in AGENTS:
            yield from _directives(content)
        elif name == TDM and content == "1":
            yield TDM


def _directives(value: str) -> Iterator[str]:
    """Directives that are for us in 'noindex, otherbot: noai, nofollow': an agent's name goes for all that follow."""
    agent = "*"
    for part in value.lower().split(","):
        before, colon, after = (piece.strip() for piece in part.partition(":"))
        if colon and before not in VALUED:
            agent = before
        if agent in AGENTS:
            yield after if colon else before


# HTML


def _tidy(text: str) -> str:
    """Plain spaces, no empty table cells before a line or white space after it, no two blank lines in a row."""
    lines = re.sub(r"^ +\t[ \t]*|[ \t]+$", "", text.replace("\xa0", " "), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", lines)


# WARC


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


def _response_page(record: WarcRecord, kind: str, respect: Collection[str]) -> Iterator[Page | Refusal]:
    if record.record_type & HOUSEKEEPING:
        return
    url = (record.headers.get("WARC-Target-URI") or record.record_id or "").strip("<>")
    try:
        yield _response(record, url, kind, respect)
    except Refusal as refusal:
        yield Refusal(refusal.reason, refusal.detail, url)


def _response(record: WarcRecord, url: str, kind: str, respect: Collection[str]) -> Page:
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
    return html_page(url, body, kind, respect, list(page.http_headers), page.http_charset)


def _take_whole(record: WarcRecord) -> WarcRecord:
    """A copy of the record in memory: what goes wrong while it is decoded doesn't touch the file's reader."""
    said = record.headers.get("Content-Length") or ""
    if not said.strip().isdecimal():
        raise Refusal("damaged record", f"Content-Length: {said or 'none'}")
    expected = int(said)
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
