"""Words and word n-grams of many texts at once, as 64-bit hashes in numpy arrays.

A word is a run of letters, digits and underscores in lower case; a character of a script that is written without
spaces (Chinese, Japanese, Thai, ...) is a word of its own. Hashes depend on the words alone: they are the same in
every process and on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BASE = 0x100000001B3  # of the polynomial over a word's bytes; odd, so that no power of it is 0
SPREAD = 0x9E3779B97F4A7C15  # and over the words of an n-gram

_WORD_BYTES = np.zeros(256, dtype=bool)
_WORD_BYTES[[*range(0x30, 0x3A), *range(0x41, 0x5B), 0x5F, *range(0x61, 0x7B), *range(0x80, 0x100)]] = True
# Thai to Khmer, kana, CJK ideographs and their extensions, Hangul is written with spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all words of `texts`, uint64 (words,), and where each text's words begin, int64 (texts + 1,)."""
    encoded = [_plain(text).encode("utf-8", "replace") for text in texts]
    data = np.frombuffer(b"\0".join(encoded), dtype=np.uint8)
    starts, ends = _runs(_WORD_BYTES[data])
    begins = np.cumsum([0, *(len(one) + 1 for one in encoded)])
    return mix(_polynomials(data, starts, ends)), np.searchsorted(starts, begins)


def ngram_hashes(words: np.ndarray, offsets: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of each text, uint64 (n-grams,), and where each text's begin, int64 (texts + 1,).

    A text of fewer than `n` words, but some, has one n-gram: all of them.
    """
    lengths = np.diff(offsets)
    counts = np.where(lengths > 0, np.maximum(lengths - n + 1, 1), 0)
    first = np.concatenate([[0], np.cumsum(counts)])
    padded = np.zeros(len(words) + (n - 1) * len(lengths) + n, dtype=np.uint64)
    room = np.arange(len(lengths)) * (n - 1)  # zeros after each text, so that no n-gram goes over to the next
    padded[np.arange(len(words)) + np.repeat(room, lengths)] = words
    grams = np.zeros(len(padded) - n + 1, dtype=np.uint64)
    for place in range(n):
        grams += padded[place : place + len(grams)] * _power(SPREAD, place + 1)
    places = np.arange(first[-1]) + np.repeat(offsets[:-1] + room - first[:-1], counts)
    return mix(grams[places]), first


def sequence_hashes(words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """One hash for each text's words in their order, uint64 (texts,); 0 for a text without words."""
    place = np.arange(len(words)) - np.repeat(offsets[:-1], np.diff(offsets))
    terms = words * _powers(SPREAD, int(place.max(initial=0)) + 1)[place]
    return np.where(np.diff(offsets) > 0, mix(_sums(terms, offsets)), np.uint64(0))


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every bit of the input moves every bit of the output."""
    z = values + np.uint64(SPREAD)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _plain(text: str) -> str:
    """Lower case, with what isn't a word's taken out as far as bytes alone don't tell."""
    low = text.lower()
    for character in () if low.isascii() else set(low):  # far fewer than a regular expression would look at
        if character > "\x7f" and not character.isalnum():
            low = low.replace(character, " ")
        elif _UNSPACED.match(character):
            low = low.replace(character, f" {character} ")
    return low


def _runs(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of True begin and end."""
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    return edges[::2], edges[1::2]


def _polynomials(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sum of byte times BASE^(place in the word) modulo 2^64, for each word."""
    lengths = ends - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    letters = data[place + np.repeat(starts, lengths)].astype(np.uint64)
    return _sums(letters * _powers(BASE, int(place.max(initial=0)) + 1)[place], offsets)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each part of `values`, modulo 2^64; 0 for an empty part."""
    total = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values, out=total[1:])
    return total[offsets[1:]] - total[offsets[:-1]]


def _powers(base: int, count: int) -> np.ndarray:
    """base^1 to base^count modulo 2^64."""
    return _powers_up_to(base, 1 << max(8, (count - 1).bit_length()))


@lru_cache(maxsize=8)
def _powers_up_to(base: int, count: int) -> np.ndarray:
    return np.cumprod(np.full(count, base, dtype=np.uint64))


def _power(base: int, exponent: int) -> np.uint64:
    return np.uint64(pow(base, exponent, 1 << 64))
