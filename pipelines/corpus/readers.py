"""Files to pages: every page of a file, and every one that isn't taken, with the reason.

How a file is read follows from its suffix; what it is *kind* follows from the source, or from the suffix where the
source says 'auto':

    .txt .md .rst ...                       text            book
    .html .htm .xhtml                       HTML            web         `corpus.web`
    .warc .warc.gz                          WARC            web         `corpus.web`
    .jsonl .ndjson, and .json of lines      JSON lines      article     `corpus.tables`
    .csv .tsv .parquet                      tables          article     `corpus.tables`
    .dict .dict.dz                          dictionaries    article     `corpus.tables`
    .xml of MediaWiki                       wiki dumps      article     `corpus.wiki`
    .py .c .rs ...                          text            code        the language goes into `meta`
    no suffix                               text            article
    anything else                           text            only where the source says its kind

All but WARC and Parquet may be packed: .gz .bz2 .xz .zst after the suffix (`corpus.streams`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from cluster.errors import BadInput
from cluster.mirror import SCHEME
from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.repositories import LANGUAGES, is_archive, page_of
from pipelines.corpus.streams import MAX_FILE_BYTES, TextFile, decode, read_head, read_whole
from pipelines.corpus.tables import csv_pages, dictionary_pages, index_of, json_pages, parquet_pages
from pipelines.corpus.web import BlockList, html_page, language_of, read_block_list, warc_pages
from pipelines.corpus.wiki import dump_pages, is_dump
from pipelines.schema import Source

PROSE = frozenset({"txt", "text", "md", "markdown", "rst", "adoc", "tex"})
MARKUP = frozenset({"html", "htm", "xhtml"})
JSON_LINES = frozenset({"jsonl", "ndjson"})
DELIMITERS = {"csv": ",", "tsv": "\t"}
TABLES = frozenset({*JSON_LINES, *DELIMITERS, "parquet"})
PACKINGS = frozenset({"gz", "bz2", "xz", "zst"})
# These are packed in themselves, or must be read from more than one place.
NEVER_PACKED = frozenset({"warc", "parquet"})
# Reasons that speak of damage, not of choice: with `on_error: fail` they end the stage.
DAMAGE = frozenset(
    {
        *("unreadable", "too large", "binary", "undecodable", "packed twice", "damaged file", "decompression bomb"),
        *("line too long", "no such column", "no text", "not JSON", "not an object", "damaged row", "duplicate id"),
        *("not wikitext", "no index", "damaged entry", "document type", "damaged record", "truncated record"),
        *("undecodable response", "malformed address", "not HTTP", "damaged archive", "leads outside", "encrypted"),
    }
)


def read_file(path: Path, url: str, source: Source) -> Iterator[Page | Refusal]:
    """Every page in the file at `path`, whose address is `url`, and every refusal (nothing but BadInput is raised).

    A refusal without an address is about the whole file. Raises BadInput for a block list that can't be read.
    """
    blocked = _block_list(source)
    suffix, packing = _suffix(url)
    file = TextFile(path, url, kind_of(url) if source.kind == "auto" else source.kind, packing)
    for found in _found(file, suffix, source):
        try:
            blocked.refuse(found.url or url)
            yield _in_language(found, source.languages) if isinstance(found, Page) else found
        except Refusal as refusal:
            yield refusal


def is_of_repository(url: str, kind: str) -> bool:
    """Whether a file of a source of that kind is read with the repository that it is of (`corpus.repositories`).

    In a source of code every file is, but tables; in one of any kind, archives and files of source code are. What is
    in a .json file is not known before it is read. In object storage only archives are: which folder is a repository
    says what lies in it, and that isn't here.
    """
    suffix, packing = _suffix(url)
    if is_archive(url):
        return kind in ("code", "auto")
    if url.startswith(SCHEME) or kind not in ("code", "auto"):
        return False
    return suffix not in TABLES if kind == "code" else suffix in LANGUAGES and suffix != "json" and not packing


def kind_of(url: str) -> str:
    """The kind that a file's suffix stands for: book, article, web or code."""
    suffix, _ = _suffix(url)
    if suffix in LANGUAGES or is_archive(url):
        return "code"
    if suffix in MARKUP or suffix == "warc":
        return "web"
    return "book" if suffix in PROSE else "article"


# Choosing


