"""The benchmarks of generation: what is timed, what counts as the same work, what clients make of a stream."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llm.engine import Engine
from tests.bench import clients, serve, serve_engine, serve_http
from tests.bench.agreement import same_answers
from tests.bench.clients import Answer
from tests.bench.command import Scale
from tests.bench.measure import Invalid
from tests.bench.serve_engine import Request
from tests.bench.served import L4_256, L8_512
from tests.models import tiny_model, tiny_tokenizer

PROMPTS = [[60, 61, 62], [90, 91, 92], [70, 71, 72], [80, 81, 82]]


def new_engine(**options) -> Engine:
    engine = Engine(tiny_model(), tiny_tokenizer(), **{"slots": 2, **options})
    engine.end_ids = frozenset()
    return engine


def test_both_sides_give_the_same_tokens_whenever_requests_come_and_however_long_they_are():
    requests = [Request(prompt, 3 + 2 * n, at=0.02 * n) for n, prompt in enumerate(PROMPTS)]
    model = tiny_model()
    model.generation_config.eos_token_id = None
    ours = serve_engine.through_engine(new_engine(), requests)
    theirs = serve_engine.in_batches(model, requests, 2)
    assert [len(one) for one in ours.made["answers"]] == [3, 5, 7, 9]
    assert same_answers(ours.made, theirs.made) == {"answers": 4, "length": 24}
    assert min(ours.seconds, theirs.seconds) >= requests[-1].at


def test_the_last_request_comes_after_a_share_of_what_static_batches_take(monkeypatch):
    monkeypatch.setattr(serve_engine, "in_batches", lambda *_: serve_engine.Turn(8.0, {}))
    requests = serve_engine.over_time([Request([1], 1)] * 5, tiny_model(), 2)
    assert [one.at for one in requests] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_clients_of_the_engine_alone_ask_one_after_the_other():
    load = serve_http.Load(L4_256, [[Request(prompt, 4)] * 3 for prompt in PROMPTS[:2]], [])
    engine = new_engine(slots=4)
    running = []
    step = engine.step
    engine.step = lambda: running.append(engine.running) or step()
    turn = serve_http.alone(engine, load)
    assert len(turn.made["answers"]) == 6
    assert turn.made["answers"][0] == turn.made["answers"][2] != turn.made["answers"][3]
    assert max(running) == 2


def test_decoding_is_timed_from_the_first_token_to_the_last():
    turn = serve_engine.decoding(new_engine(), Request(PROMPTS[0], 6))
    assert len(turn.made["answers"][0]) == 6
    assert 0 < turn.seconds < math.inf


def test_another_answer_is_named_where_it_begins_to_differ():
    with pytest.raises(Invalid, match=r"answer 1 differs from place 2 on: ours \[5\], theirs \[6, 7\]"):
        same_answers({"answers": [[1], [3, 4, 5]]}, {"answers": [[1], [3, 4, 6, 7]]})
    with pytest.raises(Invalid, match="2 answers, theirs 1"):
        same_answers({"answers": ["a", "b"]}, {"answers": ["a"]})


def test_what_is_added_to_a_first_token_is_turned_over():
    figure = serve_http._at_most("p50", 10.0, [5.0, 20.0, -1.0], 200)
    assert (figure.value, figure.low, figure.high) == (2.0, 0.5, 100.0)
    waits = [Answer(200, 1.0, 1.0 + n / 1000, 2.0, "", "stop", None) for n in range(1, 102)]
    assert serve_http.quantile(waits, "p50") == pytest.approx(51)
    assert serve_http.quantile(waits, "p99") == pytest.approx(100)


def test_less_of_the_work_is_asked_for_at_a_smaller_scale(monkeypatch):
    monkeypatch.setattr(serve_http, "prompts", lambda model, number: [[n] for n in range(number)])
    load = serve_http._load(L8_512, Scale(0.25, 1))
    assert [[one.prompt[0] for one in client] for client in load.clients] == [[4], [5], [6], [7]]
    assert [one.prompt[0] for one in load.before] == [0, 1, 2, 3]
    whole = serve_http._load(L8_512, Scale(1.0, 5))
    assert (len(whole.clients), len(whole.clients[0]), whole.all[0].new_tokens) == (16, 4, 64)


def test_every_figure_has_its_measure():
    said = serve.__doc__ or ""
    assert all(f"    {name} " in said for name in serve.FIGURES)


# Clients


@contextmanager
def answering(status: int, pieces: list[bytes]) -> Iterator[str]:
    """A server that answers everyone with these pieces as chunks."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    address = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
        for piece in [*pieces, b""]:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        address.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        ready.set()
        async with server:
            await server.serve_forever()

    task = loop.create_task(main())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    ready.wait()
    yield address[0]
    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    loop.close()


def event(text: str, reason: str | None = None) -> bytes:
    """As some write it, what is null is left out."""
    choice = {"text": text, **({"finish_reason": reason} if reason else {})}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def test_a_stream_is_read_wherever_it_is_cut_into_pieces():
    whole = event("Hel") + event("lo", "length") + b"data: [DONE]\n\n"
    with answering(200, [whole[:9], whole[9:50], whole[50:]]) as address:
        (one,), (other,) = clients.closed_loop(address, [[{}], [{}]])
    assert (one.text, one.reason, one.error) == (other.text, other.reason, other.error) == ("Hello", "length", None)
    assert one.sent < one.first <= one.last
    assert clients.whole(one) == one


def test_a_stream_that_breaks_off_or_says_an_error_is_no_answer():
    for pieces in ([event("Hel")], [event("Hel"), b'data: {"error": {"message": "gone"}}\n\n']):
        with answering(200, pieces) as address:
            (answer,) = clients.open_loop(address, [{}], [0.01])
        with pytest.raises(Invalid, match="status 200"):
            clients.whole(answer)


def test_a_refusal_is_kept_with_its_status():
    with answering(429, [b"busy"]) as address:
        (answer,) = clients.open_loop(address, [{}], [0.0])
    assert (answer.status, answer.error) == (429, "busy")
