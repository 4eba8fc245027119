"""How llama.cpp calls the way in which a byte-level BPE tokenizer splits text before its merges.

GGUF has a name for it and no rule, so a tokenizer can be written only if one of the names means its rule, or gives the
same ids. Ours splits as GPT-2's does but for numerals, of which each is a part of its own: with merges that never join
two of them it makes no difference (`_joined`).
"""

from __future__ import annotations

import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from llm.pieces import byte_letters
from llm.vocabulary import PARTS

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
NAMES: dict[tuple[tuple[Any, ...], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Split", PARTS), ("ByteLevel", False)): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", QWEN2), ("ByteLevel", False)): "qwen2",
    (("Split", LLAMA3), ("ByteLevel", False)): "llama-bpe",
}
WHOLE_WORDS = ("llama-bpe",)  # where llama.cpp takes a word that is a token without merging


def splitting(backend: dict[str, Any]) -> str:
    """The name of the splitting of a `tokenizer.json`. ValueError names what there is none for."""
    _check_plain(backend)
    steps = tuple(_step(step) for step in _steps(backend["pre_tokenizer"]))
    if steps not in NAMES:
        raise ValueError(f"GGUF has no name for how the tokenizer splits text: {steps}")
    name = NAMES[steps]
    if bool(backend["model"].get("ignore_merges")) != (name in WHOLE_WORDS):
        raise ValueError(f"ignore_merges={backend['model'].get('ignore_merges')} can't be told in GGUF with {name}")
    _check_normalizer(backend["normalizer"], name)
    if ("Split", PARTS) in steps and (pair := _joined(backend["model"])):
        raise ValueError(f"merges join the numerals {pair!r}, so that GGUF's {name} would give other ids")
    return name


def _check_plain(backend: dict[str, Any]) -> None:
    """ValueError unless it is byte-level BPE."""
    model = backend["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or (backend["decoder"] or {}).get("type") != "ByteLevel":
        raise ValueError(f"the tokenizer is {model['type']}, not byte-level BPE: GGUF export takes only that")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(f"the tokenizer's {setting}={model[setting]!r} can't be told in GGUF")


def _check_normalizer(normalizer: dict[str, Any] | None, name: str) -> None:
    """Qwen's NFC is let pass: its GGUF files all go without, and most text is composed as it is."""
    kind = normalizer and normalizer["type"]
    if kind not in ((None, "NFC") if name == "qwen2" else (None,)):
        raise ValueError(f"the tokenizer changes text before it splits it ({kind}), which can't be told in GGUF")


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """What decides a step; anything unusual about it makes it one that has no name."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
            return "ByteLevel", use
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
            return "Split", rule
        case {"type": "Digits", "individual_digits": single}:
            return "Digits", single
    return (str(step),)


def _joined(model: dict[str, Any]) -> str | None:
    """Two numerals that the merges split otherwise when they stand in one part; None if there are none.

    Until a first merge joins two numerals each is merged by itself, so it is enough to try pairs, and of those the
    ones that some merge could join: its left side ends one numeral and its right side begins another.
    """
    from tokenizers import Tokenizer, models

    letters = byte_letters()
    numerals = {"".join(letters[byte] for byte in one.encode()): one for one in _numerals()}
    written = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(left, right) for left, right in written]
    bpe = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    for first, second in _suspects(numerals, merges, letters[ord(" ")]):
        apart = bpe.encode(first).tokens + bpe.encode(second).tokens
        if bpe.encode(first + second).tokens != apart:
            return numerals[first.removeprefix(letters[ord(" ")])] + numerals[second]
    return None


def _numerals() -> Iterable[str]:
    every = (chr(code) for code in range(sys.maxunicode + 1))
    return (one for one in every if unicodedata.category(one).startswith("N"))


def _suspects(numerals: Iterable[str], merges: Iterable[tuple[str, str]], space: str) -> set[tuple[str, str]]:
    """Pairs of spelt numerals, the first maybe with a space before it, that some merge could join."""
    ending: dict[str, set[str]] = defaultdict(set)
    beginning: dict[str, set[str]] = defaultdict(set)
    for one in numerals:
        for cut in range(len(one)):
            ending[one[cut:]] |= {one, space + one}
            beginning[one[: cut + 1]].add(one)
        ending[space + one].add(space + one)
    return {
        (first, second)
        for left, right in merges
        if left in ending and right in beginning
        for first in ending[left]
        for second in beginning[right]
    }
