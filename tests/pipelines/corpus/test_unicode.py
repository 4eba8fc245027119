"""Repair: what is mended, what is left alone, and that mending twice is mending once."""

import codecs
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.unicode import repair

ANY = st.text(st.characters())
SURROGATES = st.text(st.characters(categories=["Cs"]) | st.sampled_from("a\n"), max_size=8)
# What mistakes are made of: marks that look like UTF-8 read as Windows-1252, white space, controls, combining marks.
SUSPECT = st.text(
    st.sampled_from(
        "ÃÂÅâãðàÐ€™œš¢©°ŸŽ˜‚„†ƒ\xa0\xad aAé\u0301\u0323?\ufffdｆﬁ"
        "\n\t \r\v\f\0\x1a\x1b[3m\x85\x81\x92\ufeff\u2028\ud83d\ude00"
    )
    | st.characters(min_codepoint=0x80, max_codepoint=0xFF)
)
TWICE = ANY.map(lambda text: text.encode("utf-8", "replace").decode("latin-1"))
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufeff\u2028\u2029]")


def joined(text: str) -> str:
    """Pairs of surrogates by the formula of the Unicode Standard (section 3.9, table 3-5), U+FFFD for the others."""
    paired = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda pair: chr(0x10000 + ((ord(pair[0][0]) - 0xD800) << 10) + ord(pair[0][1]) - 0xDC00),
        text,
    )
    return re.sub("[\ud800-\udfff]", "\ufffd", paired)


@settings(max_examples=400, deadline=None)
@given(ANY | SUSPECT | TWICE)
def test_a_mended_text_is_plain_and_stays_as_it_is(text):
    mended = repair(text)
    assert repair(mended) == mended
    assert not CONTROL.search(mended)
    assert unicodedata.is_normalized("NFC", mended)
    assert mended.encode().decode() == mended.rstrip()
    assert not re.match(r"\s*\n", mended)


@settings(deadline=None)
@given(SURROGATES)
def test_pairs_of_surrogates_are_joined_and_lone_ones_replaced(text):
    assert repair(f"({text})") == unicodedata.normalize("NFC", f"({joined(text)})")


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0x7E, min_codepoint=0x20)))
def test_printable_ascii_is_only_trimmed(text):
    assert repair(f"<{text}>  ") == f"<{text}>"


@pytest.mark.parametrize(
    "text", ["schön", "“It’s”, she said — twice…", "Ελλάδα και Κύπρος", "déjà vu", "日本語の文章", "😀"]
)
@pytest.mark.parametrize("codec", ["latin-1", "sloppy-windows-1252"])
def test_utf_8_that_was_read_as_an_8_bit_encoding_is_read_again(text, codec):
    repair("é")  # makes the codec known
    assert repair(text.encode().decode(codec)) == text


def test_mojibake_is_mended_where_a_line_is_mixed_and_after_two_mistakes():
    assert repair("Ελλάδα and it’s schÃ¶n") == "Ελλάδα and it’s schön"
    assert repair("schön".encode().decode("latin-1").encode().decode("latin-1")) == "schön"


def test_white_space_that_belongs_to_mojibake_is_not_cut_off_before():
    assert repair("voilà".encode().decode("latin-1")) == "voilà"
    assert repair("文章".encode().decode("latin-1") + "\n") == "文章"


def test_a_line_is_mended_without_its_neighbours():
    assert repair("naïve café\nschÃ¶n\nÅngström, Ærø") == "naïve café\nschön\nÅngström, Ærø"


@pytest.mark.parametrize(
    "text",
    [
        "R&amp;D &lt;b&gt; &eacute;",  # HTML entities
        "“curly” ‘quotes’ it’s",
        "ﬁne ﬂower ﬃ ĳ",  # ligatures
        "ＦＵＬＬ ｶﾀｶﾅ　。",  # width
        "10³ µm ½ ℃",  # NFKC would change these
        "naïve café, Ærø, Ångström, señor, Łódź, fußball",
        "\u200f\u202bعربى\u202c \u200d",  # marks of direction, and joiners
        "indented:\n\n    code\n\ttab",
    ],
)
def test_what_authors_may_mean_is_left_alone(text):
    assert repair(text) == text


def test_c1_characters_are_read_as_windows_1252_and_those_it_lacks_go():
    assert repair("it\x92s \x93so\x94\x85") == "it’s “so”…"
    assert repair("\x80|\x81|\x8d|\x8f|\x90|\x9d|\x9f") == "€||||||Ÿ"


def test_control_characters_and_byte_order_marks_go_and_tabs_stay():
    assert repair("\ufeffa\0b\x07\x1a\tc\x7f\ufeffd") == "ab\tcd"
    assert repair("\x1b[1;31mred\x1b[0m \x1b]") == "red ]"


def test_all_line_ends_become_one_sort():
    assert repair("a\r\nb\rc\n\rd\fe\vf\u2028g\u2029h") == "a\nb\nc\n\nd\ne\nf\ng\nh"


def test_characters_are_composed_also_over_a_control_character():
    assert repair("cafe\u0301 cafe\0\u0301") == "café café"


def test_blank_first_lines_and_white_space_at_the_end_go_but_the_first_indentation_stays():
    assert repair(" \n\t\n\xa0\n    first\n\nlast \n \xa0\u3000\n") == "    first\n\nlast"
    assert repair(" \n \n") == repair("\0") == repair("") == ""


def test_codecs_that_others_answer_for_are_still_theirs():
    before = [name for name in ("utf-8", "future_typing", "no_such_codec") if _is_known(name)]
    repair("schÃ¶n")
    assert [name for name in ("utf-8", "future_typing", "no_such_codec") if _is_known(name)] == before


def _is_known(name: str) -> bool:
    try:
        return bool(codecs.lookup(name))
    except LookupError:
        return False
