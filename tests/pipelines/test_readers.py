"""Readers: what becomes a document, what is dropped, and the reason that is given."""

import gzip
import io
import json
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator

from pipelines import readers
from pipelines.readers import Bounds, Document, Dropped, Origin, clean, cut, document_id, kind_of, read_file

AUTO = Origin("mine", "auto", "CC0")
BOUNDS = Bounds(shortest=10, longest=1000)
PARAGRAPH = "It was the best of times, it was the worst of times. " * 4


def read(path: Path, origin: Origin = AUTO, bounds: Bounds = BOUNDS) -> list[Document | Dropped]:
    return list(read_file(path, f"file:{path.name}", origin, bounds))


def only(path: Path, content: bytes, origin: Origin = AUTO) -> Document | Dropped:
    path.write_bytes(content)
    (row,) = read(path, origin)
    return row


def reason(row: Document | Dropped) -> str:
    assert isinstance(row, Dropped), row
    return row.reason


def record(
    block: bytes, sort: str = "response", uri: str = "http://a.example/page", length: int | None = None
) -> bytes:
    head = (
        f"WARC/1.1\r\nWARC-Type: {sort}\r\nWARC-Record-ID: <urn:uuid:12345678-1234-1234-1234-123456789abc>\r\n"
        f"WARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Target-URI: {uri}\r\n"
        f"Content-Type: application/http; msgtype={sort}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(body: bytes, status: str = "200 OK", head: str = "Content-Type: text/html; charset=utf-8") -> bytes:
    return f"HTTP/1.1 {status}\r\n{head}\r\n\r\n".encode() + body


def page(text: str) -> bytes:
    return f"<html><head><title>A  page</title></head><body><p>{text}</p></body></html>".encode()


# Text


def test_a_text_file_is_a_book_with_all_its_columns(tmp_path):
    row = only(tmp_path / "novel.txt", PARAGRAPH.encode())
    assert row == Document(
        id=document_id("mine", "file:novel.txt", 1, PARAGRAPH.rstrip()),
        text=PARAGRAPH.rstrip(),
        kind="book",
        source="mine",
        url="file:novel.txt",
        licence="CC0",
        meta="{}",
    )
    assert len(row.id) == 16


def test_a_byte_order_mark_is_taken_off(tmp_path):
    assert only(tmp_path / "a.txt", b"\xef\xbb\xbf" + PARAGRAPH.encode()).text.startswith("It was")


def test_latin_1_is_dropped_with_the_byte_and_its_offset(tmp_path):
    row = only(tmp_path / "a.txt", "caf\u00e9 au lait, s'il vous plait".encode("latin-1"))
    assert reason(row) == "not utf-8"
    assert row.detail == "byte 0xe9 at offset 3"


def test_utf_16_is_dropped_as_not_utf_8(tmp_path):
    assert reason(only(tmp_path / "a.txt", PARAGRAPH.encode("utf-16"))) == "not utf-8"


def test_a_picture_is_dropped_as_binary(tmp_path):
    assert reason(only(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")) == "binary"


def test_an_empty_file_is_dropped_as_empty(tmp_path):
    assert reason(only(tmp_path / "a.txt", b"")) == "empty"


def test_a_file_too_large_to_hold_is_dropped_as_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 100)
    assert reason(only(tmp_path / "a.txt", PARAGRAPH.encode())) == "too large"


def test_a_response_too_large_to_hold_is_dropped_even_if_it_was_small_when_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_PAGE_BYTES", 1000)
    squeezed = response(gzip.compress(page("x" * 5000)), head="Content-Type: text/html\r\nContent-Encoding: gzip")
    (tmp_path / "a.warc").write_bytes(record(squeezed) + record(response(page("y" * 5000))))
    assert [reason(row) for row in read(tmp_path / "a.warc")] == ["too large", "too large"]


def test_a_short_text_is_dropped_with_its_length(tmp_path):
    row = only(tmp_path / "a.txt", b"  \n\nshort\n\n")
    assert (reason(row), row.detail) == ("too short", "5 of 10 characters")


def test_a_file_that_vanished_is_dropped_as_unreadable(tmp_path):
    (row,) = read(tmp_path / "gone.txt")
    assert (reason(row), row.detail) == ("unreadable", "No such file or directory")


def test_an_unknown_suffix_is_read_only_when_the_source_says_its_kind(tmp_path):
    assert reason(only(tmp_path / "a.xyz", PARAGRAPH.encode())) == "unknown suffix"
    assert only(tmp_path / "a.xyz", PARAGRAPH.encode(), Origin("mine", "article", "")).kind == "article"


def test_a_file_without_a_suffix_is_an_article(tmp_path):
    assert only(tmp_path / "README", PARAGRAPH.encode()).kind == "article"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.TXT", "book"), ("b.md", "book"), ("c.htm", "web"), ("d.warc.gz", "web"), ("e.py", "code"), ("f.rs", "code")],
)
def test_the_kind_follows_from_the_suffix(name, kind):
    assert kind_of(f"file:folder.d/{name}") == kind


def test_the_declared_kind_wins_over_the_suffix(tmp_path):
    assert only(tmp_path / "a.txt", PARAGRAPH.encode(), Origin("mine", "web", "")).kind == "web"


def test_code_carries_its_language_and_keeps_its_indentation(tmp_path):
    row = only(tmp_path / "a.py", b"\n    def f():\n\treturn 1\n")
    assert row.text == "    def f():\n\treturn 1"
    assert json.loads(row.meta) == {"language": "python"}


def test_clean_makes_one_sort_of_line_end_and_one_unicode_form_and_drops_nuls():
    assert clean("\ufeff\r\n \ncafe\u0301\r\ntwo\rthree\0 \n") == "caf\u00e9\ntwo\nthree"


# Cutting


@pytest.mark.parametrize("text", [PARAGRAPH * 20, "a\n\n" * 900, "line of text\n" * 400, "x" * 3001, "one two " * 500])
def test_pieces_are_bounded_and_join_to_the_text(text):
    pieces = cut(text, 1000)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 1000


def test_a_cut_prefers_a_blank_line_to_a_line_to_a_space():
    assert cut("a" * 60 + "\n\n" + "b\n" * 10 + "c d" * 20, 100)[0] == "a" * 60 + "\n\n"
    assert cut("a" * 60 + "\n" + "b " * 40, 100)[0] == "a" * 60 + "\n"
    assert cut("a" * 60 + " " + "b" * 80, 100)[0] == "a" * 60 + " "


def test_each_piece_has_its_own_id_and_says_its_place(tmp_path):
    (tmp_path / "a.txt").write_text("same words again\n" * 300)
    rows = read(tmp_path / "a.txt")
    assert [json.loads(row.meta) for row in rows] == [{"piece": n + 1, "pieces": len(rows)} for n in range(len(rows))]
    assert len({row.id for row in rows}) == len(rows) > 1


# HTML


def test_html_gives_title_and_text_and_keeps_the_lines_of_code(tmp_path):
    body = "<nav>Home</nav><h1>Sums</h1><p>Add&nbsp;two   numbers:</p><pre>def add(a, b):\n    return a + b</pre>"
    row = only(tmp_path / "a.html", f"<html><head><title>On \n sums</title></head><body>{body}</body></html>".encode())
    assert row.text == "Sums\n\nAdd two numbers:\n\ndef add(a, b):\n    return a + b"
    assert (row.kind, json.loads(row.meta)) == ("web", {"title": "On sums"})


def test_html_in_another_encoding_is_decoded_by_what_it_says(tmp_path):
    page = "<html><head><meta charset='iso-8859-1'></head><body><p>caf\u00e9 au lait, merci</p></body></html>"
    assert only(tmp_path / "a.html", page.encode("latin-1")).text == "caf\u00e9 au lait, merci"


def test_links_to_local_files_are_left_out_of_html(tmp_path):
    body = "<p>json, a module <a href='file:/home/somebody/json.py'>/home/somebody/json.py</a></p>"
    assert "somebody" not in only(tmp_path / "a.html", body.encode()).text


# WARC


def test_only_good_html_responses_become_documents(tmp_path):
    path = tmp_path / "a.warc"
    path.write_bytes(
        record(b"software: test\r\n", sort="warcinfo")
        + record(b"GET / HTTP/1.1\r\n\r\n", sort="request")
        + record(response(page(PARAGRAPH)), uri="http://a.example/good")
        + record(response(page(PARAGRAPH), status="404 Not Found"), uri="http://a.example/gone")
        + record(response(page(PARAGRAPH), status="301 Moved"), uri="http://a.example/moved")
        + record(response(b"{}", head="Content-Type: application/json"), uri="http://a.example/data")
        + record(response(page(PARAGRAPH)), sort="revisit", uri="http://a.example/again")
        + record(b"gopher", uri="http://a.example/gopher")
        + record(
            response(b"xx", head="Content-Type: text/html\r\nContent-Encoding: gzip"), uri="http://a.example/broken"
        )
    )
    document, *dropped = read(path)
    assert (document.url, document.text) == ("http://a.example/good", PARAGRAPH.rstrip())
    assert json.loads(document.meta) == {"title": "A page"}
    assert [(row.url.rpartition("/")[2], row.reason) for row in dropped] == [
        ("gone", "HTTP error"),
        ("moved", "HTTP redirect"),
        ("data", "not HTML"),
        ("again", "not a response"),
        ("gopher", "not HTTP"),
        ("broken", "undecodable response"),
    ]


def test_compressed_and_chunked_responses_are_decoded(tmp_path):
    squeezed = response(gzip.compress(page(PARAGRAPH)), head="Content-Type: text/html\r\nContent-Encoding: gzip")
    body = page(PARAGRAPH)
    chunks = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    chunked = response(chunks, head="Content-Type: text/html\r\nTransfer-Encoding: chunked")
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(record(squeezed)) + gzip.compress(record(chunked)))
    assert [row.text for row in read(tmp_path / "a.warc.gz")] == [PARAGRAPH.rstrip()] * 2


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_truncated_last_record_is_dropped_and_the_rest_kept(tmp_path, pack):
    whole, last = pack(record(response(page(PARAGRAPH)))), record(response(page(PARAGRAPH)))
    cut_off = last[:-60] if pack is bytes else gzip.compress(last)[:-30]
    (tmp_path / "a.warc").write_bytes(whole + cut_off)
    document, dropped = read(tmp_path / "a.warc")
    assert isinstance(document, Document)
    assert reason(dropped) in ("truncated record", "damaged record")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_damage_in_the_middle_costs_only_the_records_that_it_hits(tmp_path, pack):
    first, hit, last = (pack(record(response(page(PARAGRAPH + str(n))))) for n in range(3))
    damaged = hit.replace(b"WARC/1.1", b"XXXX/1.1") if pack is bytes else hit[:60] + b"\0" * 40 + hit[100:]
    (tmp_path / "a.warc").write_bytes(first + damaged + last)
    rows = read(tmp_path / "a.warc")
    assert [row.text[-1] if isinstance(row, Document) else row.reason for row in rows] == ["0", "damaged record", "2"]
    assert "after offset 0:" in rows[1].detail


def test_a_file_that_is_no_warc_is_dropped_as_damaged(tmp_path):
    assert reason(only(tmp_path / "a.warc", PARAGRAPH.encode())) == "damaged record"


def test_records_made_here_are_read_by_a_reader_of_others():
    (seen,) = ArchiveIterator(io.BytesIO(record(response(page("x")))))
    assert seen.http_headers.status_code == 200
