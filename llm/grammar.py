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

    def __init__(self, settings: str):
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._tries = 0

    def verdict(self, grammar: Grammar) -> str:
        """What is wrong with `grammar`; "" if nothing is."""
        if self._tries >= TRIES_PER_PROCESS:
            self.close()
        fresh = self._process is None
        try:
            return self._ask(asdict(grammar))
        except _Died as died:
            if died.code is None:
                raise GrammarError(f"the {grammar.kind} could not be tried within {TRY_S:.0f} s: try again") from died
            if died.code == -signal.SIGXCPU:
                return f"the {grammar.kind} takes too much time to compile: make it simpler"
            if fresh:
                return f"the {grammar.kind} takes too much memory to compile, or crashes the compiler: make it simpler"
            return self.verdict(grammar)  # what earlier grammars left in memory must not be this one's fault

    def close(self) -> None:
        if self._process is not None:
            self._end()
            self._process = None

    def _ask(self, grammar: dict[str, str]) -> str:
        if self._process is None:
            self._start()
        self._tries += 1
        return self._exchange(json.dumps(grammar), TRY_S)

    def _start(self) -> None:
        # By its file and without that file's folder on the path: it works from any working directory.
        command = [sys.executable, "-P", str(Path(compiling.__file__).resolve())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process, self._tries = process, 0
        self._end = weakref.finalize(self, _end, process)
        try:
            problem = self._exchange(self._settings, START_S)
        except _Died as died:
            raise GrammarError(f"no grammar can be tried: the process for it ended with {died.code}") from died
        if problem:
            self.close()
            raise GrammarError(problem)

    def _exchange(self, line: str, within_s: float) -> str:
        """The answer to one line; `_Died`, with the process ended, if none comes."""
        process = self._process
        assert process is not None
        try:
            return json.loads(_ask_line(process, line, within_s))
        except TimeoutError as error:
            self.close()
            raise _Died(None) from error
        except (OSError, EOFError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(within_s)
            self.close()
            raise _Died(process.returncode) from error


class _Died(Exception):
    """The process that tries grammars gave no answer: it ended with `code`, or ran out of time (None)."""

    def __init__(self, code: int | None):
        super().__init__(code)
        self.code = code


def _ask_line(process: subprocess.Popen[bytes], line: str, within_s: float) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line.encode() + b"\n")
    process.stdin.flush()
    until = time.monotonic() + within_s
    poll = select.poll()  # select() itself takes no file beyond the 1,024th
    poll.register(process.stdout, select.POLLIN)
    answer = b""
    while not answer.endswith(b"\n"):
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(process.stdout.fileno(), 65_536)
        if not piece:
            raise EOFError
        answer += piece
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was still to be written has nowhere to go
            if pipe is not None:
                pipe.close()


class _Recent(Generic[Value]):
    """The values last asked for, at most `size` of them."""

    def __init__(self, size: int):
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: str, value: Value) -> Value:
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


def _key(grammar: Grammar) -> str:
    return hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode()).hexdigest()
