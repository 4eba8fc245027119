"""Text to ids, several times as fast as the tokenizer by itself: a part of text that came before is looked up.

The merges of byte-level BPE never go over from one part to the next (`llm.vocabulary.PARTS`), so the ids of a text are
those of its parts, and most parts are words that came before. The ids are the tokenizer's own, one for one.
"""

from __future__ import annotations

import json
import re
from array import array
from functools import lru_cache
from itertools import chain
from pathlib import Path

from llm.pieces import byte_letters
from llm.vocabulary import PARTS, load_backend

MOST_PARTS = 1 << 18  # kept at a time: some 60 MB
LONGEST_PART = 64  # characters; longer ones hardly come again

# Latin, Greek and Cyrillic letters, and general punctuation. What is a letter, a digit or white space among these is
# the same in every version of Unicode and in every library. Other texts the tokenizer parts itself.
_KNOWN = r"\t-\r -\u0377\u037a-\u037f\u0384-\u038a\u038c\u038e-\u03a1\u03a3-\u052f\u2000-\u2064\u20a0-\u20bf"
_OTHER = re.compile(rf"[^{_KNOWN}]")
# `PARTS` in the words of Python's own module, which is faster than one that knows \p{L}.
_DIGIT = r"0-9\xb2\xb3\xb9\xbc-\xbe"
_SPACE = r"\t-\r \x85\xa0\u2000-\u200a\u2028\u2029\u202f\u205f"
_LETTER = rf"[^\W_{_DIGIT}]"
_PART = re.compile(
    rf"'(?:[sdmt]|ll|ve|re)| ?{_LETTER}+| ?[{_DIGIT}]| ?(?:[^\w{_SPACE}]|_)+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)


def load_encoder(file: Path) -> Encoder:
    """The encoder of a `tokenizer.json`, kept by the process with what it has learnt."""
    return _encoder(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _encoder(file: Path, written_ns: int) -> Encoder:
    """`written_ns` tells a file from one that replaced it."""
    return Encoder(load_backend(file))


class Encoder:
    """The ids of texts by a `tokenizers.Tokenizer`. A special token that is spelt out in a text is text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._ids_of = _IdsOfParts(tokenizer.model).__getitem__ if _parting(tokenizer) == PARTS else None

    def encode(self, text: str) -> array:
        """The ids of `text`, an array of type 'I' (uint32)."""
        if self._ids_of is None or _OTHER.search(text):
            return array("I", self.tokenizer.encode(text, add_special_tokens=False).ids)
        return array("I", chain.from_iterable(map(self._ids_of, _PART.findall(text))))


class _IdsOfParts(dict[str, tuple[int, ...]]):
    """The ids of each part that was asked for, made by the tokenizer's model at the first time."""

    def __init__(self, model):
        super().__init__()
        self._model, self._letter = model, byte_letters()

    def __missing__(self, part: str) -> tuple[int, ...]:
        letters = "".join(self._letter[byte] for byte in part.encode())
        ids = tuple(token.id for token in self._model.tokenize(letters))
        if len(part) <= LONGEST_PART:
            if len(self) == MOST_PARTS:
                self.clear()  # the common ones are back in no time
            self[part] = ids
        return ids


def _parting(tokenizer) -> str:
    """How the tokenizer parts text, as far as `PARTS` can be told from it; nothing if it changes text first."""
    said = json.loads(tokenizer.to_str())
    steps = (said["pre_tokenizer"] or {}).get("pretokenizers", [])
    alone = said["normalizer"] is None and [step["type"] for step in steps] == ["Split", "ByteLevel"]
    return steps[0]["pattern"].get("Regex", "") if alone else ""
