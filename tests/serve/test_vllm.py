"""The adapter for vLLM against a server of the same protocol over our own engine, which is the reference too."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from fastapi.responses import JSONResponse
from ray import serve as ray_serve

from llm.engine import Engine, Token
from llm.grammar import Grammar
from llm.sampling import SamplingParams
from serve import app, vllm
from serve.backend import DeadlineExceeded, Overloaded, Request, Unavailable
from serve.engines import Engines
from serve.options import VLLM, Options
from serve.replica import Replica
from serve.vllm import Vllm
from tests.models import save_tiny_model, tiny_model, tiny_tokenizer
from tests.serve.conftest import ROOT
from tests.serve.vllm_protocol import Server, until

PROMPTS = [[60, 61, 62], [90, 91], [70] * 30]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr(vllm, "LOOK_EVERY_S", 0.02)


def new_engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), slots=4)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, Vllm]]:
    """A server on a port of its own in this event loop, and the adapter that speaks to it, ready."""
    engine = new_engine()
    server = Server(Replica(lambda: engine), "tiny")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        http = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning"))
        running = asyncio.create_task(http.serve(sockets=[listening]))
        adapter = Vllm(
            f"http://127.0.0.1:{listening.getsockname()[1]}", "tiny",
            vocab_size=engine.vocab_size, end_ids=engine.end_ids, slots=4, max_requests=8,
        )  # fmt: skip
        try:
            await adapter.describe()
            yield server, adapter
        finally:
            await adapter.close()
            http.should_exit = True
            await running


def within(test: Callable[[Server, Vllm], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving() as (server, adapter):
            await test(server, adapter)

    asyncio.run(main())


async def answers(backend: Vllm, requests: list[Request]) -> list[list[Token]]:
    found: list[list[Token]] = [[] for _ in requests]
    async for index, token in backend.tokens(requests):
        found[index].append(token)
    return found


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(max_new_tokens=20, seed=3, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, top_logprobs=4),
        SamplingParams(max_new_tokens=9, temperature=0, repetition_penalty=1.5, presence_penalty=1.0),
        SamplingParams(max_new_tokens=12, temperature=0, logit_bias={70: 100.0}, stop_ids=(71,), min_new_tokens=3),
        SamplingParams(max_new_tokens=40, seed=1, grammar=Grammar("regex", "[ab]{3,9}")),
        SamplingParams(max_new_tokens=60, seed=1, grammar=Grammar("json_schema", json.dumps({"type": "boolean"}))),
    ],
)  # fmt: skip
def test_answers_are_those_of_the_engine_in_this_process(params):
    expected = new_engine().generate(PROMPTS, params)

    async def test(_: Server, adapter: Vllm) -> None:
        found = await answers(adapter, [(prompt, params) for prompt in PROMPTS])
        for one, other in zip(found, expected, strict=True):
            assert [token.id for token in one] == other.ids
            assert "".join(token.text for token in one) == other.text
            assert [token.logprob for token in one] == pytest.approx(other.logprobs, abs=1e-4)
            assert [[i for i, _ in token.top] for token in one] == [[i for i, _ in t.top] for t in other.tokens]
            assert [token.finish_reason for token in one] == [token.finish_reason for token in other.tokens]

    within(test)


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it():
    text = new_engine().generate([PROMPTS[0]], GREEDY)[0].text
    params = SamplingParams(max_new_tokens=12, temperature=0, stop=(text[3:6],))

    async def test(_: Server, adapter: Vllm) -> None:
        (found,) = await answers(adapter, [(PROMPTS[0], params)])
        assert "".join(token.text for token in found) == text[: text.index(text[3:6])]
        assert found[-1].finish_reason == "stop"

    within(test)


def test_what_it_is_and_how_much_it_has_to_do_is_known():
    engine = new_engine()

    async def test(_: Server, adapter: Vllm) -> None:
        info = await adapter.describe()
        assert (info.context, info.vocab_size, info.end_ids) == (engine.context, engine.vocab_size, engine.end_ids)
        assert (info.generates, info.embeds, info.slots) == (True, False, 4)
        seen = []
        async for _ in adapter.tokens([(PROMPTS[2], GREEDY)]):
            seen.append(adapter.load())
        assert all(load.queued_tokens < len(PROMPTS[2]) + 12 for load in seen)
        assert adapter.load().queued_tokens == adapter.load().running == adapter.load().waiting == 0
        with pytest.raises(ValueError, match="no embeddings"):
            await adapter.embed(PROMPTS)

    within(test)


def test_what_could_never_run_is_refused_before_it_travels():
    async def test(server: Server, adapter: Vllm) -> None:
        for prompt, said in (
            ([], "empty"),
            ([10**6], "outside the vocabulary"),
            ([60] * 300, "more than the context"),
        ):
            with pytest.raises(ValueError, match=said):
                adapter.check([(prompt, GREEDY)])
        with pytest.raises(Overloaded, match="the most is 8"):
            adapter.check([(PROMPTS[0], GREEDY)] * 9)
        assert server.asked == []

    within(test)


def test_what_the_server_refuses_says_why():
    bad = SamplingParams(max_new_tokens=5, grammar=Grammar("regex", "(a"))

    async def test(server: Server, adapter: Vllm) -> None:
        with pytest.raises(ValueError, match="regex"):
            await answers(adapter, [(PROMPTS[0], bad)])
        for status, kind in ((429, Overloaded), (503, Unavailable), (500, Unavailable)):
            server.refuse = JSONResponse({"error": {"message": "not now"}}, status_code=status)
            with pytest.raises(kind, match="not now"):
                await answers(adapter, [(PROMPTS[0], GREEDY)])

    within(test)


def test_closing_the_iterator_frees_the_slots_of_the_server():
    endless = SamplingParams(max_new_tokens=200, temperature=0)

    async def test(server: Server, adapter: Vllm) -> None:
        server.replica.engine.end_ids = frozenset()
        tokens = adapter.tokens([(prompt, endless) for prompt in PROMPTS])
        await anext(tokens)
        await tokens.aclose()
        await until(lambda: not server.replica.engine.has_work)
        assert adapter.load().running == 0
        with pytest.raises(DeadlineExceeded, match=r"the 0\.05 s"):
            async for _ in adapter.tokens([(PROMPTS[0], endless)], deadline_s=0.05):
                pass
        await until(lambda: not server.replica.engine.has_work)

    within(test)


def test_an_engine_that_fails_within_a_stream_is_told_and_others_are_served():
    async def test(server: Server, adapter: Vllm) -> None:
        server.fail_after = 2
        with pytest.raises(Unavailable, match="EngineCore encountered an issue"):
            await answers(adapter, [(PROMPTS[0], GREEDY)])
        server.fail_after = None
        assert len((await answers(adapter, [(PROMPTS[0], GREEDY)]))[0]) == 12

    within(test)


def test_a_server_that_answers_no_more_is_taken_for_dead():
    async def test(server: Server, adapter: Vllm) -> None:
        assert adapter.ready
        server.healthy = False
        await until(lambda: adapter.failure)
        assert not adapter.ready
        with pytest.raises(Unavailable, match="did not answer 5 times"):
            adapter.check([(PROMPTS[0], GREEDY)])

    within(test)


def test_a_child_that_ends_while_it_loads_is_told():
    async def main() -> None:
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
        adapter = Vllm("http://127.0.0.1:9", "m", vocab_size=9, end_ids=(), slots=1, process=process)
        with pytest.raises(Unavailable, match="exit status 3"):
            await adapter.describe()
        await adapter.close()

    asyncio.run(main())


def test_the_words_that_start_it(tmp_path, monkeypatch):
    monkeypatch.setenv(VLLM, "/opt/vllm/bin/vllm")
    words = vllm.command(tmp_path, 8001, Options(engine="vllm", slots=64, gpus=4, dtype="bfloat16"))
    assert words[:3] == ["/opt/vllm/bin/vllm", "serve", str(tmp_path)]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert flags["--tensor-parallel-size"] == "4"
    assert flags["--max-num-seqs"] == "64"
    assert flags["--host"] == "127.0.0.1"
    with pytest.raises(ValueError, match="int8"):
        Options(engine="vllm", dtype="int8")


@pytest.fixture
def as_vllm(tmp_path, monkeypatch) -> None:
    """A command `vllm` that serves by the same protocol."""
    script = tmp_path / "vllm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.serve.vllm_protocol "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(VLLM, str(script))


@pytest.mark.slow
def test_a_replica_that_is_to_generate_by_vllm_starts_it_as_a_child_and_ends_it(model_folder, as_vllm):
    from serve.engines import _backend

    async def main() -> None:
        adapter = _backend(str(model_folder), Options(engine="vllm", slots=4))
        await adapter.describe()
        (found,) = await answers(adapter, [(PROMPTS[0], GREEDY)])
        assert [token.id for token in found] == new_engine().generate([PROMPTS[0]], GREEDY)[0].ids
        await adapter.close()
        assert adapter.process.poll() is not None

    asyncio.run(main())


@pytest.mark.slow
def test_one_setting_has_replicas_generate_by_vllm(service, model_folder, as_vllm):
    options = Options(engine="vllm", slots=4)
    handle = ray_serve.run(app.engines("by-vllm", str(model_folder), options), name="by-vllm", route_prefix=None)

    async def main() -> list[int]:
        engines = Engines(handle, options)
        await engines.describe()
        (found,) = await answers(engines, [(PROMPTS[0], GREEDY)])
        return [token.id for token in found]

    assert asyncio.run(main()) == new_engine().generate([PROMPTS[0]], GREEDY)[0].ids
    ray_serve.delete("by-vllm")


def test_the_ids_that_end_an_answer_are_the_engines(tmp_path):
    save_tiny_model(tmp_path)
    assert vllm.end_ids(tmp_path, tiny_tokenizer()) == new_engine().end_ids
