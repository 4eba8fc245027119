"""From a page to documents: what is cut, where, and how its pieces are named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.cleaning import Cleaner, cut, document_id
from pipelines.corpus.records import Document, Dropped, Page
from pipelines.recipe import load_recipe
from pipelines.schema import Source

SOURCE = Source(name="mine", path="unused", licence="MIT", rules=())


def cleaner(**settings):
    ingest = load_recipe("micro").ingest.model_copy(update={"min_characters": 3, **settings})
    return Cleaner(SOURCE, ingest)


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 50), st.lists(st.integers(0, 200), unique=True))
def test_pieces_are_bounded_and_join_to_the_text(text, longest, chapters):
    pieces = cut(text, longest, sorted(chapters))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= longest


@pytest.mark.parametrize(
    ("text", "chapters", "first"),
    [
        ("one two\nthree\n\nfour CHAPTER", [], "one two\nthree\n\n"),
        ("one two\nthree four five", [], "one two\nthree "),
        ("one two three\nfour five six", [], "one two three\n"),
        ("abcdefghijklmnopqrstuvwxyz", [], "abcdefghijklmnop"),
        ("aaaa bbbb cccc\n\ndd ee", [10], "aaaa bbbb "),
    ],
    ids=["blank line", "space", "line", "nothing", "chapter"],
)
def test_a_cut_prefers_chapters_then_blank_lines_then_lines_then_spaces(text, chapters, first):
    assert cut(text, 16, chapters)[0] == first


def test_the_last_piece_is_not_too_short_to_stay():
    assert [len(piece) for piece in cut("a" * 101, 100, [], shortest=32)] == [69, 32]


def test_books_are_cut_at_chapters_and_say_which_piece_is_which():
    text = "CHAPTER I\n\n" + "It was so. " * 60 + "\n\nCHAPTER II\n\n" + "It was not. " * 60
    first, second = cleaner(max_characters=1000).documents(Page("file:b", text, "book", {}))
    assert second.text.startswith("CHAPTER II")
    assert [json.loads(one.meta) for one in (first, second)] == [{"piece": 1, "pieces": 2}, {"piece": 2, "pieces": 2}]
    assert isinstance(first, Document)
    assert first.id == document_id("mine", "file:b", 1, first.text) != second.id


def test_a_short_text_is_dropped_with_its_length_and_its_licence():
    [dropped] = cleaner(min_characters=10).documents(Page("file:b", " short \n", "article", {}, licence="CC0-1.0"))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.value, dropped.text, dropped.licence) == ("too short", 6.0, " short", "CC0-1.0")
