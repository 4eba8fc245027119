"""Streams: packed, damaged and overlong input, and bytes of any encoding as text."""

import bz2
import codecs
import gzip
import lzma
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.corpus import streams
from pipelines.corpus.records import Refusal
from pipelines.corpus.streams import Line, TextFile, decode, mend, mended_bytes, read_lines, read_whole

FRENCH = "Les élèves étaient très fatigués après la fête à côté de l'école. " * 5
PACK = {
    "gz": gzip.compress,
    "dz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
NOISE = "".join(random.Random(0).choices("abcdefghij \n", k=300_000)).encode()


def file(tmp_path: Path, content: bytes, packing: str | None = None) -> TextFile:
    path = tmp_path / "a"
    path.write_bytes(content)
    return TextFile(path, "file:a", "article", packing)


def lines(*args) -> list[Line | Refusal]:
    return list(read_lines(file(*args)))


def refused(call, *args) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call(*args)
    return caught.value


# Unpacking


@pytest.mark.parametrize("packing", PACK)
def test_packed_files_give_what_was_packed(tmp_path, packing):
    assert read_whole(file(tmp_path, PACK[packing](NOISE), packing)) == NOISE


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_files_packed_in_pieces_are_read_to_the_end(tmp_path, packing):
    assert read_whole(file(tmp_path, PACK[packing](b"one ") + PACK[packing](b"two"), packing)) == b"one two"


@pytest.mark.parametrize("packing", PACK)
def test_of_a_packed_file_cut_short_the_lines_before_the_cut_are_kept(tmp_path, packing):
    packed = PACK[packing](NOISE)
    *kept, last = lines(tmp_path, packed[: len(packed) * 3 // 4], packing)
    assert isinstance(last, Refusal)
    assert last.reason == "damaged file"
    whole = NOISE.decode().split("\n")
    assert [line.text for line in kept] == whole[: len(kept)]
    # bzip2 unpacks 900 kB at a time, xz and zstd have blocks of their own.
    assert len(kept) > len(whole) // 2 or packing in ("bz2", "zst")
    assert refused(read_whole, file(tmp_path, packed[:-100], packing)).reason == "damaged file"


@pytest.mark.parametrize("packing", PACK)
def test_what_is_not_packed_as_it_says_is_damaged(tmp_path, packing):
    assert refused(read_whole, file(tmp_path, b"plain text, not packed", packing)).reason == "damaged file"


def test_a_file_that_grows_too_much_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "RATIO_FREE_BYTES", 1 << 20)
    bomb = refused(read_whole, file(tmp_path, gzip.compress(b"0" * (4 << 20)), "gz"))
    assert bomb.reason == "decompression bomb"
    assert 200 < bomb.value <= 1032  # DEFLATE's largest ratio
    assert len(read_whole(file(tmp_path, gzip.compress(b"0" * (1 << 20)), "gz"))) == 1 << 20


def test_a_bomb_of_any_packing_is_refused_before_it_fills_memory(tmp_path):
    bomb = lzma.compress(b"\n" * (64 << 20))
    tracemalloc.start()
    reason = refused(read_whole, file(tmp_path, bomb, "xz")).reason
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason == "decompression bomb"
    assert peak < 48 << 20


def test_a_stream_longer_than_the_bound_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_STREAM_BYTES", 100_000)
    assert refused(read_whole, file(tmp_path, gzip.compress(NOISE), "gz")).reason == "decompression bomb"


def test_a_document_longer_than_the_bound_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_FILE_BYTES", 4)
    assert read_whole(file(tmp_path, b"four")) == b"four"
    assert refused(read_whole, file(tmp_path, b"fives")).reason == "too large"


# Lines


def test_lines_are_numbered_from_1_and_lose_their_ends(tmp_path):
    assert lines(tmp_path, b"\xef\xbb\xbfone\r\n\ntwo\0 and a half\n" + b"three " * 20) == [
        Line(1, "one", {}),
        Line(2, "", {}),
        Line(3, "two and a half", {}),
        Line(4, "three " * 20, {}),
    ]


def test_a_file_full_of_nuls_is_binary(tmp_path):
    assert refused(lines, tmp_path, b"a\0b\n" * 50).reason == "binary"


def test_a_line_too_long_is_told_and_what_follows_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 10)
    long, last, end = lines(tmp_path, b"x" * 11 + b"\n" + b"y" * 10 + b"\n" + b"z" * 200_000)
    assert (long.reason, long.url, long.value, long.detail) == ("line too long", "file:a#1", 12, "line 1: 12 bytes")
    assert (last.number, last.text) == (2, "y" * 10)
    assert (end.reason, end.value) == ("line too long", 200_000)


def test_a_long_line_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(streams, "HEAD_BYTES", 1 << 16)
    long = file(tmp_path, b"x" * (40 << 20) + b"\nshort")
    tracemalloc.start()
    found = list(read_lines(long))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [isinstance(one, Refusal) for one in found] == [True, False]
    assert peak < 8 << 20


@pytest.mark.parametrize(("encoding", "name"), [("utf-16", "utf-16"), ("utf-32", "utf-32"), ("cp1252", "cp1252")])
def test_lines_in_other_encodings_say_so(tmp_path, encoding, name):
    assert lines(tmp_path, f"{FRENCH}\nété".encode(encoding)) == [
        Line(1, FRENCH, {"encoding": name}),
        Line(2, "été", {"encoding": name}),
    ]


def test_one_bad_line_of_a_good_file_is_refused_alone(tmp_path):
    good = "déjà vu " * 200
    first, bad, last = lines(tmp_path, f"{good}\n".encode() + b"\xe9\xe9\xe9 bad\n" + good.encode())
    assert (first.text, last.text) == (good, good)
    assert (bad.reason, bad.url, bad.text) == ("undecodable", "file:a#2", "\ufffd\ufffd\ufffd bad")


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf_8_needs_no_word(encoding):
    assert decode(FRENCH.encode(encoding)) == (FRENCH, {})


@pytest.mark.parametrize(
    ("mark", "codec", "name"),
    [
        (codecs.BOM_UTF16_LE, "utf-16-le", "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16-be", "utf-16"),
        (codecs.BOM_UTF32_LE, "utf-32-le", "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32-be", "utf-32"),
    ],
)
def test_a_byte_order_mark_decides(mark, codec, name):
    assert decode(mark + FRENCH.encode(codec)) == (FRENCH, {"encoding": name})


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "cp1252"),
        ("Съешь же ещё этих мягких французских булок, да выпей чаю. " * 3, "koi8-r"),
        ("吾輩は猫である。名前はまだ無い。" * 4, "shift_jis"),
    ],
)
def test_another_encoding_is_found_by_its_bytes(text, encoding):
    assert decode(text.encode(encoding)) == (text, {"encoding": encoding})


