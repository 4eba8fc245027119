"""Books as typed or scanned, to running text: Project Gutenberg's notices off, wraps and hyphenation mended,
and where the chapters begin. Pure functions of a text whose line ends are newlines.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple


class Book(NamedTuple):
    """A mended text, and what was done: characters of notices taken off, line ends joined, words put together."""

    text: str
    notices: int
    wraps: int
    hyphens: int


def mend(text: str) -> Book:
    """`text` without Project Gutenberg's header and footer and with the paragraphs of prose on one line each.

    A paragraph (lines between blank lines) is prose, and is joined, where its lines fill up to the width of the book:
    at each line end (but one in eight, and never the first) the next word would have come within SLACK of that width
    or beyond. The width is the median longest line of the paragraphs of four lines and more that fill up to their own
    so, from 40 to 100 characters; there is none where more of the text is in longer lines than in such paragraphs.
    Verse and drama end their lines early, and begin most of them with capitals. Indented lines, lists, tables,
    Markdown, code and marked line breaks (two spaces) are left, as is a book in which most line ends are so marked.

    A word divided at a line end is joined without its hyphen, or with it, as the book has it elsewhere more often;
    where it has neither, with it if both parts are words of the book, and before a capital or a digit.

    Idempotent: it goes on until nothing changes. Never empties a text.
    """
    book = Book(text, 0, 0, 0)
    while (once := _mend_once(book.text)).text != book.text:
        book = Book(once.text, *(sum(pair) for pair in zip(book[1:], once[1:], strict=True)))
    return book


def chapters(text: str) -> list[int]:
    """Offsets, rising, of the lines that head a part of a book: CHAPTER I, Chapter 12. Title, BOOK THE FIRST, ACT I,
    SCENE II, PROLOGUE ..., a Roman number alone, or # of Markdown. A blank line or the text's begin lies before."""
    return [match.start(1) for match in HEADING.finditer(text)]


def _mend_once(text: str) -> Book:
    body = _without_notices(text)
    joined, wraps, hyphens = _joined(body)
    return Book(joined, len(text) - len(body), wraps, hyphens)


# Headings

NUMBER = (
    r"(?:[IVXLCDM]{1,8}|[ivxlc]{1,6}|[0-9]{1,3}|(?i:(?:the )?(?:first|second|third|fourth|fifth|sixth|seventh|eighth"
    r"|ninth|tenth|last|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)))"
)
HEADING = re.compile(
    r"(?:\A|\n[ \t]*\n|(?<=\n\n))((?:[ \t]{0,40}(?:"
    rf"(?:CHAPTER|Chapter|BOOK|Book|PART|Part|VOLUME|Volume|ACT|Act|SCENE|Scene|CANTO|Canto|LETTER|Letter|STAVE|Stave)"
    rf" {NUMBER}\b[^\n]{{0,120}}"
    r"|(?:PREFACE|INTRODUCTION|PROLOGUE|Prologue|EPILOGUE|Epilogue|CONCLUSION|APPENDIX|FINALE)\b[^\n]{0,40}"
    r"|(?=[IVXL])[XL]{0,4}(?:IX|IV|V?I{0,3})\.?)|\#{1,6} [^\n]{1,200}))(?=[ \t]*(?:\n|\Z))"
)

# Project Gutenberg's notices

HEADER = re.compile(
    r"^[ \t]*(?:\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)[^*]{0,400}\*{3}"
    r"|\*{1,3} ?END ?\*? ?THE SMALL PRINT[^\n]{0,200})[^\n]{0,80}\n",
    re.MULTILINE | re.IGNORECASE,
)
FOOTER = re.compile(
    r"^[ \t]*(?:\*{3} ?END OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)"
    r"|(?:\*{3} ?)?End of (?:the |this )?Project Gutenberg(?:'s|’s)?\b)",
    re.MULTILINE | re.IGNORECASE,
)
CREDIT = re.compile(
    r"\s*(?:\[?(?:produced by|e-?text (?:was )?(?:prepared|produced|scanned)"
    r"|this e-?(?:text|book) was (?:prepared|produced)"
    r"|transcribed (?:from|by)|scanned (?:and|by)|credits:|\[?transcriber['’]?s?['’]? notes?))",
    re.IGNORECASE,
)
# How far from its end of the text a notice reaches: the longest small print is about 15,000 characters.
NOTICE_REACH = 50_000
MAX_CREDITS = 4


def _without_notices(text: str) -> str:
    """What lies between header and footer, where something does; each is looked for near its own end of the text."""
    header = max(HEADER.finditer(text, 0, NOTICE_REACH), key=re.Match.start, default=None)
    start = header.end() if header else 0
    footer = FOOTER.search(text, max(start, len(text) - NOTICE_REACH))
    end = footer.start() if footer else len(text)
    body = text[start:end]
    if not body.strip() or (not header and not footer):
        return text
    return _without_credits(body.strip("\n") if header else body.rstrip())


def _without_credits(body: str) -> str:
    """The text after a header without the paragraphs that say who typed it; only those that begin it."""
    for _ in range(MAX_CREDITS):
        first, _, rest = body.partition("\n\n")
        if not CREDIT.match(first) or not rest.strip():
            break
        body = rest.strip("\n")
    return body


# Line wraps

