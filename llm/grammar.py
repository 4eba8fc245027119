"""Answers held to a grammar: a JSON schema, any JSON object, or a regular expression, by llguidance.

A grammar comes from a stranger and is compiled in native code, so it is first tried in a process of its own
(`llm.compiling`) that may run out of time or memory, or die, without harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

import numpy as np

from llm import compiling
from llm.compiling import GrammarError, brief, compiled, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]

MAX_BYTES = {"json_schema": 65_536, "json_object": 0, "regex": 8_192, "lark": 131_072}
MAX_VERDICTS = 512
MAX_COMPILED = 16
# By the wall: only a process that hangs gets so far, since it has a limit of its own on its CPU seconds.
START_S, TRY_S = 120.0, 30.0
TRIES_PER_PROCESS = 256  # then a fresh one, so that what memory it has gathered is no later grammar's fault

Value = TypeVar("Value")


@dataclass(frozen=True)
class Grammar:
    """What an answer's text must match, from its first character to its last.

    `text` is the JSON schema, the regular expression (Rust's syntax, without look-around), or llguidance's dialect of
    Lark, which can name special tokens; none for `json_object`.
    GrammarError if it is none of these or too long; whether it can be used, `Grammars.check` says.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise GrammarError(f"grammar kind must be one of {', '.join(get_args(GrammarKind))}, got {self.kind!r}")
        if not isinstance(self.text, str):
            raise GrammarError(f"the text of a {self.kind} must be a string, got {type(self.text).__name__}")
        if (self.kind == "json_object") != (self.text == ""):
            raise GrammarError(f"a {self.kind} takes {'no text' if self.text else 'a text, got an empty one'}")
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise GrammarError(f"the {self.kind} has half a surrogate pair, which is no character") from error
        if size > MAX_BYTES[self.kind]:
            raise GrammarError(f"the {self.kind} has {size} bytes, more than {MAX_BYTES[self.kind]}: shorten it")


class Matcher:
    """One answer's place in its grammar. What fails here is reported, never raised, and concerns this answer alone."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def mask(self, out: np.ndarray) -> str | None:
        """Set bit i of `out` (contiguous int32, 32 ids a word) if id i may come next, else clear it.

        Returns what went wrong, or None.
        """
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        return self._error()

    def accept(self, token: int) -> str | None:
        """Move on by an id. Returns what went wrong (the grammar fails, or doesn't allow the id), or None."""
        return None if self._matcher.consume_token(token) else self._error()

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether the answer must end here."""
        return not self._matcher.is_error() and self._matcher.is_stopped()

    def _error(self) -> str | None:
        return f"the grammar failed: {brief(self._matcher)}" if self._matcher.is_error() else None


class Grammars:
    """The grammars of one tokenizer, for a model of `vocab_size` ids whose answers end with one of `end_ids`.

    Any thread may call it. A grammar that is new takes some milliseconds, the first one a second; one that is hard can
    take several, so call `check` where nothing else waits. Both verdicts are remembered, for the latest grammars.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, end_ids: Collection[int]):
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._verdicts: _Recent[str] = _Recent(MAX_VERDICTS)
        self._compiled: _Recent[Any] = _Recent(MAX_COMPILED)
        self._trying = threading.Lock()  # one grammar at a time is tried
        self._compiling = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """GrammarError, with what is wrong, if `grammar` can't be used, or takes too much time or memory."""
        if not self._end_ids:
            raise GrammarError("the model has no end-of-text token, so an answer under a grammar could not end")
        if grammar.kind == "json_object":
            return
        verdict = self._verdict(grammar)
        if verdict:
            raise GrammarError(verdict)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of `grammar`; GrammarError as `check`."""
        self.check(grammar)
        key = _key(grammar)
        with self._compiling:
            first = self._compiled.get(key)
            if first is None:
                first = self._compiled.put(key, compiled(self._tokenizer, grammar.kind, grammar.text))
            return Matcher(first.deep_copy())

    def close(self) -> None:
        """End the process that tries grammars; the next new grammar starts another."""
        with self._trying:
            self._trial.close()

    def _verdict(self, grammar: Grammar) -> str:
        """What is wrong with a grammar; "" if nothing is."""
        key = _key(grammar)
        verdict = self._verdicts.get(key)
        if verdict is None:
            with self._trying:
                verdict = self._verdicts.get(key)  # another thread may have asked the same meanwhile
                if verdict is None:
                    verdict = self._verdicts.put(key, self._trial.verdict(grammar))
        return verdict

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What `llm.compiling.load_tokenizer` takes."""
        backend = json.loads(self._hf_tokenizer.backend_tokenizer.to_str())
        backend.update(truncation=None, padding=None)
        return {"tokenizer": json.dumps(backend), "vocab_size": self._vocab_size, "end_ids": self._end_ids}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._settings)

    @cached_property
    def _trial(self) -> _Trial:
        return _Trial(json.dumps(self._settings))


class _Trial:
    """A process that tries grammars, one after another; a dead one is replaced when the next grammar comes."""

    `text` is the JSON schema, the regular expression (Rust's syntax, without look-around), or llguidance's dialect of
    Lark, which can name special tokens; none for `json_object`.
    GrammarError if it is none of these or too long; whether it can be used, `Grammars.check` says.
