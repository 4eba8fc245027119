"""Wikis: MediaWiki's XML dumps, page by page, and its markup as plain text.

    dump        pages of namespace 0 that aren't redirects: title, blank line, text; streamed, one page in memory
    wikitext    headings as lines, lists, links by their labels; without templates, references, tables, galleries,
                files, categories and links to other languages

A dump with a DOCTYPE is refused, so no entity of its own is ever expanded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from xml.etree.ElementTree import ParseError, XMLParser

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.parser import ParserError

from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.streams import CHUNK_BYTES, Meta, TextFile, open_stream

NAMESPACE = "http://www.mediawiki.org/xml/export-"
MAX_PAGE_CHARACTERS = 64 << 20
# The parser reads on to the end for every bracket that doesn't close: this many characters take it some seconds.
MAX_READ_AGAIN = 30_000_000
PAIRS = (re.compile(r"(\{\{)|\}\}"), re.compile(r"(\[\[)|\]\]"), re.compile(r"(<(?!br\b|hr\b|li\b)[a-z][^<>/]*>)|</"))
# English names of namespaces whose links show a picture or sort the page. Dumps name their own as well.
UNSHOWN = frozenset({"file", "image", "category", "media"})
UNSHOWN_KEYS = frozenset({"-2", "6", "14"})
# Elements whose content isn't running text.
LEFT_OUT = frozenset(
    {"ref", "references", "table", "gallery", "imagemap", "timeline", "score", "templatestyles", "hiero"}
)
# Elements whose content is shown as it is written.
VERBATIM = frozenset({"code", "math", "nowiki", "pre", "source", "syntaxhighlight"})
# A link to the same page in another language: [[de:Titel]], [[zh-min-nan:...]].
OTHER_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?:\S")
SWITCH = re.compile(r"__[A-Z]+__")
# References and comments go before the parser sees them: quotes that don't close within one would hide it.
REFERENCE = re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
# What the parser takes for text, since a bracket or a quote in it doesn't close.
TABLE = re.compile(r"^[ \t]*\{\|.*?^[ \t]*\|\}", re.DOTALL | re.MULTILINE)
# What a template that was left out leaves behind.
EMPTY_BRACKETS = re.compile(r"[ \t]?\([\s,;:]*\)")
BRACKET_START = re.compile(r"\(\s*[,;]\s*")
FIELDS = {"title", "ns", "id", "text"}


def is_dump(head: bytes) -> bool:
    """Whether a file that begins like this is a MediaWiki dump, in UTF-8 or UTF-16."""
    return NAMESPACE.encode() in head.replace(b"\0", b"")


def dump_pages(file: TextFile) -> Iterator[Page | Refusal]:
    """The articles of a dump, of each the last revision in it.

    Refusals: 'redirect', 'other namespace', 'empty', 'too large', 'not wikitext', and after the pages before it
    'damaged file' or 'document type'.
    """
    dump = _Dump(file.url)
    parser = XMLParser(target=dump)
    with open_stream(file) as stream:
        try:
            while chunk := stream.read(CHUNK_BYTES):
                parser.feed(chunk)
                yield from dump.take(file.kind)
            parser.close()
        except ParseError as error:
            yield from dump.take(file.kind)
            yield Refusal("damaged file", f"XML: {error}")
        yield from dump.take(file.kind)


def plain_text(wikitext: str, unshown: frozenset[str] = UNSHOWN) -> str:
    """Wikitext as plain text. Links to the namespaces `unshown` (lower case) are left out.

    Raises Refusal 'not wikitext'.
    """
    try:
        plain = REFERENCE.sub("", wikitext)
        _check_brackets(plain)
        code = mwparserfromhell.parse(plain)
    except ParserError as error:
        raise Refusal("not wikitext", str(error), text=wikitext) from None
    return _tidy("".join(_shown(node, unshown) for node in code.nodes))


# Wikitext


def _check_brackets(wikitext: str) -> None:
    unclosed = sum(_unclosed(pair, wikitext) for pair in PAIRS)
    if unclosed * len(wikitext) > MAX_READ_AGAIN:
        raise Refusal("not wikitext", "brackets or tags that don't close", text=wikitext, value=unclosed)


def _unclosed(pair: re.Pattern[str], wikitext: str) -> int:
    depth = 0
    for mark in pair.finditer(wikitext):
        depth = depth + 1 if mark[1] else max(0, depth - 1)
    return depth


def _shown(node: Any, unshown: frozenset[str]) -> str:
    """What a reader sees of a node."""
    if isinstance(node, nodes.Text):
        return SWITCH.sub("", node.value).replace("''", "")
    if isinstance(node, nodes.Wikilink):
        return _link(node, unshown)
    if isinstance(node, nodes.Heading):
        return f"\n\n{_inside(node.title, unshown).strip()}\n\n"
    if isinstance(node, nodes.HTMLEntity):
        return _entity(node)
    if isinstance(node, nodes.ExternalLink):
        return _inside(node.title, unshown) if node.brackets else str(node.url)
    return _tag(node, unshown) if isinstance(node, nodes.Tag) else ""


def _inside(code: Any, unshown: frozenset[str]) -> str:
    return "".join(_shown(node, unshown) for node in code.nodes) if code is not None else ""


def _link(node: nodes.Wikilink, unshown: frozenset[str]) -> str:
    """The label, else the target. A colon before it ([[:Category:X]]) shows what would otherwise be left out."""
    target = str(node.title).strip()
    namespace = target.partition(":")[0].strip().lower().replace("_", " ")
    if namespace in unshown or (node.text is None and OTHER_LANGUAGE.match(target)):
        return ""
    return _inside(node.title if node.text is None else node.text, unshown).removeprefix(":")


def _tag(node: nodes.Tag, unshown: frozenset[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in LEFT_OUT:
        return ""
    if name == "li":
        return "- "
    if name in ("br", "hr"):
        return "\n"
    if name in VERBATIM:
        return str(node.contents)
    return _inside(node.contents, unshown)


def _entity(node: nodes.HTMLEntity) -> str:
    try:
        return str(node.normalize())
    except (ValueError, OverflowError):
        return str(node)


def _tidy(text: str) -> str:
    text = TABLE.sub("", text.replace("\xa0", " "))
    text = BRACKET_START.sub("(", EMPTY_BRACKETS.sub("", text))
    lines = (re.sub(r"^(?:- )+[ \t]*", "- ", line.strip(" \t")) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join("" if line == "-" else line for line in lines)).strip()


# Dumps


class _Dump:
    """What the parser of a dump calls: collects the fields of the page at hand, and finished pages until they are
    taken."""

    def __init__(self, url: str):
        self._url, self._address = url, ""
        self._unshown, self._key, self._language = UNSHOWN, "", ""
        self._path: list[str] = []
        self._parts: list[str] | None = None
        self._page: dict[str, str] = {}
        self._size = 0
        self._done: list[dict[str, str]] = []

    def take(self, kind: str) -> Iterator[Page | Refusal]:
        """The pages finished since."""
        while self._done:
            fields = self._done.pop(0)
            try:
                yield self._article(fields, kind)
            except Refusal as refusal:
                yield Refusal(refusal.reason, refusal.detail, self._page_url(fields), refusal.text)

    def doctype(self, name: str, public: str, system: str) -> None:
        raise Refusal("document type", f"DOCTYPE {name}: dumps have none")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition("}")[2]
        self._path.append(name)
        if name == "page":
            self._page, self._size = {}, 0
        elif name == "redirect":
            self._page["redirect"] = attributes.get("title", "")
        elif name == "mediawiki":
            self._language = attributes.get("{http://www.w3.org/XML/1998/namespace}lang", "")
        self._key = attributes.get("key", "")
        # A page has an id, and so have its revision and the one who wrote it.
        wanted = self._path[-2:] in (["siteinfo", "base"], ["namespaces", "namespace"], ["revision", "text"])
        self._parts = [] if wanted or (self._path[-2:-1] == ["page"] and name in FIELDS) else None

    def data(self, data: str) -> None:
        if self._parts is not None:
            self._size += len(data)
            if self._size <= MAX_PAGE_CHARACTERS:
                self._parts.append(data)

    def end(self, tag: str) -> None:
        name = self._path.pop()
        said, self._parts = "".join(self._parts or ()), None
        if name == "page":
            self._done.append(self._page | {"size": str(self._size)})
        elif name == "base":
            self._address = said.strip().rpartition("/")[0]
        elif name == "namespace" and self._key in UNSHOWN_KEYS:
            self._unshown |= {said.strip().lower()}
        elif name in FIELDS and (self._path[-1:] == ["page"] or name == "text"):
            self._page[name] = said

    def close(self) -> None:
        """Part of what a parser asks of its target."""

    def _page_url(self, fields: dict[str, str]) -> str:
        title = fields.get("title", "").replace(" ", "_")
        return (
            f"{self._address}/{quote(title, safe='/:,()')}" if self._address else f"{self._url}#{fields.get('id', '')}"
        )

    def _article(self, fields: dict[str, str], kind: str) -> Page:
        title = fields.get("title", "").strip()
        if fields.get("ns", "0").strip() != "0":
            raise Refusal("other namespace", f"namespace {fields['ns']}")
        if "redirect" in fields:
            raise Refusal("redirect", f"to {fields['redirect']}")
        if int(fields["size"]) > MAX_PAGE_CHARACTERS:
            raise Refusal("too large", f"more than {MAX_PAGE_CHARACTERS:,} characters")
        text = plain_text(fields.get("text", ""), self._unshown)
        if not text:
            raise Refusal("empty", "no text beside templates, tables and links to categories")
        meta: Meta = {"title": title}
        if self._language:
            meta["language"] = self._language
        return Page(self._page_url(fields), f"{title}\n\n{text}", kind, meta)
