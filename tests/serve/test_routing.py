from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from serve.routing import BLOCK, Prefixes, PrefixRouter, choose

SYSTEM = list(range(100, 100 + 3 * BLOCK))


def question(number: int) -> list[int]:
    return [*SYSTEM, *[number] * BLOCK]


def test_a_prompt_goes_where_most_of_its_beginning_was_read():
    prefixes = Prefixes()
    idle = {"a": 0, "b": 0, "c": 0}
    prefixes.record(SYSTEM, "b")
    prefixes.record(question(1), "c")
    assert prefixes.holders(question(1), idle) == {"c"}
    assert prefixes.holders(question(2), idle) == {"b", "c"}
    assert prefixes.holders(SYSTEM[1:], idle) == set(), "the same tokens a place further are another beginning"
    assert choose(question(1), idle, prefixes, slack=2) == "c"
    assert choose([1, 2, 3], {"a": 2, "b": 1, "c": 2}, prefixes, slack=2) == "b"


def test_one_that_is_much_busier_is_spared_and_those_gone_are_forgotten():
    prefixes = Prefixes()
    prefixes.record(SYSTEM, "a")
    assert choose(SYSTEM, {"a": 2, "b": 0}, prefixes, slack=2) == "a"
    assert choose(SYSTEM, {"a": 3, "b": 0}, prefixes, slack=2) == "b"
    assert choose(SYSTEM, {"b": 1, "c": 0}, prefixes, slack=2) == "c"


def test_the_oldest_beginnings_are_forgotten_first():
    prefixes = Prefixes(remembered=3)
    prefixes.record(SYSTEM, "a")
    prefixes.record([7] * BLOCK, "b")
    assert prefixes.holders([7] * BLOCK, {"a": 0, "b": 0}) == {"b"}
    assert prefixes.holders(SYSTEM, {"a": 0, "b": 0}) == set()


@pytest.fixture
def router(monkeypatch) -> PrefixRouter:
    """The router as Ray Serve makes it, without the process around it."""
    made = object.__new__(PrefixRouter)
    made.initialize_state(slack=1)
    cache = {"a": 0, "b": 0}
    monkeypatch.setattr(PrefixRouter, "replica_queue_len_cache", SimpleNamespace(get=cache.get))
    made.cache = cache
    return made


def asked(prompt: list[int], method: str = "generate") -> SimpleNamespace:
    return SimpleNamespace(
        args=[[(prompt, None)], None],
        metadata=SimpleNamespace(call_method=method),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def ranked(router: PrefixRouter, request: SimpleNamespace) -> list[list[str]]:
    replicas = [SimpleNamespace(replica_id=name) for name in router.cache]
    ranks = asyncio.run(router.choose_replicas(replicas, request))
    return [[each.replica_id for each in rank] for rank in ranks]


def test_requests_are_ranked_by_what_was_routed_before(router):
    router.on_request_routed(asked(SYSTEM), "b", None)
    assert ranked(router, asked(question(1))) == [["b"], ["a", "b"]]
    router.cache["b"] = 2
    assert ranked(router, asked(question(1))) == [["a"], ["a", "b"]]
    assert ranked(router, asked(question(1), "describe")) == [["a"], ["a", "b"]]


def test_nobody_is_asked_again_at_once(router):
    request = asked(SYSTEM)
    ranked(router, request)
    assert request.routing_context.should_backoff
