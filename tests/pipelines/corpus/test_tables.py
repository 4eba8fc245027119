"""Tables: a page a row, whatever the rows are kept in, and what becomes of rows that are none."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus import streams, tables
from pipelines.corpus.readers import read_file
from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.tables import Seen
from pipelines.schema import Source

PLAIN = Source(name="mine", path="unused")
NAMED = Source(
    name="mine",
    path="unused",
    text_column="body",
    id_column="id",
    title_column="title",
    url_column="address",
    licence_column="licence",
)
ROWS = [
    {"body": "A first text.", "id": "a", "title": " On\nfirsts ", "address": "http://a.example/1", "licence": "CC0"},
    {"body": "A second text.", "id": "b c", "title": None, "address": None, "licence": None},
    {"body": "Another of the same id.", "id": "a", "title": "", "address": "", "licence": ""},
    {"body": "A last text.", "id": None, "title": "A last", "address": None, "licence": None},
]


def read(path: Path, source: Source = PLAIN) -> list[Page | Refusal]:
    return list(read_file(path, f"file:{path.name}", source))


def json_lines(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def write(tmp_path: Path, sort: str, rows: list[dict]) -> Path:
    path = tmp_path / f"a.{sort}"
    if sort == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif sort == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        cells = [list(rows[0]), *([value or "" for value in row.values()] for row in rows)]
        mark = "," if sort == "csv" else "\t"
        path.write_text("\n".join(mark.join(f'"{cell}"' for cell in line) for line in cells))
    return path


# Any table


@pytest.mark.parametrize("sort", ["jsonl", "parquet", "csv", "tsv"])
def test_rows_say_the_same_whatever_they_are_kept_in(tmp_path, sort):
    first, second, double, last = read(write(tmp_path, sort, ROWS), NAMED)
    assert first == Page("http://a.example/1", "On firsts\n\nA first text.", "article", {"title": "On firsts"}, "CC0")
    assert second == Page(f"file:a.{sort}#b%20c", "A second text.", "article", {})
    assert (double.reason, double.text) == ("duplicate id", "Another of the same id.")
    assert double.detail.endswith(": a")
    # The number of its line; a CSV has a header, and here a title of two lines.
    place = {"csv": 6, "tsv": 6}.get(sort, 4)
    assert last == Page(f"file:a.{sort}#{place}", "A last text.", "article", {"title": "A last"})


@pytest.mark.parametrize("sort", ["parquet", "csv"])
def test_a_column_that_is_missing_is_told_with_those_that_are_there(tmp_path, sort):
    (refusal,) = read(write(tmp_path, sort, [{"words": "x", "number": "1"}]))
    assert (refusal.reason, refusal.detail, refusal.url) == ("no such column", "text; there are words, number", "")


@pytest.mark.parametrize("sort", ["jsonl", "parquet", "csv"])
def test_a_text_marked_up_is_read_as_its_source_says(tmp_path, sort):
    source = Source(name="mine", path="unused", markup="wikitext")
    (page,) = read(write(tmp_path, sort, [{"text": "an ''odd'' [[link|label]]"}]), source)
    assert page.text == "an odd label"


def test_ids_are_told_apart_through_every_merge(monkeypatch):
    monkeypatch.setattr(tables, "RECENT_IDS", 7)
    draws = [str(number) for number in random.Random(0).choices(range(300), k=2000)]
    seen, reference = Seen(), set()
    for draw in draws:
        assert seen.add(draw) == (draw not in reference)
        reference.add(draw)
    assert len(reference) > 250


# JSON lines


def test_rows_that_hold_no_text_are_told_with_their_line(tmp_path):
    path = json_lines(
        tmp_path,
        '{"text": "good"}',
        "",
        '{"text": "cut',
        "[1, 2]",
        '{"texts": "x"}',
        '{"text": null}',
        '{"text": 3}',
        "[" * 100_000,
        '{"text": "good"}',
    )
    first, *refused, last = read(path)
    assert (first.url, last.url) == ("file:a.jsonl#1", "file:a.jsonl#9")
    assert [(one.reason, one.url.partition("#")[2], one.detail.partition(":")[0]) for one in refused] == [
        ("not JSON", "3", "line 3"),
        ("not an object", "4", "line 4"),
        ("no text", "5", "line 5"),
        ("no text", "6", "line 6"),
        ("no text", "7", "line 7"),
        ("not JSON", "8", "line 8"),
    ]
    assert refused[0].text == '{"text": "cut'
    assert [one.detail for one in refused[3:5]] == ["line 6: column 'text' is empty", "line 7: column 'text' is int"]


def test_surrogates_nuls_and_bad_bytes_of_a_row_are_mended_and_counted(tmp_path):
    path = json_lines(
        tmp_path,
        r'{"text": "\ud83d\ude00 \ud800!"}',
        r'{"text": "nul\u0000l"}',
        b'{"text": "' + b"a" * 200 + b'\xff \\udc00"}',
    )
    pair, nul, both = read(path)
    assert (pair.text, pair.meta) == ("\U0001f600 \ufffd!", {"mended": 1})
    assert (nul.text, nul.meta) == ("null", {})
    assert (both.text, both.meta) == ("a" * 200 + "\ufffd \ufffd", {"mended": 2})


def test_a_line_too_long_is_told_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 100)
    long, good = read(json_lines(tmp_path, json.dumps({"text": "x" * 100}), '{"text": "good"}'))
    assert (long.reason, long.url) == ("line too long", "file:a.jsonl#1")
    assert (good.text, good.url) == ("good", "file:a.jsonl#2")


def test_many_lines_are_read_in_little_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": "word " * 2000}) + "\n"
    path.write_text(row * 4000)  # 40 MB
    tracemalloc.start()
    pages = sum(isinstance(page, Page) for page in read_file(path, "file:a.jsonl", PLAIN))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pages == 4000
    assert peak < 8 << 20


def test_json_is_read_as_lines_where_its_first_line_holds_a_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [page.text for page in read(path)] == ["one", "two"]
    path.write_text('{"texts": ["one"]}\n')
    assert [(page.text, page.kind) for page in read(path)] == [('{"texts": ["one"]}\n', "code")]


# CSV


def test_quotes_hold_commas_quotes_and_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'n,text\r\n1,"one, ""two""\r\nthree"\r\n\r\n2\r\n3,four\r\n')
    first, short, last = read(path)
    assert first.text == 'one, "two"\nthree'
    assert (short.reason, short.detail) == ("no text", "line 5: column 'text' is empty")
    assert (last.text, last.url) == ("four", "file:a.csv#6")


def test_a_cell_longer_than_the_csv_module_takes_by_itself_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000)
    assert [len(page.text) for page in read(path)] == [200_000]


def test_a_quote_that_never_ends_costs_rows_but_not_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_text('text\ngood\n"open\n' + "a line of text\n" * 200)
    first, *rest = read(path)
    assert first.text == "good"
    assert {one.reason for one in rest if isinstance(one, Refusal)} == {"damaged row"}
    assert rest[-1].text == "a line of text"
    path.write_text('text\ngood\n"open\nall the rest\n')
    first, end = read(path)
    assert (first.text, end.reason) == ("good", "damaged row")


def test_csv_as_spreadsheets_save_it_is_read(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("n\ttext\r\n1\tdéjà vu\r\n".encode("utf-16"))
    assert [(page.text, page.meta) for page in read(path)] == [("déjà vu", {"encoding": "utf-16"})]


# Parquet


def test_the_rows_of_all_batches_and_groups_are_numbered_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(n) for n in range(1, 18)], "other": [0] * 17}), path, row_group_size=7)
    assert [(page.text, page.url) for page in read(path)] == [(str(n), f"file:a.parquet#{n}") for n in range(1, 18)]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["one", None, "two"], pa.large_string()),
        pa.array(["one", None, "two"]).dictionary_encode(),
    ],
    ids=["large", "dictionary"],
)
def test_texts_of_any_string_type_are_read(tmp_path, values):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    one, none, two = read(tmp_path / "a.parquet")
    assert (one.text, two.text) == ("one", "two")
    assert (none.reason, none.url) == ("no text", "file:a.parquet#2")


def test_strings_that_are_not_utf_8_are_mended_or_told(tmp_path):
    raw = pa.array([b"a" * 200 + b"\xff", b"\xff\xfe", b"good"], pa.binary())
    values = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    mended, bad, good = read(tmp_path / "a.parquet")
    assert (mended.meta, bad.reason, good.text) == ({"mended": 1}, "undecodable", "good")


def test_a_column_of_numbers_is_told_with_its_type(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    (refusal,) = read(tmp_path / "a.parquet")
    assert (refusal.reason, refusal.detail) == ("no text", "column 'text' is of type int64")


def test_a_damaged_row_group_costs_only_itself(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["".join(random.Random(n).choices("abcdefgh", k=500)) for n in range(30)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    data[start + size // 4 : start + size // 2] = bytes(size // 2 - size // 4)
    path.write_bytes(data)
    rows = read(path)
    assert [row.text for row in rows if isinstance(row, Page)] == texts[:10] + texts[20:]
    assert [row.reason for row in rows if isinstance(row, Refusal)] == ["damaged file"]


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_parquet_file_cut_short_is_told(tmp_path, keep):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"] * 100}), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert [row.reason for row in read(path)] == ["damaged file"]


# Dictionaries


@pytest.mark.parametrize("name", ["d.dict", "d.dict.dz"])
def test_a_dictionary_gives_an_entry_a_page(tmp_path, name):
    entries = [b"about this file\n", b"AARDVARK\n  An animal.\n", "ABBÉ\n  A priest.\n".encode()]
    data = b"".join(entries)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("z") else data)
    # In base 64 16 is Q and 22 W; the last entry begins at 38 (m) and has 18 bytes (S); it goes by two names.
    index = "00-database-info\tA\tQ\nabbe\tm\tS\nabbot\tm\tS\naardvark\tQ\tW\nlost\tBA\tB\nodd\t?\tB\nshort\n"
    assert [len(entry) for entry in entries] == [16, 22, 18]
    (tmp_path / "d.index").write_text(index)
    aardvark, abbe, *damaged = read(tmp_path / name)
    assert aardvark == Page(f"file:{name}#aardvark", "AARDVARK\n  An animal.\n", "article", {"title": "aardvark"})
    assert (abbe.text, abbe.meta["title"]) == ("ABBÉ\n  A priest.\n", "abbe")
    assert [(one.reason, one.detail) for one in damaged] == [
        ("damaged entry", f"line {number} of d.index") for number in (5, 6, 7)
    ]
    assert read(tmp_path / "d.index") == []


def test_a_dictionary_without_its_index_is_told(tmp_path):
    (tmp_path / "d.dict.dz").write_bytes(b"\x1f\x8b")
    (tmp_path / "e.dict.dz").write_bytes(b"")
    assert [row.reason for row in read(tmp_path / "e.dict.dz")] == ["empty"]
    assert [row.reason for row in read(tmp_path / "d.dict.dz")] == ["no index"]
