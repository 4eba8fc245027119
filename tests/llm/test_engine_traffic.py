"""Random traffic: whatever comes, leaves and fails, each request gets what it would have got alone."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from llm.engine import Engine, Token
from llm.kv_cache import BLOCK
from llm.sampling import SamplingParams
from tests.models import tiny_model, tiny_tokenizer

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


@lru_cache
def alone(prompt: tuple[int, ...], count: int, ends: frozenset[int]) -> list[int]:
    """What transformers' own greedy generation makes of one prompt by itself."""
    ids = torch.tensor([prompt])
    out = shared_model().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@lru_cache
def shared_model():
    return tiny_model()


def check_books(engine: Engine) -> None:
    """What the engine believes of its rows, its memory and its prefixes fits together."""
    scheduler, cache, prefixes = engine._scheduler, engine._cache, engine._prefixes
    running = list(scheduler)
    assert len(running) == engine.running <= engine.slots
    assert all(scheduler.rows[request.row] is request for request in running)
    assert {*running, *scheduler.waiting} == {*engine._requests.values()}
    assert all(request.row < 0 for request in scheduler.waiting)
    assert cache.positions <= engine.cache_tokens
    assert len(running) * scheduler.widest <= engine.cache_tokens
    assert all(request.row < cache.rows and request.computed < request.positions <= cache.width for request in running)
    for buffer in cache.buffers:
        assert buffer.rows.shape[::2] == (cache.rows, cache.width)
        assert len(buffer.blocks) == cache.blocks
    places = [*prefixes._places.values(), *prefixes._free]
    assert sorted(places) == list(range(cache.blocks))


