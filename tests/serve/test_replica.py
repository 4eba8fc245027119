from __future__ import annotations

import asyncio
import threading

import pytest

from llm.engine import Engine
from llm.sampling import SamplingParams
from serve import replica
from serve.replica import Overloaded, Replica, Unavailable
from tests.models import tiny_model, tiny_tokenizer

PROMPTS = [[60, 61, 62], [90, 91], [70] * 30]


def new_engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), slots=2)


def sampled(seed: int, count: int = 20) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, seed=seed)


async def ready_replica(engine: Engine) -> Replica:
    served = Replica(lambda: engine)
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


def test_more_requests_than_may_wait_are_turned_away(monkeypatch):
    monkeypatch.setattr(replica, "MAX_REQUESTS", 1)

    async def main() -> None:
        served = await ready_replica(new_engine())
        served.check([(PROMPTS[0], sampled(0))])
        with pytest.raises(Overloaded, match="the most is 1"):
            served.check([(prompt, sampled(0)) for prompt in PROMPTS])

    asyncio.run(main())
