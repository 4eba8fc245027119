"""The fast way from text to ids gives the tokenizer's own ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llm import encoding
from llm.encoding import _OTHER, _PART, Encoder
from llm.pieces import byte_letters
from llm.vocabulary import encode_text, gpt2_tokenizer, train_tokenizer

TEXT = "It's the year 1984, isn't it?\n\n\tdef answer(self):\n        return 6 * 7  # naïve café — “quoted”\r\n"
TEXT += " ½ x² Привет"


@pytest.fixture(scope="module")
def trained():
    tokenizer = train_tokenizer([TEXT, "the quick brown fox jumps over lazy dogs"] * 20, 400)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def encoder(trained):
    return Encoder(trained.backend_tokenizer)


def own(trained, text):
    return encode_text(trained, text)


@pytest.mark.parametrize(
    "text", [TEXT, "", " ", "  \n", "<|endoftext|> spelt out", "日本語 and 12", "\x1c\x00 a", "a" * 500]
)
def test_ids_are_the_tokenizers(trained, encoder, text):
    assert encoder.encode(text).tolist() == own(trained, text)


@given(text=st.text() | st.text(alphabet="ab1² _'s\t\n\xa0\u2009—é½", max_size=40))
def test_ids_are_the_tokenizers_for_any_text(trained, encoder, text):
    assert encoder.encode(text).tolist() == own(trained, text)


def test_every_character_that_is_parted_here_is_parted_as_the_tokenizer_does(trained):
    """Beside a letter, a digit, a sign, a space and itself."""
    parting = trained.backend_tokenizer.pre_tokenizer
    known = [chr(code) for code in range(0x3000) if not _OTHER.search(chr(code))]
    assert len(known) > 1200
    for character in known:
        text = f"a{character}b {character}1{character} {character}{character}?{character}\n{character}"
        spans = [text[first:last] for _, (first, last) in parting.pre_tokenize_str(text)]
        assert _PART.findall(text) == spans, hex(ord(character))


def test_what_is_kept_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(encoding, "MOST_PARTS", 8)
    small = Encoder(trained.backend_tokenizer)
    for text in ("one two three four five six seven eight nine ten", "x" * 200, "one two"):
        assert small.encode(text).tolist() == own(trained, text)
        assert len(small._ids_of.__self__) <= 8
    assert "x" * 200 not in small._ids_of.__self__


def test_a_tokenizer_that_parts_otherwise_does_it_itself():
    gpt2 = gpt2_tokenizer()
    assert Encoder(gpt2).encode("The answer is 1234.").tolist() == gpt2.encode("The answer is 1234.").ids


def test_letters_of_bytes_are_gpt2s():
    assert byte_letters() == [bytes_to_unicode()[byte] for byte in range(256)]