class Traffic:
    """Requests drawn at random for one engine of random size, and what came of them."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.engine = Engine(
            shared_model(),
            tiny_tokenizer(),
            slots=rng.randint(1, 6),
            cache_tokens=rng.choice([160, 256, 700, 1_500]),
            prefill_tokens=rng.choice([5, 16, 33, 128]),
            share_prefixes=rng.random() < 0.8,
        )
        self.beginnings = [[rng.randrange(60, 300) for _ in range(rng.randint(1, 60))] for _ in range(3)]
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.tokens: dict[str, list[Token]] = {}

    def run(self, requests: int) -> None:
        while len(self.asked) < requests or self.engine.has_work:
            for _ in range(self.rng.choice([0, 0, 0, 1, 1, 4]) if len(self.asked) < requests else 0):
                self._ask()
            self._disturb()
            for token in self.engine.step():
                self._take(token)
            check_books(self.engine)

    def _ask(self) -> None:
        rng, most = self.rng, min(self.engine.context, self.engine.cache_tokens // BLOCK * BLOCK)
        count = rng.choice([1, 2, 5, 9, 14])
        begin = rng.choice([[], *self.beginnings])
        prompt = begin + [rng.randrange(60, 300) for _ in range(rng.choice([1, 2, 7, 20]))]
        if rng.random() < 0.1:  # a request that takes all there is
            prompt = (prompt * most)[: most - count]
        if rng.random() < 0.2 and self.asked:
            prompt = rng.choice([prompt for prompt, _ in self.asked.values()])
        if len(prompt) + count > most:
            with pytest.raises(ValueError, match="shorten either"):
                self.engine.add(prompt, replace(GREEDY, max_new_tokens=count))
            return
        name = self.engine.add(prompt, replace(GREEDY, max_new_tokens=count))
        self.asked[name], self.tokens[name] = (prompt, count), []

    def _disturb(self) -> None:
        live = list(self.engine._requests)
        if live and self.rng.random() < 0.08:
            name = self.rng.choice(live)
            assert self.engine.cancel(name)
            del self.tokens[name]
        if self.rng.random() < 0.03:
            self.engine.load_weights(lambda model: None)

    def _take(self, token: Token) -> None:
        answer = self.tokens[token.request_id]
        answer.append(token)
        if token.finish_reason is None:
            return
        prompt, count = self.asked[token.request_id]
        ids = [token.id for token in answer]
        assert ids == alone(tuple(prompt), count, self.engine.end_ids)
        assert "".join(token.text for token in answer) == tiny_tokenizer().decode(ids, skip_special_tokens=True)


def check_traffic(seed: int, requests: int) -> None:
    traffic = Traffic(seed)
    traffic.run(requests)
    assert all(tokens[-1].finish_reason in ("stop", "length") for tokens in traffic.tokens.values())
    assert traffic.engine.queued_tokens == traffic.engine.running == traffic.engine.waiting == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic(seed):
    check_traffic(seed, 20)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 160))
def test_much_random_traffic(seed):
    check_traffic(seed, 150)


class TestMemory:
    def test_many_short_ones_leave_room_for_a_long_one(self, model, tokenizer):
        engine = Engine(model, tokenizer, slots=16, cache_tokens=16 * 32)
        short, long = [60, 61, 62], list(range(60, 60 + 244))
        engine.generate([short] * 16, GREEDY)
        for name in ("a", "b"):
            engine.add(short, GREEDY, name)
        engine.add(long, GREEDY, "long")
        engine.add(short, GREEDY, "c")
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for token in engine.step():
                tokens.setdefault(token.request_id, []).append(token.id)
            check_books(engine)
        expected = {name: alone(tuple(short), 12, engine.end_ids) for name in ("a", "b", "c")}
        assert tokens == expected | {"long": alone(tuple(long), 12, engine.end_ids)}

    def test_only_what_has_room_runs_and_in_order(self, model, tokenizer):
        engine = Engine(model, tokenizer, slots=8, cache_tokens=128)
        engine.add([60] * 50, GREEDY)  # 64 positions
        engine.add([60] * 50, GREEDY)
        engine.add([61] * 50, GREEDY, "third")
        engine.add([62], GREEDY, "small")
        engine.step()
        assert (engine.running, engine.waiting) == (2, 2)
        assert engine.cancel("third")
        engine.step()
        assert (engine.running, engine.waiting) == (2, 1)

    def test_a_request_beyond_the_cache_is_refused_with_the_numbers(self, model, tokenizer):
        engine = Engine(model, tokenizer, cache_tokens=64)
        with pytest.raises(ValueError, match="prompt's 60 tokens and max_new_tokens=12 make 72, more than the 64 pos"):
            engine.add([60] * 60, GREEDY)
        with pytest.raises(ValueError, match="cache_tokens must be at least 32, got 8"):
            Engine(model, tokenizer, cache_tokens=8)

    def test_the_cache_is_no_larger_than_its_requests_need(self, model, tokenizer):
        engine = Engine(model, tokenizer, slots=32)
        assert engine._cache.positions == 0
        engine.generate([[60, 61]], GREEDY)
        assert engine._cache.positions == BLOCK

    def test_queued_tokens_are_what_is_left_to_do(self, model, tokenizer):
        engine = Engine(model, tokenizer, slots=1, prefill_tokens=4)
        engine.end_ids = frozenset()
        engine.add([60] * 10, GREEDY)
        engine.add([61] * 3, GREEDY)
        assert engine.queued_tokens == 10 + 12 + 3 + 12
        engine.step()
        assert engine.queued_tokens == 6 + 12 + 3 + 12
        while engine.has_work:
            engine.step()
        assert engine.queued_tokens == 0


class TestFailures:
    """A request that fails ends alone; the others don't notice."""

    def answers(self, engine: Engine) -> dict[str, list[Token]]:
        tokens: dict[str, list[Token]] = {}
        while engine.has_work:
            for token in engine.step():
                tokens.setdefault(token.request_id, []).append(token)
            check_books(engine)
        return tokens

    def check(self, engine: Engine, message: str) -> None:
        tokens = self.answers(engine)
        bad = tokens["bad"][-1]
        assert (bad.id, bad.text, bad.finish_reason) == (-1, "", "error")
        assert message in bad.error
        assert [token.id for token in tokens["good"]] == alone((60, 61, 62), 12, engine.end_ids)

    @pytest.fixture
    def engine(self, tokenizer):
        engine = Engine(tiny_model(), tokenizer, slots=2)
        engine.add([90, 91], GREEDY, "bad")
        engine.add([60, 61, 62], GREEDY, "good")
        return engine

    def test_text_that_fails(self, engine):
        def fail(ids):
            raise UnicodeError("no such character")

        engine._requests["bad"].text.decode = fail
        self.check(engine, "UnicodeError: no such character")

    def test_a_sampler_that_fails(self, engine):
        engine._requests["bad"].sampler.error = "the grammar took too long"
        self.check(engine, "the grammar took too long")

    def test_numbers_that_are_not_finite_stay_in_their_row(self, engine):
        def poison(module, arguments, output):
            row = engine._requests["bad"].row if "bad" in engine._requests else None
            if row is not None and output.shape[1] == 1 and len(output) == 2:
                output[row] = torch.nan
            return output

        engine.model.model.layers[0].self_attn.v_proj.register_forward_hook(poison)
        engine.add([60, 61, 62], GREEDY, "next")
        tokens = self.answers(engine)
        assert "not finite" in tokens["bad"][-1].error
        expected = alone((60, 61, 62), 12, engine.end_ids)
        assert [[token.id for token in tokens[name]] for name in ("good", "next")] == [expected] * 2


def test_stop_ids_end_an_answer_and_are_no_text(model, tokenizer):
    engine = Engine(model, tokenizer)
    plain = engine.generate([[60, 61]], GREEDY)[0]
    stop = plain.ids[5]
    first = plain.ids.index(stop)
    answer = engine.generate([[60, 61]], replace(GREEDY, stop_ids=(stop,)))[0]
    assert (answer.ids, answer.finish_reason) == (plain.ids[: first + 1], "stop")
    assert answer.text == tokenizer.decode(answer.ids[:-1], skip_special_tokens=True)
