"""Files of many texts, a page each: JSON lines, CSV, Parquet, and dictionaries of the DICT protocol.

    JSON lines, CSV, TSV    read line by line; in CSV quotes may hold line ends
    Parquet                 read a few rows at a time, only the columns that are named
    dictd                   NAME.dict or NAME.dict.dz, with NAME.index beside it: an entry a page

A source names the columns: text, and where it has them id, title, address and licence. A row's address is that of its
column, else FILE#ID, else FILE#NUMBER (lines and rows count from 1).
"""

from __future__ import annotations

import csv
import hashlib
import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import streams
from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.streams import Line, Meta, TextFile, decode, mend, mended_bytes, read_lines, read_whole
from pipelines.corpus.wiki import plain_text
from pipelines.schema import Source

BATCH_ROWS = 64
PARQUET_BUFFER_BYTES = 1 << 20
# Ids are kept in a set until there are so many, then in a sorted array, 8 bytes each.
RECENT_IDS = 1 << 20
DICT_DIGITS = {
    digit: value for value, digit in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")
}


class Row(NamedTuple):
    """A row of a table, by the names of its columns; text may still be UTF-8 bytes. meta: how it was decoded."""

    number: int
    values: Mapping[str, Any]
    meta: Meta


class Seen:
    """Which ids came before, by 64-bit hashes: 10**8 of them take about 1 GB, and one is taken for another with a
    chance of 0.03 % (n²/2**65)."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = np.empty(0, dtype=np.uint64)

    def add(self, name: str) -> bool:
        """Whether `name` is new."""
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        at = int(np.searchsorted(self._sorted, np.uint64(key)))
        if key in self._recent or (at < len(self._sorted) and int(self._sorted[at]) == key):
            return False
        self._recent.add(key)
        # An eighth of what is sorted, so that the merges take linear time in all, up to a logarithm.
        if len(self._recent) >= max(RECENT_IDS, len(self._sorted) // 8):
            self._merge()
        return True

    def _merge(self) -> None:
        recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
        self._sorted = np.sort(np.concatenate([self._sorted, recent]))
        self._recent.clear()


def json_pages(file: TextFile, source: Source) -> Iterator[Page | Refusal]:
    """Rows of JSON lines. Refusals of rows: 'not JSON', 'not an object', 'no text', 'duplicate id', 'undecodable',
    'line too long', 'not wikitext'."""
    return _pages(_json_rows(file), file, source)


def csv_pages(file: TextFile, source: Source, delimiter: str) -> Iterator[Page | Refusal]:
    """Rows of CSV as RFC 4180 has it, with a header; refusals as of JSON lines, and 'damaged row'.

    Raises Refusal 'no such column'.
    """
    return _pages(_csv_rows(file, source, delimiter), file, source)


def parquet_pages(file: TextFile, source: Source) -> Iterator[Page | Refusal]:
    """Rows of a Parquet file. A row group that can't be read is told as 'damaged file', the others are read.

    Raises Refusal 'no such column' or 'damaged file'.
    """
    return _pages(_parquet_rows(file, source), file, source)


def dictionary_pages(file: TextFile) -> Iterator[Page | Refusal]:
    """Entries of a dictd dictionary in the order of the file, without those about the dictionary (00-database-...).

    dictd(8): a line of the index is headword, offset and length, separated by tabs, in base-64 numbers. An entry goes
    by the first of its headwords. Refusals: 'damaged entry', 'undecodable'. Raises Refusal 'no index'.
    """
    if not index_of(file.path).exists():
        raise Refusal("no index", f"{index_of(file.path).name} is missing beside it")
    data = read_whole(file)
    problems: list[Refusal] = []
    for (offset, length), word in sorted(_entries(file, problems, len(data)).items()):
        url = f"{file.url}#{quote(word)}"
        try:
            text, meta = decode(data[offset : offset + length])
            yield Page(url, text, file.kind, {"title": word, **meta})
        except Refusal as refusal:
            yield Refusal(refusal.reason, refusal.detail, url)
    yield from problems


# Rows to pages


def _pages(rows: Iterator[Row | Refusal], file: TextFile, source: Source) -> Iterator[Page | Refusal]:
    seen = Seen()
    for row in rows:
        if isinstance(row, Refusal):
            yield row
            continue
        try:
            yield _page(row, file, source, seen)
        except Refusal as refusal:
            detail = f"line {row.number}: {refusal.detail}" if refusal.detail else f"line {row.number}"
            yield Refusal(refusal.reason, detail, f"{file.url}#{row.number}", refusal.text, refusal.value)


def _page(row: Row, file: TextFile, source: Source, seen: Seen) -> Page:
    text, mended = _text(row.values.get(source.text_column), source.text_column)
    named = (source.id_column, source.title_column, source.url_column, source.licence_column)
    name, title, url, licence = (_label(row.values.get(column)) if column else None for column in named)
    if name and not seen.add(name):
        raise Refusal("duplicate id", name, text=text)
    if source.markup == "wikitext":
        text = plain_text(text)
    meta = _added(row.meta, mended) | ({"title": title} if title else {})
    place = url or f"{file.url}#{quote(name, safe='/:') if name else row.number}"
    return Page(place, _titled(title, text), file.kind, meta, licence)


def _text(value: object, column: str) -> tuple[str, Meta]:
    if isinstance(value, bytes):
        return mended_bytes(value)
    if not isinstance(value, str):
        raise Refusal("no text", f"column '{column}' is {'empty' if value is None else type(value).__name__}")
    return mend(value)


def _label(value: object) -> str | None:
    """A short text on one line, None if there is none."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    return " ".join(mend(str(value))[0].split()) or None


