"""Readers: how a file is read, what kind its pages are, and the reason where it isn't taken."""

import gzip
import lzma
from pathlib import Path

import pytest

from pipelines.corpus import streams
from pipelines.corpus.readers import kind_of, read_file
from pipelines.corpus.records import Page, Refusal
from pipelines.schema import Source

AUTO = Source(name="mine", path="unused")
ARTICLES = Source(name="mine", path="unused", kind="article")
PARAGRAPH = "It was the best of times, it was the worst of times. " * 4


def read(path: Path, source: Source = AUTO) -> list[Page | Refusal]:
    return list(read_file(path, f"file:{path.name}", source))


def only(path: Path, content: bytes, source: Source = AUTO) -> Page | Refusal:
    path.write_bytes(content)
    (found,) = read(path, source)
    return found


def reason(found: Page | Refusal) -> str:
    assert isinstance(found, Refusal), found
    assert found.url == ""
    return found.reason


def test_a_text_file_is_a_book_as_it_stands(tmp_path):
    found = only(tmp_path / "novel.txt", PARAGRAPH.encode())
    assert found == Page("file:novel.txt", PARAGRAPH, "book", {}, None)


def test_a_byte_order_mark_is_taken_off(tmp_path):
    assert only(tmp_path / "a.txt", b"\xef\xbb\xbf" + PARAGRAPH.encode()).text.startswith("It was")


def test_latin_1_is_decoded_and_says_so(tmp_path):
    text = "Les élèves étaient très fatigués après la fête à côté de l'école. "
    found = only(tmp_path / "a.txt", text.encode("latin-1"))
    assert (found.text, found.meta) == (text, {"encoding": "cp1252"})


def test_a_picture_is_told_as_binary(tmp_path):
    assert reason(only(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")) == "binary"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet", "warc", "html", "xml", "txt.gz"])
def test_an_empty_file_is_told_as_empty(tmp_path, suffix):
    assert reason(only(tmp_path / f"a.{suffix}", b"")) == "empty"


def test_a_file_too_large_to_hold_is_told_as_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_FILE_BYTES", 100)
    assert reason(only(tmp_path / "a.txt", PARAGRAPH.encode())) == "too large"
    assert reason(only(tmp_path / "a.txt.gz", gzip.compress(PARAGRAPH.encode()))) == "too large"


def test_a_file_that_vanished_is_told_as_unreadable(tmp_path):
    (found,) = read(tmp_path / "gone.txt")
    assert (reason(found), found.detail) == ("unreadable", "No such file or directory")


def test_an_unknown_suffix_is_read_only_when_the_source_says_its_kind(tmp_path):
    assert reason(only(tmp_path / "a.xyz", PARAGRAPH.encode())) == "unknown suffix"
    assert only(tmp_path / "a.xyz", PARAGRAPH.encode(), ARTICLES).kind == "article"


def test_a_file_without_a_suffix_is_an_article(tmp_path):
    assert only(tmp_path / "README", PARAGRAPH.encode()).kind == "article"
    assert only(tmp_path / "README.xz", lzma.compress(PARAGRAPH.encode())).text == PARAGRAPH


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("a.TXT", "book"), ("b.md", "book"), ("b.txt.zst", "book"), ("c.htm", "web"), ("c.html.gz", "web")],
        *[("d.warc.gz", "web"), ("e.py", "code"), ("f.rs", "code"), ("f.json", "code"), ("g.jsonl.xz", "article")],
        *[("h.parquet", "article"), ("i.tsv", "article"), ("j.xml.bz2", "article"), ("k.dict.dz", "article")],
    ],
)
def test_the_kind_follows_from_the_suffix(name, kind):
    assert kind_of(f"file:folder.d/{name}") == kind


def test_the_declared_kind_wins_over_the_suffix(tmp_path):
    assert only(tmp_path / "a.txt", PARAGRAPH.encode(), ARTICLES).kind == "article"
    rows = Source(name="mine", path="unused", kind="book")
    assert only(tmp_path / "a.jsonl", b'{"text": "a book"}', rows).kind == "book"


def test_code_carries_its_language_and_keeps_its_indentation(tmp_path):
    found = only(tmp_path / "a.py", b"\n    def f():\n\treturn 1\n")
    assert found.text == "\n    def f():\n\treturn 1\n"
    assert found.meta == {"language": "python", "path": "a.py", "repository": "file:"}


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.warc.xz"])
def test_what_must_be_read_from_the_disk_is_told_when_packed(tmp_path, name):
    assert reason(only(tmp_path / name, b"anything")) == "packed twice"


def test_damage_of_a_document_costs_all_of_it(tmp_path):
    assert reason(only(tmp_path / "a.txt.gz", gzip.compress(PARAGRAPH.encode())[:-9])) == "damaged file"


def test_rows_of_the_web_are_kept_out_by_address_and_language(tmp_path):
    (tmp_path / "blocked.txt").write_text("bad.example")
    source = Source(
        name="mine",
        path="unused",
        kind="web",
        url_column="url",
        languages=("en",),
        block_list=str(tmp_path / "blocked.txt"),
    )
    german = "Das Wasser ist zum Waschen da, und wer sich nicht wäscht, der bleibt schmutzig. " * 4
    rows = [(PARAGRAPH, "http://a.example"), (PARAGRAPH, "http://www.bad.example/x"), (german, "http://a.example/de")]
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "{text}", "url": "{url}"}}' for text, url in rows))
    page, blocked, other = read(tmp_path / "a.jsonl", source)
    assert (page.url, page.meta) == ("http://a.example", {"language": "en"})
    assert [(one.reason, one.url) for one in (blocked, other)] == [
        ("blocked address", "http://www.bad.example/x"),
        ("other language", "http://a.example/de"),
    ]
