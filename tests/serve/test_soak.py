"""The service for long, and clients that vanish: what `make soak` runs of it, each with its table."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from tests.bench import clients, processes
from tests.commands import command, wait_until
from tests.serve.conftest import free_port, wait_until_ready
from tests.usage import assert_no_more, compared, usage

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

REQUESTS, EARLY, AT_ONCE = 24_000, 6_000, 16
VANISHING, WAVE = 1_000, 50
NAME = "tiny"
KNOWN = {"model": NAME, "prompt": "The cat sat", "max_tokens": 8, "temperature": 0, "stream": True}
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "nobody",
    "knew",
    "where",
    "that",
    "dog",
    "had",
    "left",
    "dinner",
)


class Service(NamedTuple):
    """`headwater serve` while it runs. address: `http://HOST:PORT/v1`."""

    address: str
    process: psutil.Popen


@pytest.fixture
def served(model_folder, tmp_path) -> Iterator[Service]:
    port = free_port()
    words = command("serve", str(model_folder), "--port", str(port), "--model-name", NAME)
    with processes.running(words, tmp_path / "log") as process:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: _listens(address) or process.poll() is not None, "the service")
        assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
        wait_until_ready(address)
        yield Service(f"{address}/v1", process)
        processes.stop(process)


def test_a_day_of_requests_takes_no_more_memory_or_handles_than_a_quarter_of_it(served, table):
    random = Random(1)
    before = text_of(served)
    found = []
    begun = time.monotonic()
    for number in (EARLY, REQUESTS - EARLY):
        ask_many(served, [body(random) for _ in range(number)])
        found.append(usage(served.process))
    minutes = (time.monotonic() - begun) / 60
    table(f"{REQUESTS:,} requests in {minutes:.0f} min: held after {EARLY:,}, and in the end", compared(*found))
    assert text_of(served) == before
    assert_no_more(*found)


def test_clients_that_vanish_within_a_stream_leave_nothing_behind(served, table):
    random = Random(2)
    long = {**KNOWN, "max_tokens": 240, "temperature": 1.0}

    def wave() -> None:
        bodies = [{**long, "prompt": sentence(random), "seed": random.randrange(2**31)} for _ in range(WAVE)]

        async def everyone() -> None:
            await asyncio.gather(*(clients.vanish(served.address, one) for one in bodies))

        asyncio.run(everyone())

    before = text_of(served)
    for _ in range(VANISHING // WAVE // 4):
        wave()
    free(served)
    early = usage(served.process)
    for _ in range(VANISHING // WAVE):
        wave()
    free(served)
    late = usage(served.process)
    table(f"{VANISHING:,} clients gone within a stream: held before, and afterwards", compared(early, late))
    assert text_of(served) == before
    assert_no_more(early, late)


# What is asked


def body(random: Random) -> dict[str, Any]:
    """Greedy and drawn, alone and several, with and without log-probabilities; one in twenty is refused."""
    asked = {**KNOWN, "prompt": sentence(random), "max_tokens": random.randint(1, 12)}
    if random.random() < 0.05:
        return {**asked, random.choice(("temperature", "top_p", "max_tokens")): -1}
    if random.random() < 0.5:
        asked |= {"temperature": 0.8, "seed": random.randrange(2**31), "n": random.choice((1, 1, 2))}
    if random.random() < 0.2:
        asked |= {"logprobs": 3, "stop": ["the"], "frequency_penalty": 0.5}
    return asked


def sentence(random: Random) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(1, 20)))


def ask_many(served: Service, bodies: list[dict[str, Any]]) -> None:
    for answers in clients.closed_loop(served.address, [bodies[client::AT_ONCE] for client in range(AT_ONCE)]):
        for answer in answers:
            assert answer.status == 400 or (answer.reason and not answer.error), answer


def text_of(served: Service) -> str:
    return clients.whole(clients.closed_loop(served.address, [[KNOWN]])[0][0]).text


def free(served: Service) -> None:
    """Wait until the service says that nothing runs and nothing waits in its engine."""
    wait_until(lambda: in_engine(served) == 0, "free slots", timeout=120)


def in_engine(served: Service) -> float:
    said = httpx.get(f"{served.address.removesuffix('/v1')}/metrics").text
    gauges = re.findall(r"^headwater_engine_(?:running|waiting)\{.*\} ([0-9.]+)$", said, re.MULTILINE)
    assert len(gauges) == 2, said
    return sum(map(float, gauges))


def _listens(address: str) -> bool:
    try:
        return bool(httpx.get(f"{address}/healthz", timeout=5))
    except httpx.TransportError:
        return False