def _titled(title: str | None, text: str) -> str:
    """The text under its title, unless it begins with that."""
    return f"{title}\n\n{text}" if title and not text.lstrip().startswith(title) else text


def _added(first: Meta, second: Meta) -> Meta:
    mended = int(first.get("mended", 0)) + int(second.get("mended", 0))
    return {**first, **second, "mended": mended} if mended else {**first, **second}


def _wanted(source: Source) -> list[str]:
    columns = (source.text_column, source.id_column, source.title_column, source.url_column, source.licence_column)
    return [column for column in dict.fromkeys(columns) if column]


def _check_columns(source: Source, there: list[str]) -> None:
    if missing := [column for column in _wanted(source) if column not in there]:
        raise Refusal("no such column", f"{', '.join(missing)}; there are {', '.join(there) or 'none'}")


# JSON lines


def _json_rows(file: TextFile) -> Iterator[Row | Refusal]:
    for line in read_lines(file):
        if isinstance(line, Refusal):
            yield line
        elif line.text.strip():
            yield _json_row(line, f"{file.url}#{line.number}")


def _json_row(line: Line, url: str) -> Row | Refusal:
    try:
        values = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return Refusal("not JSON", f"line {line.number}: {error}", url, line.text)
    if not isinstance(values, dict):
        return Refusal("not an object", f"line {line.number}: {type(values).__name__}", url, line.text)
    return Row(line.number, values, line.meta)


# CSV


class _Lines:
    """Lines as the csv module takes them. What it can't be given waits in `refused`, how they were decoded in
    `meta`."""

    def __init__(self, file: TextFile):
        self._lines = read_lines(file)
        self.number, self.meta, self.refused = 0, Meta(), list[Refusal]()

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            if isinstance(line, Refusal):
                self.refused.append(line)
            else:
                self.number, self.meta = line.number, _added(self.meta, line.meta)
                yield line.text + "\n"

    def taken(self) -> list[Refusal]:
        refused, self.refused = self.refused, []
        return refused


