"""Mends the characters of a text: the one rule that every text passes as it comes in.

Reads and writes `str`. What is done, and done again until nothing changes, so that a mended text stays as it is:

    surrogates         pairs are joined, a lone one becomes U+FFFD, so that every text can be written as UTF-8
    line ends          \\r\\n, \\r, form feed, vertical tab, U+2028 and U+2029 become \\n
    terminal colours   whole escape sequences go, not the escape character alone
    control characters C0 but \\n and \\t, delete, and U+FEFF (byte order mark) go
    encoding mistakes  UTF-8 read as an 8-bit encoding (mojibake) is read again as UTF-8, line by line, by ftfy [1]
    C1 characters      become what Windows-1252 has in their place, as in HTML5 [2]; those that it lacks go
    composition        Unicode normalisation form C [3]
    ends               blank first lines and trailing white space go

Left as they are, for a corpus keeps what its authors wrote: HTML entities (in plain text they are the text, and HTML
was decoded when it was read), curly quotes, ligatures, and fullwidth or halfwidth letters.

[1] Speer, "ftfy", 2019, doi:10.5281/zenodo.2591652. [2] https://encoding.spec.whatwg.org/#names-and-labels.
[3] Unicode Standard Annex #15.
"""

from __future__ import annotations

import codecs
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

C1 = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
LINE_ENDS = "\v\f\r\u2028\u2029"
BYTE_ORDER_MARK = "\ufeff"
CONTROLS = {
    **dict.fromkeys([*range(0x20), 0x7F, ord(BYTE_ORDER_MARK)]),
    **dict.fromkeys(map(ord, LINE_ENDS), "\n"),
    **{ord(kept): kept for kept in "\t\n"},
}
TERMINAL_SEQUENCE = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
# All that UTF-8 is made of but control characters. To delete these from bytes and see what's left is some ten times
# faster than a search by regular expression.
_ORDINARY = bytes({*range(0x20, 0x100), *b"\t\n"} - {0x7F})


def repair(text: str) -> str:
    """`text` by the rule above. repair(repair(text)) == repair(text), and the result can be written as UTF-8."""
    mended = _mended(text)
    # White space at the end goes last, for U+00A0 and U+0085 may be the end of mojibake. The line that it is taken
    # from is mended again, for its end is part of what mojibake is told by.
    while (trimmed := BLANK_LINES.sub("", mended).rstrip()) != mended:
        before, line_end, last = trimmed.rpartition("\n")
        mended = before + line_end + _mended(last)
    return mended


def _mended(text: str) -> str:
    """All of the rule but the ends. Mending this again changes nothing."""
    mended = _plain(text)
    # Every round that changes something makes fewer characters out of more, or of a C1 character another.
    while (decoded := _decoded(mended)) != mended:
        mended = _plain(decoded)
    return mended


def _plain(text: str) -> str:
    """No surrogates, no unwanted characters, \\n for each line end, form C."""
    if _has_controls(text):
        text = TERMINAL_SEQUENCE.sub("", text).replace("\r\n", "\n").translate(CONTROLS)
    return text if text.isascii() else unicodedata.normalize("NFC", _joined(text))


def _has_controls(text: str) -> bool:
    rare = not text.isascii() and any(character in text for character in "\u2028\u2029\ufeff")
    return rare or bool(text.encode("utf-8", "surrogatepass").translate(None, _ORDINARY))


def _joined(text: str) -> str:
    """`text` with pairs of surrogates joined and U+FFFD for lone ones."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _decoded(text: str) -> str:
    """`text` without mojibake and C1 characters."""
    if text.isascii():
        return text
    decode = _decoder()
    return "\n".join(line if line.isascii() else decode(line) for line in text.split("\n"))


# ftfy


@lru_cache(maxsize=1)
def _decoder() -> Callable[[str], str]:
    """A function that mends the mojibake and the C1 characters of a line.

    Of ftfy's fixes only that of encodings is called: `fix_text` forgets the four switches below when it isn't asked to
    explain (6.3.1), and the rest of what it does is done here, or on purpose not at all.
    """
    with _unknown_codecs_stay_unknown():
        import ftfy
    config = ftfy.TextFixerConfig(
        restore_byte_a0=True,  # HTML readers turn U+00A0 into a space, also in the middle of mojibake
        replace_lossy_sequences=True,  # a character that can't be had back costs itself, not its whole line
        decode_inconsistent_utf8=True,  # pages are pasted together: a line may be mojibake in part
        fix_c1_controls=True,  # they are Windows-1252 read as Latin-1 and almost never meant
        explain=False,
    )

    def decode(line: str) -> str:
        # To ftfy a C1 character is bad in itself.
        return ftfy.fix_encoding(line, config).translate(C1) if ftfy.is_bad(line) else line

    return decode


@contextmanager
def _unknown_codecs_stay_unknown() -> Iterator[None]:
    """While the block lasts, future_typing doesn't answer for codecs that it doesn't know.

    That package, which comes with the chat data, says on start-up of Python that every name of a codec is its own. So
    ftfy's would never be asked for theirs; registered behind them, it leaves them alone.
    """
    greedy = sys.modules.get("future_typing.codec")
    times = 0
    while greedy and times < 8 and _known("headwater_no_such_codec"):
        codecs.unregister(greedy.search_function)
        times += 1
    try:
        yield
    finally:
        if greedy and times:
            codecs.register(greedy.search_function)


def _known(name: str) -> bool:
    try:
        return bool(codecs.lookup(name))
    except LookupError:
        return False
