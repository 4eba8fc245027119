"""Answers held to a grammar: a JSON schema, any JSON object, or a regular expression, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]

MAX_GRAMMAR_BYTES = 32_768


class GrammarError(ValueError):
    """A grammar that can't be used, and why."""


@dataclass(frozen=True)
class Grammar:
    """What an answer's text must match, from its first character to its last.

    `text` is the JSON schema, the regular expression (Rust's syntax, without look-around), "" for `json_object`,
    or llguidance's dialect of Lark, which can name special tokens.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind) or not isinstance(self.text, str):
            raise GrammarError(f"a grammar is {', '.join(get_args(GrammarKind))} with its text, got {self.kind!r}")
        if (self.kind == "json_object") != (self.text == ""):
            raise GrammarError(f"{self.kind} takes {'no text' if self.text else 'a text, got none'}")
        size = len(self.text.encode(errors="replace"))
        if size > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"the {self.kind} has {size} bytes, more than {MAX_GRAMMAR_BYTES}")


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher):
        self._matcher = matcher

    def mask(self, out: np.ndarray) -> str | None:
        """Set bit i of `out` (int32, 32 ids a word) if id i may come next; the error if the grammar fails."""
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        return self._matcher.get_error() or None

    def accept(self, token: int) -> str | None:
        """Move on by an id; the error if the grammar doesn't allow it or fails."""
        if self._matcher.consume_token(token):
            return None
        return self._matcher.get_error() or "the grammar failed"

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether the answer must end here."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class Grammars:
    """The grammars of one tokenizer, for a model of `vocab_size` ids whose answers end with one of `end_ids`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, end_ids: Collection[int]):
        from llguidance.hf import from_tokenizer

        if not end_ids:
            raise GrammarError("the model has no end-of-text token, so no grammar can end")
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(end_ids))

    def check(self, grammar: Grammar) -> None:
        """GrammarError if `grammar` can't be used."""
        self._compile(grammar)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of `grammar`; GrammarError as `check`."""
        return Matcher(self._compile(grammar))

    def _compile(self, grammar: Grammar):
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the {grammar.kind} can't be used: {matcher.get_error()}")
        return matcher


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = {"type": "object"} if grammar.kind == "json_object" else json.loads(grammar.text)
    return LLMatcher.grammar_from_json_schema(schema)
