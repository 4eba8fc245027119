"""Web pages: main text, damaged archives, and pages that are kept out."""

import gzip
import io
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator

from cluster.errors import BadInput
from pipelines.corpus import web
from pipelines.corpus.readers import read_file
from pipelines.corpus.records import Page, Refusal
from pipelines.corpus.web import read_block_list
from pipelines.schema import Source

AUTO = Source(name="mine", path="unused")
PARAGRAPH = "It was the best of times, it was the worst of times. " * 4
GERMAN = "Das Wasser ist zum Waschen da, und wer sich nicht wäscht, der bleibt noch eine Weile schmutzig. " * 4


def read(path: Path, source: Source = AUTO) -> list[Page | Refusal]:
    return list(read_file(path, f"file:{path.name}", source))


def only(path: Path, content: bytes, source: Source = AUTO) -> Page | Refusal:
    path.write_bytes(content)
    (found,) = read(path, source)
    return found


def reason(found: Page | Refusal) -> str:
    assert isinstance(found, Refusal), found
    return found.reason


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


def page(text: str, head: str = "") -> bytes:
    return f"<html><head><title>A  page</title>{head}</head><body><p>{text}</p></body></html>".encode()


# HTML


def test_html_gives_title_and_text_and_keeps_the_lines_of_code(tmp_path):
    body = "<nav>Home</nav><h1>Sums</h1><p>Add&nbsp;two   numbers:</p><pre>def add(a, b):\n    return a + b</pre>"
    found = only(
        tmp_path / "a.html", f"<html><head><title>On \n sums</title></head><body>{body}</body></html>".encode()
    )
    assert found.text == "Sums\n\nAdd two numbers:\n\ndef add(a, b):\n    return a + b"
    assert (found.kind, found.meta["title"], found.url) == ("web", "On sums", "file:a.html")


def test_html_in_another_encoding_is_decoded_by_what_it_says(tmp_path):
    html = "<html><head><meta charset='iso-8859-1'></head><body><p>caf\u00e9 au lait, merci</p></body></html>"
    assert only(tmp_path / "a.html", html.encode("latin-1")).text == "caf\u00e9 au lait, merci"


def test_links_to_local_files_are_left_out_of_html(tmp_path):
    body = "<p>json, a module <a href='file:/home/somebody/json.py'>/home/somebody/json.py</a></p>"
    assert "somebody" not in only(tmp_path / "a.html", body.encode()).text


def test_packed_html_is_read(tmp_path):
    assert only(tmp_path / "a.html.gz", gzip.compress(page(PARAGRAPH))).text == PARAGRAPH.rstrip()


def test_a_page_that_is_binary_is_told(tmp_path):
    assert reason(only(tmp_path / "a.html", b"<html>\0\0")) == "binary"


# Marks


@pytest.mark.parametrize(
    ("mark", "found"),
    [
        ('<meta name="robots" content="noai, noimageai">', "robots: noai"),
        ('<META NAME="Robots" CONTENT="all,NOINDEX">', "robots: noindex"),
        ('<meta name="headwater" content="none">', "robots: none"),
        ('<meta name="tdm-reservation" content="1">', "tdm-reservation"),
        ('<meta name="tdm-reservation" content="0">', None),
        ('<meta name="robots" content="nofollow, noimageai">', None),
        ('<meta name="otherbot" content="noindex">', None),
        ('<meta name="description" content="noai">', None),
    ],
)
def test_marks_of_a_page_are_respected(tmp_path, mark, found):
    seen = only(tmp_path / "a.html", page(PARAGRAPH, mark))
    assert (seen.reason if isinstance(seen, Refusal) else None) == found
    assert found is None or seen.text == ""


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("X-Robots-Tag: noai", "robots: noai"),
        ("x-robots-tag: noarchive, NoAI", "robots: noai"),
        ("X-Robots-Tag: nofollow\r\nX-Robots-Tag: noindex", "robots: noindex"),
        ("X-Robots-Tag: headwater: nofollow, noindex", "robots: noindex"),
        ("X-Robots-Tag: otherbot: noai, noindex", None),
        ("X-Robots-Tag: otherbot: noai, headwater: noindex", "robots: noindex"),
        ("X-Robots-Tag: max-snippet: 3, noindex", "robots: noindex"),
        ("TDM-Reservation: 1", "tdm-reservation"),
        ("TDM-Reservation: 0", None),
    ],
)
def test_marks_of_a_response_are_respected(tmp_path, header, found):
    block = response(page(PARAGRAPH), head=f"Content-Type: text/html\r\n{header}")
    seen = only(tmp_path / "a.warc", record(block))
    assert (seen.reason if isinstance(seen, Refusal) else None) == found
    assert seen.url == "http://a.example/page"


def test_only_marks_that_the_source_respects_count(tmp_path):
    source = Source(name="mine", path="unused", respect=("noai",))
    marked = page(PARAGRAPH, '<meta name="robots" content="noindex">')
    assert isinstance(only(tmp_path / "a.html", marked, source), Page)


# Block list


