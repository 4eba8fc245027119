"""Words and n-grams as hashes, against sets of words made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.minhash import keys_of, signatures
from pipelines.corpus.words import ngram_hashes, sequence_hashes, word_hashes


def hashes_of(text):
    return word_hashes([text])[0].tolist()


def test_words_are_runs_of_letters_digits_and_underscores_in_lower_case():
    assert hashes_of("Hello, world!\thello_1") == hashes_of("hello\nWORLD -- hello_1")
    assert len(set(hashes_of("hello world hello_1 hello 1"))) == 4
    assert hashes_of("naïve “café” — ÉTÉ") == hashes_of("Naïve café été")
    assert hashes_of("") == hashes_of(" ... ,") == []


def test_scripts_without_spaces_split_into_characters():
    assert len(hashes_of("日本語 text")) == 4
    assert hashes_of("日本")[0] == hashes_of("日")[0]


def test_hashes_are_those_of_all_times():
    """Other processes and other machines compare with them: they may not change unseen."""
    assert hashes_of("Hello") == [520024475694424041]


@given(st.lists(st.text(max_size=60), max_size=8))
def test_texts_together_are_as_texts_alone(texts):
    words, offsets = word_hashes(texts)
    assert offsets[0] == 0
    assert offsets[-1] == len(words)
    for number, text in enumerate(texts):
        assert words[offsets[number] : offsets[number + 1]].tolist() == hashes_of(text)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=7), max_size=5), st.integers(1, 4))
def test_ngrams_are_equal_where_their_words_are(texts, n):
    words, offsets = word_hashes([" ".join(text) for text in texts])
    grams, first = ngram_hashes(words, offsets, n)
    named = [tuple(text[i : i + n]) for text in texts for i in range(max(len(text) - n + 1, 1 if text else 0))]
    assert len(named) == len(grams) == first[-1]
    by_hash = {}
    for name, gram in zip(named, grams.tolist(), strict=True):
        assert by_hash.setdefault(gram, name) == name
    assert len(by_hash) == len(set(named))


def test_a_sequence_is_named_by_its_words_and_their_order():
    texts = ["a b c", "A, b. C!", "b a c", "a b", "", "..."]
    found = sequence_hashes(*word_hashes(texts)).tolist()
    assert found[0] == found[1]
    assert len({*found[:4]}) == 3
    assert found[4:] == [0, 0]


def test_signatures_estimate_the_jaccard_similarity():
    """Standard error of the mean of 112 agreements at J is sqrt(J (1 - J) / 112), 0.04 at 0.8."""
    draw, words = np.random.default_rng(0), [f"w{n}" for n in range(5000)]
    errors = []
    for _ in range(60):
        one = draw.choice(words, 400).tolist()
        other = one[: draw.integers(150, 400)] + draw.choice(words, 30).tolist()
        sets = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (one, other)]
        signed = signatures([" ".join(one), " ".join(other)], 5, 112)
        errors.append((signed[0] == signed[1]).mean() - len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert np.abs(errors).mean() < 0.05
    assert abs(np.mean(errors)) < 0.02, "no bias"


@pytest.mark.parametrize(("jaccard", "found"), [(0.9, 1.0), (0.8, 0.92), (0.6, 0.21), (0.4, 0.01)])
def test_bands_find_pairs_as_often_as_the_formula_says(jaccard, found):
    """Pairs of sets with exactly that similarity: of n words, some shared, the others not. 1 - (1 - J^8)^14."""
    shared = round(200 * jaccard)
    own = (200 - shared) // 2
    pairs = 150
    texts = [
        " ".join([f"p{pair}s{n}" for n in range(shared)] + [f"p{pair}o{side}n{n}" for n in range(own)])
        for pair in range(pairs)
        for side in (0, 1)
    ]
    bands = keys_of(texts, 1, 14, 8).bands
    met = (bands[::2] == bands[1::2]).any(axis=1).mean()
    assert met == pytest.approx(found, abs=0.12)