SLACK = 8
LEAST_WIDTH, GREATEST_WIDTH = 40, 100
MIN_EVIDENCE_LINES = 4
UNFILLED_SHARE = 1 / 8
# Two lines and more that aren't blank. Not possessive: Python 3.11.2 takes a repeated possessive group but once.
PARAGRAPH = re.compile(r"^[ \t]*\S[^\n]*(?:\n[ \t]*\S[^\n]*)+", re.MULTILINE)
# What isn't prose: indented lines, marked breaks, columns, dot leaders, braces; lists, quotes, tables and fences.
NOT_PROSE = ("\n ", "\n\t", "\t", "  \n", "\\\n", "    ", ".....", ". . . . .", "{\n", "}\n")
NOT_PROSE_START = re.compile(r"\n(?:[-*+•] |[|>#=~`]|\d{1,3}[.)] )")
MAX_INDENT = 8
MARKED_BREAK = re.compile(r"\S  \n(?=[ \t]*\S)")


def _joined(text: str) -> tuple[str, int, int]:
    """`text` with its paragraphs of prose joined, the line ends that took, and the words that were divided."""
    candidates = (
        [] if _breaks_are_marked(text) else [match for match in PARAGRAPH.finditer(text) if _may_be_prose(match[0])]
    )
    paragraphs = [(match.span(), match[0].split("\n")) for match in candidates]
    width = _width([lines for _, lines in paragraphs], text)
    prose = [(span, lines) for span, lines in paragraphs if width and _is_filled(lines, width)]
    if not prose:
        return text, 0, 0
    spell = _speller(text)
    pieces, at, hyphens = [], 0, 0
    for (start, end), lines in prose:
        joined, divided = _join(lines, spell)
        pieces += [text[at:start], joined]
        at, hyphens = end, hyphens + divided
    return "".join([*pieces, text[at:]]), sum(len(lines) - 1 for _, lines in prose), hyphens


def _breaks_are_marked(text: str) -> bool:
    if "  \n" not in text:
        return False
    return 2 * len(MARKED_BREAK.findall(text)) > sum(match[0].count("\n") for match in PARAGRAPH.finditer(text))


def _may_be_prose(paragraph: str) -> bool:
    plain = paragraph.lstrip(" ")
    if len(paragraph) - len(plain) > MAX_INDENT or any(mark in plain for mark in NOT_PROSE):
        return False
    return not plain.endswith("  ") and not NOT_PROSE_START.search("\n" + plain)


def _width(paragraphs: list[list[str]], text: str) -> float:
    """The line length that the book is wrapped at, 0 if it is at none."""
    long = [(max(map(len, lines)), lines) for lines in paragraphs if len(lines) >= MIN_EVIDENCE_LINES]
    fitting = [(width, lines) for width, lines in long if LEAST_WIDTH <= width <= GREATEST_WIDTH]
    filled = [(width, lines) for width, lines in fitting if _is_filled(lines, width)]
    unwrapped = sum(len(line) for line in text.split("\n") if len(line) > GREATEST_WIDTH)
    if sum(sum(map(len, lines)) for _, lines in filled) <= unwrapped:
        return 0
    return statistics.median(width for width, _ in filled)


def _is_filled(lines: list[str], width: float) -> bool:
    """Whether the lines break because the next word would not have fitted, and aren't verse by their capitals."""
    allowed = int((len(lines) - 1) * UNFILLED_SHARE)
    full = width - SLACK - 1
    short = [len(line) + len(following.partition(" ")[0]) < full for line, following in pairwise(lines)]
    if short[0] or sum(short) > allowed or max(map(len, lines)) > width + 2 * SLACK:
        return False
    return len(lines) <= 2 or 2 * sum(line[0].isupper() for line in lines[1:]) <= len(lines) - 1


def _join(lines: list[str], spell: Callable[[str, str], str]) -> tuple[str, int]:
    """One line of several, and how many words were divided between them."""
    whole = " ".join([lines[0].rstrip(), *(line.strip() for line in lines[1:])])
    if "- " not in whole and "— " not in whole:
        return whole, 0
    text = "\n".join(line.rstrip() for line in lines)
    text = DASH_AT_END.sub(r"\1", text)
    text, divided = DIVIDED.subn(lambda match: spell(match[1], match[2]), text)
    return text.replace("\n", " "), divided


# Hyphens

WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
DIVIDED = re.compile(r"([^\W_]+)-\n([^\W_]+)")
DASH_AT_END = re.compile(r"(--|—)\n")


def _speller(text: str) -> Callable[[str, str], str]:
    """How to spell a word of two parts, after the rest of the book; its words are counted when first needed."""
    words: Counter[str] = Counter()

    def spell(left: str, right: str) -> str:
        if not words:
            words.update(WORD.findall(DIVIDED.sub(" ", text).lower()))
            words["\n"] += 1
        return left + ("-" if _is_hyphenated(left, right, words) else "") + right

    return spell


def _is_hyphenated(left: str, right: str, words: Counter[str]) -> bool:
    if not (left.isalpha() and right.isalpha() and right[0].islower()):
        return True
    solid, compound = words[(left + right).lower()], words[f"{left}-{right}".lower()]
    if solid != compound:
        return compound > solid
    return bool(words[left.lower()] and words[right.lower()])
