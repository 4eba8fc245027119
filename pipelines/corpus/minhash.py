"""MinHash signatures (Broder 1997) and the keys by which near-duplicates meet (locality-sensitive hashing).

Two texts share the n-th entry of their signatures with a probability that is the Jaccard similarity J of their sets of
word n-grams. A signature is cut into bands of some rows each; texts that share a whole band are taken for duplicates,
which happens with probability 1 - (1 - J^rows)^bands: with 14 bands of 8 rows 0.92 at J = 0.8, 0.22 at J = 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipelines.corpus.words import mix, ngram_hashes, sequence_hashes, word_hashes

SEED = 0x48656164  # of the permutations; another one gives other keys, and finds the same duplicates
BATCH_CHARACTERS = 100_000  # of text at a time: what is computed with stays in a core's cache


class Keys(NamedTuple):
    """What documents meet by, documents in order of rows.

    exact: uint64 (documents,), the same for texts of the same words in the same order. bands: uint64
    (documents, bands), the same in band b for texts whose signatures agree there. Both are 0 for a text without words.
    """

    exact: np.ndarray
    bands: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Keys]) -> Keys:
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def keys_of(texts: Sequence[str], ngram: int, bands: int, rows: int) -> Keys:
    """The keys of `texts` by word n-grams of `ngram` words. `bands` may be 0: then by the exact words alone."""
    none = Keys(np.empty(0, np.uint64), np.empty((0, bands), np.uint64))
    return Keys.joined([none, *(_keys_of_batch(batch, ngram, bands, rows) for batch in _batches(texts))])


def signatures(texts: Sequence[str], ngram: int, permutations: int) -> np.ndarray:
    """MinHash signatures, uint32 (texts, permutations); all ones for a text without words."""
    return _signatures(*ngram_hashes(*word_hashes(texts), ngram), permutations)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    first, size = 0, 0
    for place, text in enumerate(texts):
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield texts[first : place + 1]
            first, size = place + 1, 0
    if first < len(texts):
        yield texts[first:]


def _keys_of_batch(texts: Sequence[str], ngram: int, bands: int, rows: int) -> Keys:
    words, offsets = word_hashes(texts)
    exact = sequence_hashes(words, offsets)
    if not bands:
        return Keys(exact, np.empty((len(texts), 0), np.uint64))
    signature = _signatures(*ngram_hashes(words, offsets, ngram), bands * rows)
    keys = _band_keys(signature.reshape(len(texts), bands, rows))
    return Keys(exact, np.where(exact[:, None] != 0, keys, np.uint64(0)))


def _signatures(grams: np.ndarray, offsets: np.ndarray, permutations: int) -> np.ndarray:
    from rensa import RMinHash  # its permutations are the same in every process; of another version they may differ

    digests = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets.astype(np.uint64), permutations, SEED)
    return np.array(digests.to_rows(), dtype=np.uint32).reshape(len(offsets) - 1, permutations)


def _band_keys(signature: np.ndarray) -> np.ndarray:
    """One hash a band. Shapes: (texts, bands, rows) to (texts, bands), uint64."""
    bands, rows = signature.shape[1:]
    factors = mix(np.arange(bands * rows, dtype=np.uint64)).reshape(bands, rows) | np.uint64(1)
    return mix((signature.astype(np.uint64) * factors).sum(axis=2, dtype=np.uint64))
