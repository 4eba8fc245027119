"""Grammars compiled by llguidance within bounds, and the process in which a stranger's grammar is tried first.

llguidance counts what it spends on a grammar and gives up; the process is there for what it doesn't count: a crash of
native code, memory, time. Run as a program this file reads lines of JSON: the tokenizer, then grammars, each of which
it answers with what is wrong with it. It imports nothing heavy, so it starts in a moment and stays small.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_DEPTH = 64  # of a schema's nesting
MAX_ERROR_CHARACTERS = 400
COMPILE_CPU_S = 1.0
STEP_CPU_S = 0.25  # of one mask; a batch waits for each of its requests' masks
WALK_STEPS = 16
TRY_CPU_S = 2  # of all that; whole seconds, as the system counts them
MEMORY_BYTES = 256 * 1024**2  # more than the process holds once it has the tokenizer

LIMITS = {
    "max_lexer_states": 16_384,  # 1 to 2 kB each, for every running request
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Endless white space is valid JSON, and models do fall into it; so much is enough to indent what is nested 15 deep.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ \n\r\t]{1,64}"}


class GrammarError(ValueError):
    """A grammar that can't be used, and why."""


def load_tokenizer(settings: dict) -> LLTokenizer:
    """llguidance's tokenizer from `tokenizer` (a tokenizer.json's text), `vocab_size` and `end_ids`."""
    from llguidance import LLTokenizer  # only whoever holds answers to grammars needs it

    try:
        return LLTokenizer(settings["tokenizer"], n_vocab=settings["vocab_size"], eos_token=settings["end_ids"])
    except ValueError as error:
        raise GrammarError(f"no answer can be held to a grammar with this tokenizer: {error}") from error


def compiled(tokenizer: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """A matcher at the beginning of a grammar; GrammarError says what is wrong with it."""
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, _source(kind, text), log_level=0, limits=LLParserLimits(**LIMITS))
    _raise_error(matcher, kind)
    allowed = int.from_bytes(matcher.compute_bitmask(), "little")
    _raise_error(matcher, kind)
    if not allowed & ~_bits(tokenizer.eos_tokens):
        raise GrammarError(f"the {kind} can't be used: only the empty text matches it")
    return matcher


def _source(kind: str, text: str) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "lark":
        return LLMatcher.grammar_from_lark(text)
    schema = '{"type": "object"}' if kind == "json_object" else _checked_schema(text)
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise GrammarError(f"the JSON schema can't be used: {error}") from error


def _checked_schema(text: str) -> str:
    """The schema as it was checked: of a key that comes twice, the text itself holds what nobody looked at."""
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
        checked = json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema must be an object, got {text[:80]}")
    if "x-guidance" in schema:
        raise GrammarError("x-guidance is not a keyword of JSON schemas: leave it out")
    if _depth(schema) > MAX_DEPTH:
        raise GrammarError(f"the JSON schema is nested more than {MAX_DEPTH} deep")
    return checked


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [child for children in inner for child in children]
    return depth


def _raise_error(matcher: LLMatcher, kind: str) -> None:
    if matcher.is_error():
        raise GrammarError(f"the {kind} can't be used: {brief(matcher)}")


def brief(matcher: LLMatcher) -> str:
    """What a matcher says went wrong, in one line, without the grammar and the state that it adds."""
    said = re.split(r"<non-verbose/>|<state>|\n +1 \| ", matcher.get_error())[0].strip()
    if said.startswith("NoExtension"):
        return "no text matches it"
    if said.startswith("oneOf"):
        return "oneOf is not supported: use anyOf"
    # Of a regex that can't be parsed the last line says why; those before it draw it.
    return " ".join(said.rpartition("\nerror: ")[2].split())[:MAX_ERROR_CHARACTERS] or "it failed without a message"


def tried(tokenizer: LLTokenizer, kind: str, text: str) -> None:
    """Compile a grammar and follow it for a few tokens; GrammarError if it is wrong or takes too long."""
    started = time.process_time()
    matcher = compiled(tokenizer, kind, text)
    took = time.process_time() - started
    if took > COMPILE_CPU_S:
        raise GrammarError(f"the {kind} takes {took:.1f} s to compile, more than {COMPILE_CPU_S}: make it simpler")
    for step in range(WALK_STEPS):
        started = time.process_time()
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        _raise_error(matcher, kind)
        took = time.process_time() - started
        if took > STEP_CPU_S:
            raise GrammarError(f"the {kind} takes {took:.1f} s for one token, more than {STEP_CPU_S}: make it simpler")
        # A fixed path that wanders through the vocabulary: always the same verdict on the same grammar.
        onward = allowed & ~_bits(tokenizer.eos_tokens)
        if not onward:
            return
        matcher.consume_token(_first_from(onward, step * 2_654_435_761 % tokenizer.vocab_size))
        _raise_error(matcher, kind)


def _bits(ids: list[int]) -> int:
    return sum(1 << token for token in ids)


def _first_from(ids: int, start: int) -> int:
    """The first id of a set (the bits of a number) that is `start` or more; the first of all where none is."""
    ids = (ids >> start) << start or ids
    return (ids & -ids).bit_length() - 1


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer the tokenizer and each grammar in `requests` with one line: what is wrong with it, "" if nothing is."""

    def answer(problem: str) -> None:
        print(json.dumps(problem[:MAX_ERROR_CHARACTERS]), file=answers, flush=True)

    try:
        tokenizer = load_tokenizer(json.loads(requests.readline()))
    except GrammarError as error:
        return answer(str(error))
    _limit_memory()
    answer("")
    for line in requests:
        _limit_cpu()
        answer(_verdict(tokenizer, **json.loads(line)))


def _verdict(tokenizer: LLTokenizer, kind: str, text: str) -> str:
    try:
        tried(tokenizer, kind, text)
    except GrammarError as error:
        return str(error)
    return ""


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_cpu() -> None:
    """Let the next grammar have its seconds: the limit counts from the start of the process."""
    soft = math.ceil(time.process_time()) + TRY_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