def test_a_hundredth_of_bad_bytes_is_mended_and_no_more():
    assert decode(b"a" * 99 + b"\xff") == ("a" * 99 + "\ufffd", {"mended": 1})
    assert decode(b"a" * 98 + b"\xff") != ("a" * 98 + "\ufffd", {"mended": 1})


def test_a_replacement_character_that_was_there_is_not_counted():
    assert decode("it broke: \ufffd".encode() + b"a" * 300 + b"\xc3") == (
        "it broke: \ufffd" + "a" * 300 + "\ufffd",
        {"mended": 1},
    )


def test_bytes_that_are_no_text_are_refused():
    noise = bytes(random.Random(0).randrange(1, 256) for _ in range(4000))
    assert refused(decode, noise).reason == "undecodable"
    assert refused(decode, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR").reason == "binary"


def test_surrogates_in_pairs_are_joined_and_lone_ones_replaced():
    assert mend("\ud83d\ude00 and \ud800, \udc00\ud800") == ("\U0001f600 and \ufffd, \ufffd\ufffd", {"mended": 3})
    assert mend("caf\u00e9\0") == ("caf\u00e9", {})


def test_bytes_of_a_row_are_mended_within_the_same_bound():
    assert mended_bytes(b"a\0" * 99 + b"\xff") == ("a" * 99 + "\ufffd", {"mended": 1})
    assert refused(mended_bytes, b"\xff").reason == "undecodable"
