"""Masked words: which tokens of a row are hidden, and what stands in their place.

BERT's masking (Devlin et al. 2018, arXiv 1810.04805, section 3.1) by whole words, the later form of its authors' own
code: 15 % of the tokens are chosen; of these 80 % become the mask token, 10 % a random one, 10 % stay as they are.

Everything is drawn from (seed, row, which time the row is read) alone, and how many tokens of a row carry loss follows
from the packing index alone. So the rows are the same whoever makes them, and whoever makes a part of a global batch
knows the targets of all of it. Reads a `tokenizer.json`, writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

from llm.packing import IGNORED
from llm.pieces import byte_letters
from llm.vocabulary import MASK, PARTS, load_backend, special_ids

_PART = regex.compile(PARTS)
_STRAY_BYTE = re.compile("[\udc80-\udcff]")
TO_MASK, TO_RANDOM = 0.8, 0.1  # of the chosen tokens; the others stay


class Kind(IntEnum):
    """What a row is for: to predict each next token, to fill in hidden words, or one token hidden by itself."""

    CAUSAL = 0
    MASKED = 1
    SINGLE = 2


@dataclass(frozen=True)
class Masking:
    """What is masked: `rate` of the tokens of `share` of the rows. `tokenizer` is its folder."""

    tokenizer: str
    rate: float
    share: float
    seed: int

    def kinds(self, rows: np.ndarray, readings: np.ndarray) -> np.ndarray:
        """Which of `rows` are masked at these readings. Same shape, of `Kind`."""
        if self.share == 1:
            return np.full(len(rows), Kind.MASKED)
        drawn = [_generator(self.seed, *one).random() < self.share for one in zip(rows, readings, strict=True)]
        return np.where(drawn, Kind.MASKED, Kind.CAUSAL)

    def targets(self, kinds: np.ndarray, causal: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """How many tokens of each row carry loss. All of one shape.

        causal: how many do in a row that is not masked. tokens: what a row's pieces hold beyond one token each; of
        these `rate` is masked, at least one. A piece has one special token at most, so there are always enough.
        """
        masked = np.minimum(tokens, np.maximum(1, np.rint(self.rate * tokens).astype(np.int64)))
        return np.choose(kinds, [causal, masked, np.minimum(tokens, 1)])


# Rows


class Plan(NamedTuple):
    """What becomes of rows; each (R,): ids (below 0 an empty row), which time they are read, `Kind`s, targets."""

    rows: np.ndarray
    readings: np.ndarray
    kinds: np.ndarray
    targets: np.ndarray

    def part(self, begin: int, end: int) -> Plan:
        """Those of the rows `begin` to `end` - 1."""
        return Plan(*(column[begin:end] for column in self))


def joined(plans: list[Plan]) -> Plan:
    """The rows of several plans one after another."""
    return Plan(*map(np.concatenate, zip(*plans, strict=True)))


def empty(count: int) -> Plan:
    """So many rows that hold nothing."""
    none = np.zeros(count, dtype=np.int64)
    return Plan(none - 1, none, none + Kind.CAUSAL, none)


def mask_rows(batch: dict[str, np.ndarray], plan: Plan, masker: Masker, seed: int) -> dict[str, np.ndarray]:
    """The batch of `RowReader.read` with words hidden as planned, and `kind` (R,) int8.

    In a masked row labels[t] is the token that was at t, where it is to be guessed; causal and empty rows stay.
    """
    batch = {**{name: values.copy() for name, values in batch.items()}, "kind": plan.kinds.astype(np.int8)}
    for place in np.flatnonzero((plan.kinds != Kind.CAUSAL) & (plan.rows >= 0)):
        generator = _generator(seed, plan.rows[place], plan.readings[place])
        generator.random()  # what drew the row's kind
        hide = masker.hide_words if plan.kinds[place] == Kind.MASKED else masker.hide_one
        row = batch["input_ids"][place], batch["position_ids"][place]
        batch["input_ids"][place], batch["labels"][place] = hide(*row, int(plan.targets[place]), generator)
    return batch


class Hidden(NamedTuple):
    """A row with tokens hidden, and its labels: the token that was there, or IGNORED. Each (T,) int32."""

    input_ids: np.ndarray
    labels: np.ndarray


def load_masker(file: Path) -> Masker:
    """The masker of a `tokenizer.json`, kept by the process."""
    return _masker(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _masker(file: Path, written_ns: int) -> Masker:
    """`written_ns` tells a file from one that replaced it."""
    return Masker(load_backend(file))


class Masker:
    """Hides words of rows of a byte-level `tokenizers.Tokenizer`'s ids. ValueError if it is of another sort."""

    def __init__(self, tokenizer):
        self._mask = tokenizer.token_to_id(MASK)
        if self._mask is None:
            raise ValueError(f"masked words need a tokenizer with the token {MASK}")
        self._bytes = _bytes_of_tokens(tokenizer)
        self._lengths = np.array([len(one) for one in self._bytes], dtype=np.int64)
        self._ordinary = np.flatnonzero(self._lengths)

    def words(self, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """The word that each token is of, counted from 0 through the row; -1 for special tokens. Shapes (T,), int64.

        A word is the tokens of one of the parts into which text is cut before the merges (`llm.vocabulary.PARTS`). It
        ends with its piece of the row; a piece begins at position 0.
        """
        words = np.full(len(input_ids), -1, dtype=np.int64)
        special = self._lengths[input_ids] == 0
        cuts = np.flatnonzero((position_ids == 0) | special)
        first = 0
        for places in np.split(np.arange(len(input_ids)), cuts):
            places = places[~special[places]]
            words[places] = first + self._words_of_text(input_ids[places])
            first = int(words.max(initial=-1)) + 1
        return words

    def _words_of_text(self, ids: np.ndarray) -> np.ndarray:
        """The same for the tokens of one text, by the part in which each token's first byte lies."""
        text = b"".join(map(self._bytes.__getitem__, ids.tolist())).decode("utf-8", "surrogateescape")
        # A piece may be cut inside a character: each of such bytes is taken for a letter.
        text = _STRAY_BYTE.sub("x", text)
        parts = np.array([len(part.encode()) for part in _PART.findall(text)], dtype=np.int64)
        lengths = self._lengths[ids]
        return np.searchsorted(np.cumsum(parts), np.cumsum(lengths) - lengths, side="right")

    def hide_words(
        self, input_ids: np.ndarray, position_ids: np.ndarray, targets: int, generator: np.random.Generator
    ) -> Hidden:
        """Hide whole words until `targets` tokens carry loss; shapes (T,).

        Words are taken in a random order, one that is too long for what is missing is passed over. If only such are
        left, one of them is hidden whole, and its first tokens alone carry loss: so the number is always exact.
        """
        words = self.words(input_ids, position_ids)
        sizes = np.bincount(words[words >= 0])
        chosen = _choose(sizes, np.argsort(generator.random(len(sizes))), targets)
        hidden = np.isin(words, chosen)
        scored = hidden.copy()
        if (over := sizes[chosen].sum() - targets) > 0:
            scored[np.flatnonzero(words == chosen[-1])[-over:]] = False
        return Hidden(self._replaced(input_ids, hidden, generator), np.where(scored, input_ids, IGNORED))

    def hide_one(
        self, input_ids: np.ndarray, position_ids: np.ndarray, targets: int, generator: np.random.Generator
    ) -> Hidden:
        """Put the mask token in place of one token, as pseudo-perplexity wants it; of none if `targets` is 0."""
        candidates = np.flatnonzero(self._lengths[input_ids])
        place = candidates[int(generator.random() * len(candidates))] if targets else []
        hidden, labels = input_ids.copy(), np.full_like(input_ids, IGNORED)
        hidden[place], labels[place] = self._mask, input_ids[place]
        return Hidden(hidden, labels)

    def _replaced(self, input_ids: np.ndarray, hidden: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """What stands in the hidden places: each is drawn by itself."""
        fate = generator.random(len(input_ids))
        others = self._ordinary[(generator.random(len(input_ids)) * len(self._ordinary)).astype(np.int64)]
        drawn = np.where(fate < TO_MASK, self._mask, np.where(fate < TO_MASK + TO_RANDOM, others, input_ids))
        return np.where(hidden, drawn, input_ids)


def _choose(sizes: np.ndarray, order: np.ndarray, targets: int) -> np.ndarray:
    """Words whose `sizes` together make `targets`, the first in `order` that fit; the last may be too long. int64."""
    chosen, too_long, missing = [], [], targets
    for word, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if missing == 0:
            break
        if size <= missing:
            chosen.append(word)
            missing -= size
        else:
            too_long.append(word)
    return np.array([*chosen, *(too_long[:1] if missing else [])], dtype=np.int64)


def _bytes_of_tokens(tokenizer) -> list[bytes]:
    """The bytes of each id, none for special tokens."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    pieces = [tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size())]
    for token in special_ids(tokenizer):
        pieces[token] = ""
    try:
        return [bytes(byte_of[letter] for letter in piece) for piece in pieces]
    except KeyError as error:
        raise ValueError(f"masked words need a byte-level tokenizer, this one writes {error} in its tokens") from None


def _generator(seed: int, row: int, reading: int) -> np.random.Generator:
    return np.random.default_rng([seed, int(row), int(reading)])
