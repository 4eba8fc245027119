from __future__ import annotations

import asyncio
import json
import pickle

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from llm.engine import Token
from llm.loading import load
from llm.sampling import SamplingParams
from serve.backend import DeadlineExceeded, Load, ModelInfo, Overloaded, Unavailable
from serve.engines import EngineReplica, Engines, _piece
from serve.options import Options
from serve.proxies import Ended

INFO = ModelInfo(context=64, vocab_size=100, end_ids=frozenset({1}), generates=True, embeds=True, slots=2)
REQUESTS = [([5, 6], SamplingParams(max_new_tokens=8))]
TOKENS = [Token("0", id, "x", -0.5, [], None) for id in (7, 8)]
LAST = Token("0", 1, "", -0.5, [], "stop")


class Response:
    """What a handle's streaming call returns: `said` one after another; exceptions are raised."""

    def __init__(self, *said):
        self.said, self.cancelled = list(said), False

    async def __anext__(self):
        if not self.said:
            raise StopAsyncIteration
        one = self.said.pop(0)
        if isinstance(one, BaseException):
            raise one
        return await one if asyncio.iscoroutine(one) else one

    def cancel(self):
        self.cancelled = True


class Handle:
    """A deployment handle whose streaming calls give `responses` in turn."""

    def __init__(self, *responses):
        self.responses, self.calls = list(responses), 0
        self.describe = self

    def options(self, **_):
        return self

    def remote(self, *arguments):
        if not arguments:
            return _result(INFO)
        self.calls += 1
        return self.responses.pop(0)

    def broadcast(self, method):
        raise AssertionError("not asked here")


async def _result(value):
    return value


def batch(*tokens: Token):
    return [_piece(0, token) for token in tokens]


async def collect(engines: Engines, **options) -> list[int]:
    return [token.id async for _, token in engines.tokens(REQUESTS, **options)]


def run(check, *responses, options: Options | None = None):
    """`check(engines, handle)` over a handle with these responses, with the look at replicas stopped."""

    async def main():
        handle = Handle(*responses)
        engines = Engines(handle, options or Options())
        engines._looking.cancel()
        return await check(engines, handle)

    return asyncio.run(main())


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("generate", "traceback", cause).as_instanceof_cause()


def test_tokens_arrive_as_they_were_made():
    async def check(engines, handle):
        assert [pair async for pair in engines.tokens(REQUESTS)] == [(0, token) for token in [*TOKENS, LAST]]

    run(check, Response(batch(*TOKENS), batch(LAST)))


def test_a_request_that_got_nothing_is_sent_to_another_replica():
    async def check(engines, handle):
        assert await collect(engines) == [7, 8, 1]
        assert handle.calls == 3

    run(check, Response(ActorDiedError()), Response(asyncio.CancelledError()), Response(batch(*TOKENS, LAST)))


def test_one_that_has_begun_ends_with_its_replica():
    async def check(engines, handle):
        seen = []
        with pytest.raises(Unavailable):
            async for _, token in engines.tokens(REQUESTS):
                seen.append(token.id)
        assert (seen, handle.calls) == ([7, 8], 1)

    run(check, Response(batch(*TOKENS), ActorDiedError()))


def test_without_any_replica_that_lives_it_is_unavailable():
    async def check(engines, handle):
        with pytest.raises(Unavailable):
            await collect(engines)
        assert handle.responses == []

    run(check, *(Response(ActorDiedError()) for _ in range(4)))


@pytest.mark.parametrize(
    ("raised", "known"),
    [
        (failed(ValueError("no such schema")), ValueError),
        (failed(Overloaded("full", 3.0)), Overloaded),
        (failed(DeadlineExceeded("late")), DeadlineExceeded),
        (BackPressureError(9, 8), Overloaded),
        (RayServeException("upstream"), Unavailable),
        (failed(RayServeException("stopping")), Unavailable),
    ],
)
def test_errors_of_ray_become_the_backends(raised, known):
    async def check(engines, handle):
        with pytest.raises(known) as caught:
            await collect(engines)
        assert type(caught.value) is known, "not Ray's mixture of both"

    run(check, *(Response(raised) for _ in range(4)))