@pytest.mark.parametrize(
    ("url", "blocked"),
    [
        ("http://bad.example/page", True),
        ("https://www.BAD.example:443/", True),
        ("https://bad.example./", True),
        ("http://notbad.example/", False),
        ("http://example/", False),
        ("http://good.example/bad.example", False),
        ("https://half.example/private/page", True),
        ("https://user@half.example:443/private/page", True),
        ("https://half.example/public", False),
        ("https://half.example:8080/private/page", False),
        ("https://xn--bcher-kva.example/", True),
        ("http://b\u00fccher.example/", True),
        ("urn:uuid:12345678", False),
    ],
)
def test_a_block_list_takes_domains_with_subdomains_and_address_prefixes(tmp_path, url, blocked):
    path = tmp_path / "blocked.txt"
    path.write_text("# ours\nBad.example  # all of it\n\nhttp://half.example/private/\nb\u00fccher.example\n")
    source = Source(name="mine", path="unused", block_list=str(path))
    found = only(tmp_path / "a.warc", record(response(page(PARAGRAPH)), uri=url), source)
    assert (isinstance(found, Refusal) and found.reason == "blocked address") == blocked
    assert not blocked or (found.url == url and found.text == "")


def test_an_address_that_cannot_be_compared_is_told(tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_text("bad.example")
    source = Source(name="mine", path="unused", block_list=str(path))
    found = only(tmp_path / "a.warc", record(response(page(PARAGRAPH)), uri="http://[bad.example/"), source)
    assert reason(found) == "malformed address"


def test_every_malformed_line_of_a_block_list_is_named(tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_text("good.example\nnot a domain\nftp://a.example/\nhttp://\n*.a.example\n")
    with pytest.raises(BadInput) as caught:
        read_block_list(path)
    assert [problem.what.split(": ")[0].rpartition("line ")[2] for problem in caught.value.problems] == list("2345")


def test_a_block_list_that_changes_is_read_again_and_a_missing_one_is_bad_input(tmp_path):
    path = tmp_path / "blocked.txt"
    source = Source(name="mine", path="unused", block_list=str(path))
    with pytest.raises(BadInput, match="cannot read the block list"):
        read(tmp_path / "a.warc", source)
    path.write_text("other.example")
    assert isinstance(only(tmp_path / "a.warc", record(response(page(PARAGRAPH))), source), Page)
    path.write_text("a.example, b.example")
    with pytest.raises(BadInput, match="line 1"):
        read(tmp_path / "a.warc", source)


# Language


def test_a_page_carries_its_language_and_others_are_told(tmp_path):
    assert only(tmp_path / "a.html", page(PARAGRAPH)).meta["language"] == "en"
    source = Source(name="mine", path="unused", languages=("en",))
    assert isinstance(only(tmp_path / "a.html", page(PARAGRAPH), source), Page)
    other = only(tmp_path / "a.html", page(GERMAN), source)
    assert (reason(other), other.detail, other.text) == ("other language", "de", GERMAN.rstrip())
    assert other.value > 0


# WARC


def test_only_good_html_responses_become_pages(tmp_path):
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
    good, *refused = read(path)
    assert good == Page("http://a.example/good", PARAGRAPH.rstrip(), "web", {"title": "A page", "language": "en"})
    assert [(one.url.rpartition("/")[2], one.reason) for one in refused] == [
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
    assert [found.text for found in read(tmp_path / "a.warc.gz")] == [PARAGRAPH.rstrip()] * 2


def test_a_response_too_large_to_hold_is_told_even_if_it_was_small_when_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "MAX_PAGE_BYTES", 1000)
    squeezed = response(gzip.compress(page("x" * 5000)), head="Content-Type: text/html\r\nContent-Encoding: gzip")
    (tmp_path / "a.warc").write_bytes(record(squeezed) + record(response(page("y" * 5000))))
    assert [reason(found) for found in read(tmp_path / "a.warc")] == ["too large", "too large"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_truncated_last_record_is_told_and_the_rest_kept(tmp_path, pack):
    whole, last = pack(record(response(page(PARAGRAPH)))), record(response(page(PARAGRAPH)))
    cut_off = last[:-60] if pack is bytes else gzip.compress(last)[:-30]
    (tmp_path / "a.warc").write_bytes(whole + cut_off)
    good, refused = read(tmp_path / "a.warc")
    assert isinstance(good, Page)
    assert reason(refused) in ("truncated record", "damaged record")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_damage_in_the_middle_costs_only_the_records_that_it_hits(tmp_path, pack):
    first, hit, last = (pack(record(response(page(PARAGRAPH + str(n))))) for n in range(3))
    damaged = hit.replace(b"WARC/1.1", b"XXXX/1.1") if pack is bytes else hit[:60] + b"\0" * 40 + hit[100:]
    (tmp_path / "a.warc").write_bytes(first + damaged + last)
    found = read(tmp_path / "a.warc")
    assert [one.text[-1] if isinstance(one, Page) else one.reason for one in found] == ["0", "damaged record", "2"]
    assert "after offset 0:" in found[1].detail


def test_a_file_that_is_no_warc_is_told_as_damaged(tmp_path):
    assert reason(only(tmp_path / "a.warc", PARAGRAPH.encode())) == "damaged record"


def test_records_made_here_are_read_by_a_reader_of_others():
    (seen,) = ArchiveIterator(io.BytesIO(record(response(page("x")))))
    assert seen.http_headers.status_code == 200


@pytest.mark.parametrize("length", ["", "Content-Length: many\r\n"])
def test_a_record_without_a_length_costs_itself(tmp_path, length):
    names = "WARC-Type: response\r\nWARC-Record-ID: <urn:uuid:1>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
    head = f"WARC/1.1\r\n{names}{length}\r\n"
    (tmp_path / "a.warc").write_bytes(head.encode() + b"HTTP/1.1 200 OK\r\n\r\n\r\n\r\n")
    found = list(read_file(tmp_path / "a.warc", "file:a.warc", Source(name="mine", path="unused", kind="web")))
    assert all(isinstance(one, Refusal) for one in found)
