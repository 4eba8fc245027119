from __future__ import annotations

import asyncio
import pickle
import threading

import pytest

from llm.engine import Engine
from llm.grammar import Grammar, Grammars
from llm.sampling import SamplingParams
from serve.backend import DeadlineExceeded, Overloaded, Unavailable
from serve.replica import Replica
from tests.models import tiny_model, tiny_tokenizer

PROMPTS = [[60, 61, 62], [90, 91], [70] * 30]


def new_engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), slots=2)


def sampled(seed: int, count: int = 20) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, seed=seed)


async def ready_replica(engine: Engine, **options) -> Replica:
    served = Replica(lambda: engine, **options)
    while not served.ready:
        await asyncio.sleep(0.01)
    return served


async def collect(served: Replica, requests: list) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in requests]
    async for index, token in served.tokens(requests):
        answers[index].append(token.id)
    return answers


def test_callers_at_once_get_what_each_gets_alone():
    expected = [new_engine().generate([prompt], sampled(n))[0].ids for n, prompt in enumerate(PROMPTS)]

    async def main() -> None:
        served = await ready_replica(new_engine())
        both = [(PROMPTS[0], sampled(0)), (PROMPTS[1], sampled(1))]
        first, second = await asyncio.gather(collect(served, both), collect(served, [(PROMPTS[2], sampled(2))]))
        assert first + second == expected

    asyncio.run(main())


def test_a_caller_that_goes_away_frees_its_slots():
    async def main() -> None:
        engine = new_engine()
        engine.end_ids = frozenset()
        served = await ready_replica(engine)
        tokens = served.tokens([(prompt, sampled(1, 200)) for prompt in PROMPTS])
        await anext(tokens)
        await tokens.aclose()
        waiter = asyncio.create_task(collect(served, [(PROMPTS[0], sampled(1, 200))]))
        await asyncio.sleep(0.05)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert len((await asyncio.wait_for(collect(served, [(PROMPTS[0], sampled(1, 5))]), 10))[0]) == 5
        assert not engine.has_work

    asyncio.run(main())


def test_while_loading_and_after_a_failure_it_says_so():
    async def main() -> None:
        engine, go = new_engine(), threading.Event()

        def load() -> Engine:
            go.wait()
            return engine

        served = Replica(load)
        with pytest.raises(Unavailable, match="still loading"):
            served.check([(PROMPTS[0], sampled(0))])
        go.set()
        while not served.ready:
            await asyncio.sleep(0.01)
        engine.model = None  # the next step fails
        with pytest.raises(Unavailable, match="the engine failed"):
            await asyncio.wait_for(collect(served, [(PROMPTS[0], sampled(0))]), 10)
        assert not served.ready
        with pytest.raises(Unavailable):
            served.check([(PROMPTS[0], sampled(0))])
        await asyncio.gather(served._driver, return_exceptions=True)

    asyncio.run(main())


def test_more_requests_than_may_wait_are_turned_away():
    async def main() -> None:
        served = await ready_replica(new_engine(), max_requests=1)
        served.check([(PROMPTS[0], sampled(0))])
        three = [(prompt, sampled(0)) for prompt in PROMPTS]
        with pytest.raises(Overloaded, match="the most is 1"):
            served.check(three)
        with pytest.raises(Overloaded, match="the most is 1"):
            await collect(served, three)

    asyncio.run(main())


def test_an_answer_that_takes_longer_than_it_may_is_cut_off_and_its_slot_freed():
    async def main() -> None:
        engine = new_engine()
        engine.end_ids = frozenset()
        served = await ready_replica(engine)
        with pytest.raises(DeadlineExceeded, match=r"the 0\.05 s"):
            async for _ in served.tokens([(PROMPTS[0], sampled(1, 200))], deadline_s=0.05):
                pass
        assert len(await collect_one(served, 3)) == 3
        assert not engine.has_work

    asyncio.run(main())


async def collect_one(served: Replica, count: int) -> list[int]:
    return (await asyncio.wait_for(collect(served, [(PROMPTS[0], sampled(1, count))]), 10))[0]


def test_the_load_counts_the_tokens_that_are_still_to_do():
    async def main() -> None:
        engine = new_engine()
        engine.end_ids = frozenset()
        served = await ready_replica(engine)
        assert (served.load().queued_tokens, served.load().first_token_s) == (0, 0.0)
        tokens = served.tokens([(prompt, sampled(1, 20)) for prompt in PROMPTS])
        left = 3 * 20 + sum(map(len, PROMPTS))
        begun = set()
        async for index, _ in tokens:
            left -= 1 if index in begun else 1 + len(PROMPTS[index])
            begun.add(index)
            load = served.load()
            # The engine's thread may be ahead of who reads, never behind.
            assert load.queued_tokens <= left
        assert left == 0
        assert load.first_token_s > 0
        assert served.load().running == served.load().waiting == 0

    asyncio.run(main())


def test_what_the_model_is_can_be_asked_while_it_loads():
    async def main() -> None:
        engine = new_engine()
        info = await Replica(lambda: engine).describe()
        assert (info.context, info.vocab_size, info.slots) == (engine.context, engine.vocab_size, 2)

        def broken() -> Engine:
            raise OSError("no disk")

        served = Replica(broken)
        with pytest.raises(Unavailable, match="OSError: no disk"):
            await served.describe()
        await asyncio.gather(served._driver, return_exceptions=True)

    asyncio.run(main())


def test_errors_keep_what_they_say_between_processes():
    error = pickle.loads(pickle.dumps(Overloaded("come back", 7.0)))  # noqa: S301
    assert (str(error), error.retry_after_s) == ("come back", 7.0)


def test_what_could_not_be_in_time_is_turned_away():
    async def main() -> None:
        engine = new_engine()
        engine.end_ids = frozenset()
        served = await ready_replica(engine)
        late = served.tokens([(PROMPTS[0], sampled(1, 200))], deadline_s=1e-4)
        with pytest.raises(DeadlineExceeded):  # nothing else is there: it may try
            await anext(late)
        await late.aclose()
        tokens = served.tokens([(prompt, sampled(1, 200)) for prompt in PROMPTS])
        for _ in range(20):
            await anext(tokens)
        refused = served.tokens([(PROMPTS[0], sampled(1, 200))], deadline_s=1e-4)
        with pytest.raises(Overloaded, match="3 requests before it") as caught:
            await anext(refused)
        assert caught.value.retry_after_s > 0
        await anext(served.tokens([(PROMPTS[0], sampled(1, 200))], deadline_s=3600))
        await tokens.aclose()

    asyncio.run(main())


def test_others_get_their_tokens_while_a_grammar_is_tried(monkeypatch):
    check, may_end = Grammars.check, threading.Event()

    def slow(grammars: Grammars, grammar: Grammar) -> None:
        may_end.wait()
        check(grammars, grammar)

    monkeypatch.setattr(Grammars, "check", slow)

    async def main() -> None:
        served = await ready_replica(new_engine())
        held = SamplingParams(max_new_tokens=8, seed=1, grammar=Grammar("regex", "[ab]{1,6}"))
        waiting = asyncio.create_task(collect(served, [(PROMPTS[0], held)]))
        await asyncio.sleep(0)
        assert await collect(served, [(PROMPTS[1], sampled(1))])
        assert not waiting.done()
        may_end.set()
        (found,) = await waiting
        assert found

    asyncio.run(main())
