from __future__ import annotations

import json
import os
import pickle
import re
import signal
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, HTTPServer

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm import grammar as grammar_module
from llm.engine import Engine
from llm.grammar import Grammar, GrammarError, Grammars, Matcher
from llm.sampling import Sampler, SamplingParams, choose
from llm.vocabulary import END_OF_TEXT, END_OF_TURN, gpt2_tokenizer
from tests.models import tiny_model, tiny_tokenizer

SPARE = 7  # ids that a model has beyond its tokenizer's


def gpt2_style():
    return PreTrainedTokenizerFast(tokenizer_object=gpt2_tokenizer(), eos_token=END_OF_TEXT)


def llama_style():
    """SentencePiece's spelling: spaces as U+2581, other bytes as <0x..>, a space before the text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *'{}[]",:abcdetrufalsn']
    merged = ["tr", "tru", "true", '"a', '":', "\u2581\u2581", "\u2581true"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *merged])}
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ('"', "a"), ('"', ":"), ("\u2581", "\u2581"), ("\u2581", "true")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"own": tiny_tokenizer, "gpt2": gpt2_style, "llama": llama_style}


@lru_cache
def grammars_of(name: str) -> tuple[PreTrainedTokenizerFast, Grammars, frozenset[int]]:
    tokenizer = TOKENIZERS[name]()
    turn = tokenizer.get_vocab().get(END_OF_TURN)
    end_ids = frozenset({tokenizer.eos_token_id, turn} - {None})
    return tokenizer, Grammars(tokenizer, len(tokenizer) + SPARE, end_ids), end_ids


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """However busy the machine is, the processes that try grammars come to their end."""
    monkeypatch.setattr(grammar_module, "TRY_S", 900)
    monkeypatch.setattr(grammar_module, "START_S", 900)


@pytest.fixture(scope="module")
def grammars():
    made = Grammars(tiny_tokenizer(), len(tiny_tokenizer()) + SPARE, [0, 7])
    yield made
    made.close()


def allowed(matcher: Matcher, vocab_size: int) -> np.ndarray:
    """Which of the ids may come next: bool (vocab_size,)."""
    words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    assert matcher.mask(words) is None
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)


def schema_grammar(schema: dict) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def random_answer(name: str, grammar: Grammar, seed: int, length: int = 400) -> str:
    """The text that random logits make under `grammar`; every token is checked against what a grammar promises."""
    tokenizer, grammars, end_ids = grammars_of(name)
    vocab_size = len(tokenizer) + SPARE
    matcher = grammars.matcher(grammar)
    params = SamplingParams(grammar=grammar, seed=seed, max_new_tokens=length)
    sampler = Sampler(params, [5], vocab_size=vocab_size, end_ids=end_ids, matcher=matcher)
    noise = torch.Generator().manual_seed(seed)
    ends = np.isin(np.arange(vocab_size), sorted(end_ids))
    never = np.isin(
        np.arange(vocab_size), [*{*tokenizer.all_special_ids} - end_ids, *range(len(tokenizer), vocab_size)]
    )
    ids: list[int] = []
    while len(ids) < length:
        possible = allowed(matcher, vocab_size)
        assert possible.any()
        assert possible[ends].any() == matcher.is_accepting
        assert not possible[never].any()
        assert sampler.finished == (not possible[~ends].any())
        token = int(choose(2 * torch.randn(1, vocab_size, generator=noise), [sampler])[0])
        assert sampler.error is None
        assert possible[token]
        if token in end_ids:
            return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        sampler.accept(token)
        ids.append(token)
    raise AssertionError(f"no end after {length} tokens: {tokenizer.decode(ids)[:200]}")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "c\n"]}, "minItems": 1, "maxItems": 3},
        "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"leaf": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["leaf"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        TREE,
        {"type": "string", "pattern": "^[a-f]{2,4}$"},
        {"const": {"a": [1, True, None, "€"]}},
        {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    ],
)
def test_answers_under_a_schema_are_valid(name, schema):
    for seed in range(3):
        jsonschema.validate(json.loads(random_answer(name, schema_grammar(schema), seed)), schema)


def test_any_json_object_is_an_object():
    text = random_answer("own", Grammar("json_object"), seed=0, length=4000)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "pattern",
    [
        r"[ab]{3,5}",
        r"(yes|no)",
        r"\d{4}-\d{2}-\d{2}",
        r"a/b\\\"c\nd",
        r"[^\W\d]{1,3}\s?é+!",
        r"(?i)true",
        r"日本語?",
    ],
)
def test_answers_under_a_regex_match_it(name, pattern):
    for seed in range(2):
        text = random_answer(name, Grammar("regex", pattern), seed)
        # Metaspace's decoder takes one leading space off; no pattern here begins with one.
        assert re.fullmatch(pattern, text)


def test_the_engine_holds_a_model_to_its_grammar():
    engine = Engine(tiny_model(), tiny_tokenizer())
    free = SamplingParams(max_new_tokens=12, temperature=0)
    alone = engine.generate([[40, 41, 42]], free)[0].ids
    held = SamplingParams(max_new_tokens=100, seed=1, grammar=schema_grammar({"enum": ["yes", "no", 12345]}))
    answers = engine.generate([[40, 41, 42], [50, 51]], [free, held])
    assert json.loads(answers[1].text) in ("yes", "no", 12345)
    assert answers[1].finish_reason == "stop"
    assert answers[0].ids == alone


def test_a_grammar_ends_an_answer_before_its_least_length(grammars):
    params = SamplingParams(grammar=Grammar("regex", "a"), min_new_tokens=9, seed=0)
    sampler = Sampler(params, [5], vocab_size=327, end_ids=[0, 7], matcher=grammars.matcher(params.grammar))
    ids = []
    for _ in range(2):
        ids += choose(torch.zeros(1, 327), [sampler]).tolist()
        sampler.accept(ids[-1])
    assert tiny_tokenizer().decode(ids[:1]) == "a"
    assert ids[1] in (0, 7)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", r"a\b"), "lookarounds not supported"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
        (Grammar("regex", "a{5,2}"), "invalid repetition count range"),
        (Grammar("regex", r"[^\s\S]"), "no text matches it"),
        (Grammar("regex", "(" * 2000 + "a" + ")" * 2000), "number of nested parentheses"),
        (Grammar("regex", "a?" * 4000), "too many expressions"),
        (Grammar("regex", "()"), "only the empty text matches it"),
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", '{"minimum": NaN}'), "NaN is not a JSON number"),
        (Grammar("json_schema", '{"minimum": 1e999}'), "not JSON"),
        (Grammar("json_schema", '{"const": "\\ud800"}'), "hex escape"),
        (Grammar("json_schema", "[" * 30_000), "not JSON"),
        (Grammar("json_schema", "[]"), r"must be an object, got \[\]"),
        (Grammar("json_schema", "true"), "must be an object, got true"),
        (Grammar("json_schema", '{"type": "nonsense"}'), "Invalid type: nonsense"),
        (Grammar("json_schema", '{"items": ' * 70 + "{}" + "}" * 70), "more than 64 deep"),
        (Grammar("json_schema", '{"uniqueItems": true, "type": "array"}'), "uniqueItems"),
        (Grammar("json_schema", '{"x-guidance": {"lenient": true}}'), "x-guidance"),
        (Grammar("json_schema", '{"oneOf": [{}, {}]}'), "oneOf is not supported: use anyOf"),
        (Grammar("json_schema", '{"enum": []}'), "Unsatisfiable"),
        (Grammar("json_schema", '{"$ref": "#"}'), "no text matches it"),
        (Grammar("json_schema", '{"$ref": "#/$defs/gone"}'), "does not exist"),
        (Grammar("json_schema", '{"$ref": "file:///etc/passwd"}'), "does not fetch"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}'), "greater than maximum"),
        (Grammar("json_schema", '{"type": "string", "pattern": "(a"}'), "unclosed group"),
    ],
)
def test_a_bad_grammar_is_named(grammars, grammar, message):
    for _ in range(2):  # the second answer is remembered
        with pytest.raises(GrammarError, match=message):
            grammars.check(grammar)
    with pytest.raises(GrammarError, match=message):
        grammars.matcher(grammar)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "", "a regex takes a text, got an empty one"),
        ("json_schema", "", "a json_schema takes a text"),
        ("json_object", "{}", "a json_object takes no text"),
        ("gbnf", "start: x", "kind must be one of json_schema, json_object, regex, lark, got 'gbnf'"),
        ("regex", None, "must be a string, got NoneType"),
        ("regex", "a" * 8193, "has 8193 bytes, more than 8192"),
        ("regex", "\ud800", "surrogate"),
    ],
)
def test_what_is_no_grammar_is_refused(kind, text, message):
    with pytest.raises(GrammarError, match=message):
        Grammar(kind, text)


def test_a_grammar_travels_and_can_be_a_key():
    grammar = Grammar("regex", "a+")
    assert pickle.loads(pickle.dumps(grammar)) == grammar  # noqa: S301
    assert len({grammar, Grammar("regex", "a+"), Grammar("regex", "b+")}) == 2


def test_a_grammar_that_eats_time_is_refused_and_harms_no_other(grammars):
    # The last but n-th letter is an "a", for many n at once: an automaton of 2^20 states and more.
    greedy = schema_grammar({"allOf": [{"type": "string", "pattern": f"(.*a.{{{n}}})"} for n in range(10, 30)]})
    with pytest.raises(GrammarError, match=r"too much (time|memory) to compile"):
        grammars.check(greedy)
    grammars.check(Grammar("regex", "after"))


def test_a_process_that_dies_or_hangs_is_replaced(monkeypatch):
    made = Grammars(tiny_tokenizer(), 320, [0])
    made.check(Grammar("regex", "first"))
    os.kill(made._trial._process.pid, signal.SIGKILL)
    made.check(Grammar("regex", "second"))
    process = made._trial._process
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(grammar_module, "TRY_S", 0.2)
    with pytest.raises(GrammarError, match="could not be tried within"):
        made.check(Grammar("regex", "third"))
    assert process.returncode == -signal.SIGKILL
    monkeypatch.setattr(grammar_module, "TRY_S", 900)
    made.check(Grammar("regex", "third"))  # that it hung was not this grammar's fault, nor remembered as such
    process = made._trial._process
    del made
    assert process.poll() is not None


def test_a_stream_of_grammars_leaves_memory_bounded(monkeypatch):
    monkeypatch.setattr(grammar_module, "MAX_VERDICTS", 20)
    monkeypatch.setattr(grammar_module, "TRIES_PER_PROCESS", 40)
    made = Grammars(tiny_tokenizer(), 320, [0])
    processes = set()
    for number in range(100):
        made.matcher(schema_grammar({"type": "object", "properties": {f"p{number}": PERSON}}))
        processes.add(made._trial._process.pid)
        if number == 20:
            early = resident()
    assert len(processes) == 3
    assert resident() - early < 32 * 1024**2
    assert len(made._verdicts._values) == 20
    assert len(made._compiled._values) == grammar_module.MAX_COMPILED
    made.close()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_address_in_a_schema_is_fetched(grammars):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/schema.json"
        for schema in (
            {"$ref": address},
            {"$id": address, "$schema": address, "type": "object", "properties": {"a": {"$ref": "other.json"}}},
            {"$schema": "http://json-schema.org/draft-07/schema#", "allOf": [{"$ref": f"{address}#/a"}]},
        ):
            with pytest.raises(GrammarError):
                grammars.check(schema_grammar(schema))
        server.shutdown()
    assert asked == []


def test_threads_may_ask_at_once(grammars):
    problems: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            for one in range(6):
                matcher = grammars.matcher(Grammar("regex", f"(x|y){{{one % 3 + 1}}}{number % 2}"))
                assert allowed(matcher, 327).any()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_failing_matcher_fails_its_own_request_alone(grammars):
    x, y, q = (tiny_tokenizer()(letter)["input_ids"][0] for letter in "xyq")
    grammar = Grammar("regex", "[xy]{4}")
    params = SamplingParams(grammar=grammar, temperature=0)
    samplers = [
        Sampler(params, [5], vocab_size=327, end_ids=[0, 7], matcher=grammars.matcher(grammar)) for _ in range(2)
    ]
    samplers.append(Sampler(SamplingParams(temperature=0), [5], vocab_size=327, end_ids=[0, 7]))
    logits = torch.zeros(3, 327)
    logits[:, q], logits[:, y] = 9, 5
    samplers[0].accept(q)  # which the grammar does not allow
    samplers[1].accept(x)
    samplers[2].accept(x)
    assert "the grammar failed" in samplers[0].error
    for _ in range(3):
        ids = choose(logits, samplers).tolist()
        assert ids[1:] == [y, q]
        for sampler, token in zip(samplers[1:], ids[1:], strict=True):
            sampler.accept(token)
    assert [sampler.finished for sampler in samplers] == [False, True, False]
    assert [sampler.error for sampler in samplers[1:]] == [None, None]


def test_a_model_without_an_end_takes_no_grammar():
    with pytest.raises(GrammarError, match="no end-of-text token"):
        Grammars(tiny_tokenizer(), 320, []).check(Grammar("json_object"))


def test_a_tokenizer_that_cannot_be_held_says_so():
    with pytest.raises(GrammarError, match="with this tokenizer"):
        Grammars(tiny_tokenizer(), 100, [0]).check(Grammar("regex", "a"))