def test_who_goes_away_cancels_the_call():
    async def check(engines, handle):
        response = handle.responses[0]
        tokens = engines.tokens(REQUESTS)
        await anext(tokens)
        await tokens.aclose()
        assert response.cancelled
        later = handle.responses[0]
        task = asyncio.create_task(collect(engines))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert later.cancelled
        assert engines._running == 0

    run(check, Response(batch(*TOKENS), batch(LAST)), Response(asyncio.sleep(60)))


def test_a_deadline_ends_the_wait_for_a_replica_too():
    async def check(engines, handle):
        response = handle.responses[0]
        with pytest.raises(DeadlineExceeded):
            await collect(engines, deadline_s=0.01)
        assert response.cancelled

    run(check, Response(asyncio.sleep(60)))


def test_what_could_not_run_is_refused_before_a_replica_is_asked():
    async def check(engines, handle):
        await engines.describe()
        for prompt in ([], [100], [5] * 60):
            with pytest.raises(ValueError, match="prompt"):
                engines.check([(prompt, SamplingParams(max_new_tokens=8))])
        with pytest.raises(Overloaded, match="the most is 1"):
            engines.check(REQUESTS * 2)
        engines.check(REQUESTS)
        assert not engines.ready
        engines._load = Load(replicas=1)
        assert engines.ready

    run(check, options=Options(max_requests=1))


class Stream:
    """A streaming call in this process: what it yields is pickled on the way, and cancelling it closes it."""

    def __init__(self, generator):
        self.generator, self.ended = generator, False

    async def __anext__(self):
        return pickle.loads(pickle.dumps(await anext(self.generator)))  # noqa: S301

    def cancel(self):
        self.closing = asyncio.create_task(self.generator.aclose())


def test_answers_through_a_replica_are_the_engines_in_fewer_messages(model_folder):
    params = [SamplingParams(max_new_tokens=20, seed=seed, top_logprobs=2) for seed in range(3)]
    requests = [([60, 61, 62], each) for each in params]
    expected = [load(model_folder).generate([[60, 61, 62]], each)[0] for each in params]

    async def main():
        replica = object.__new__(EngineReplica.func_or_class)
        await replica.__init__(str(model_folder), Options(slots=4))
        assert (await replica.describe()).slots == 4
        sent: list[int] = []

        async def generate(*arguments):
            async for pieces in replica.generate(*arguments):
                sent.append(len(pieces))
                yield pieces

        handle = Handle()
        handle.remote = lambda *arguments: Stream(generate(*arguments))
        engines = Engines(handle, Options())
        engines._looking.cancel()
        answers = [[] for _ in requests]
        async for index, token in engines.tokens(requests):
            answers[index].append(token)
        for answer, own in zip(answers, expected, strict=True):
            assert [token.id for token in answer] == own.ids
            assert "".join(token.text for token in answer) == own.text
            assert [token.logprob for token in answer] == pytest.approx(own.logprobs, abs=1e-4)
            assert all(len(token.top) == 2 for token in answer)
            assert answer[-1].finish_reason == own.finish_reason
        assert sum(sent) == sum(map(len, answers)) > len(sent), "tokens of one step travel together"
        tokens = engines.tokens(requests)
        await anext(tokens)
        await tokens.aclose()
        while replica.replica.load().running:
            await asyncio.sleep(0.01)

    asyncio.run(main())


def through_the_proxy(*messages: dict) -> list[dict]:
    """What a client gets of an application that sends `messages` and ends."""
    sent: list[dict] = []

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    async def send(message):
        sent.append(message)

    asyncio.run(Ended(app)({"type": "http"}, None, send))
    return sent


def head(kind: bytes) -> dict:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


def part(body: bytes, more: bool) -> dict:
    return {"type": "http.response.body", "body": body, "more_body": more}


def test_answers_without_an_end_get_one():
    start, body = through_the_proxy()
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert json.loads(body["body"])["error"]["code"] == "unavailable"
    *_, last = through_the_proxy(head(b"text/event-stream; charset=utf-8"), part(b"data: 1\n\n", True))
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "unavailable"
    assert not last["more_body"]


def test_other_answers_are_left_alone():
    whole = (head(b"text/event-stream"), part(b"data: [DONE]\n\n", False))
    assert through_the_proxy(*whole) == [*whole]
    broken = (head(b"application/json"), part(b"{", True))
    assert through_the_proxy(*broken) == [*broken]