def _found(file: TextFile, suffix: str, source: Source) -> Iterator[Page | Refusal]:
    try:
        if file.path.stat().st_size == 0:
            yield Refusal("empty", "0 bytes")
        else:
            yield from _read(file, suffix, source)
    except Refusal as refusal:
        yield refusal
    except OSError as error:
        yield Refusal("unreadable", str(error.strerror or error))
    except BadInput:
        raise
    except Exception as error:  # what parsers make of damage has no end: the file is told, the others go on
        yield Refusal("unreadable", f"{type(error).__name__}: {error}")


def _read(file: TextFile, suffix: str, source: Source) -> Iterator[Page | Refusal]:
    if suffix in NEVER_PACKED and file.packing and (suffix, file.packing) != ("warc", "gz"):
        raise Refusal("packed twice", f".{suffix}.{file.packing}: unpack it")
    if suffix == "warc":
        return warc_pages(file.path, file.kind, source.respect)
    if suffix == "parquet":
        return parquet_pages(file, source)
    if suffix in DELIMITERS:
        return csv_pages(file, source, DELIMITERS[suffix])
    if suffix in JSON_LINES or (suffix == "json" and _holds_json_lines(file, source.text_column)):
        return json_pages(file, source)
    if suffix == "xml" and is_dump(read_head(file)):
        return dump_pages(file)
    return _dictionary_or_whole(file, suffix, source)


def _dictionary_or_whole(file: TextFile, suffix: str, source: Source) -> Iterator[Page | Refusal]:
    if suffix == "dict" and (file.packing == "dz" or index_of(file.path).exists()):
        return dictionary_pages(file)
    if suffix == "index" and _dictionaries(file.path):
        return iter(())  # it is read with its dictionary
    return iter([_whole_page(file, suffix, source)])


def _dictionaries(index: Path) -> list[Path]:
    return [path for end in (".dict", ".dict.dz") if (path := index.with_suffix(end)).exists()]


def _holds_json_lines(file: TextFile, column: str) -> bool:
    """Whether the first line of a .json file is an object that holds a text: other JSON is code."""
    try:
        first = json.loads(read_head(file).lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and column in first


def _suffix(url: str) -> tuple[str, str | None]:
    """Suffix and packing, lower case and without dots; '' and None where there is none."""
    name = PurePosixPath(PurePosixPath(url).name.lower())
    packing = name.suffix[1:]
    if packing == "dz" and name.stem.endswith(".dict"):
        return "dict", "dz"
    if packing not in PACKINGS:
        return packing, None
    # The parts of a large dump: enwiki-...-articles1.xml-p1p41242.bz2.
    suffix = PurePosixPath(name.stem).suffix[1:]
    return ("xml" if re.match(r"xml-p\d+p\d+", suffix) else suffix), packing


# Whole files


def _whole_page(file: TextFile, suffix: str, source: Source) -> Page:
    size = file.path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise Refusal("too large", f"{size:,} bytes, at most {MAX_FILE_BYTES:,} are read: split the file")
    data = read_whole(file)
    if suffix in MARKUP:
        return html_page(file.url, data, file.kind, source.respect)
    if suffix in LANGUAGES and file.kind == "code":
        return _taken(page_of(file.url, data, re.sub(r"[^/:]*\Z", "", file.url), source))
    text, meta = decode(data)
    if suffix and suffix not in PROSE and source.kind == "auto":
        raise Refusal("unknown suffix", f".{suffix}: a source that declares its kind reads it as text")
    return Page(file.url, text, file.kind, meta)


def _taken(found: Page | Refusal) -> Page:
    if isinstance(found, Refusal):
        raise found
    return found


# What isn't wanted


def _in_language(page: Page, wanted: tuple[str, ...]) -> Page:
    """A page of the web with its language. Raises Refusal 'other language' where it isn't one of `wanted`."""
    if page.kind != "web":
        return page
    language, distance = language_of(page.text)
    if wanted and language not in wanted:
        raise Refusal("other language", language, page.url, page.text, float(distance))
    return page._replace(meta={**page.meta, "language": language})


def _block_list(source: Source) -> BlockList:
    if source.block_list is None:
        return BlockList(frozenset(), ())
    path = Path(source.block_list).expanduser()
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return _cached_block_list(path, changed)


@lru_cache(maxsize=16)
def _cached_block_list(path: Path, changed: int) -> BlockList:
    """Read once for all files of a source. `changed` tells one content from the next."""
    return read_block_list(path)