def _csv_rows(file: TextFile, source: Source, delimiter: str) -> Iterator[Row | Refusal]:
    csv.field_size_limit(
        streams.MAX_LINE_BYTES
    )  # of the whole process; what it begins with, 128 KiB, is short for a text
    lines = _Lines(file)
    cells = _csv_cells(lines, delimiter, file.url)
    header = next(cells, [])
    if isinstance(header, Refusal) or (not header and lines.refused):
        raise header if isinstance(header, Refusal) else lines.refused[0]
    _check_columns(source, header)
    for row in cells:
        yield from lines.taken()
        if isinstance(row, Refusal):
            yield row
        elif row:
            yield Row(lines.number, dict(zip(header, row, strict=False)), lines.meta)
        lines.meta = {}
    yield from lines.taken()


def _csv_cells(lines: _Lines, delimiter: str, url: str) -> Iterator[list[str] | Refusal]:
    # Unless it is strict, a quote that never closes makes one text of all rows to the end.
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Refusal("damaged row", f"line {lines.number}: {error}", f"{url}#{lines.number}")


# Parquet


def _parquet_rows(file: TextFile, source: Source) -> Iterator[Row | Refusal]:
    with open(file.path, "rb") as handle:
        table = _opened(handle)
        _check_columns(source, table.schema_arrow.names)
        _check_text(table.schema_arrow.field(source.text_column))
        first = 1
        for group in range(table.num_row_groups):
            try:
                yield from _group_rows(table, group, _wanted(source), first)
            except (pa.ArrowException, OSError, LookupError, ValueError) as error:
                yield Refusal("damaged file", f"row group {group}: {error}")
            first += table.metadata.row_group(group).num_rows


def _opened(handle: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(handle, buffer_size=PARQUET_BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise Refusal("damaged file", f"Parquet: {error}") from None


def _check_text(field: pa.Field) -> None:
    sort = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (pa.types.is_string(sort) or pa.types.is_large_string(sort) or pa.types.is_string_view(sort)):
        raise Refusal("no text", f"column '{field.name}' is of type {field.type}")


def _group_rows(table: pq.ParquetFile, group: int, columns: list[str], first: int) -> Iterator[Row]:
    for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
        values = [_bytes(batch.column(column)) for column in columns]
        for number, row in enumerate(zip(*values, strict=True), start=first):
            yield Row(number, dict(zip(columns, row, strict=True)), {})
        first += batch.num_rows


def _bytes(column: pa.Array) -> list[Any]:
    """Strings as bytes, since a file's needn't be UTF-8; others as Python has them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if (
        pa.types.is_string(column.type)
        or pa.types.is_large_string(column.type)
        or pa.types.is_string_view(column.type)
    ):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


# Dictionaries


def _entries(file: TextFile, problems: list[Refusal], size: int) -> dict[tuple[int, int], str]:
    """The headword of each entry, by offset and length in the unpacked dictionary of `size` bytes."""
    index = index_of(file.path)
    entries: dict[tuple[int, int], str] = {}
    for line in read_lines(TextFile(index, file.url, file.kind, None)):
        if isinstance(line, Refusal):
            problems.append(line)
            continue
        word, *place = line.text.split("\t")
        try:
            offset, length = map(_number, place[:2])
        except (KeyError, ValueError):
            offset, length = size, 1
        if offset + length > size:
            problems.append(
                Refusal("damaged entry", f"line {line.number} of {index.name}", f"{file.url}#{quote(word)}")
            )
        elif not word.startswith(("00-database", "00database")):
            entries.setdefault((offset, length), word)
    return entries


def index_of(path: Path) -> Path:
    """Where the index of a dictionary lies."""
    name = path.name.removesuffix(".dz").removesuffix(".dict")
    return path.with_name(f"{name}.index")


def _number(digits: str) -> int:
    """A number in base 64, most significant digit first. Raises KeyError for other digits."""
    value = 0
    for digit in digits:
        value = value * 64 + DICT_DIGITS[digit]
    return value
