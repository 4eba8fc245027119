"""Clients that leave in the middle of a stream: what they asked for ends with them."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from ray import serve as ray_serve

from serve import app
from serve.backend import Load
from tests.commands import wait_until

STREAMS = 64
ANSWERS = 16  # of each
FREE_WITHIN_S = 120  # all of them to their ends would take several times as long
LONG = {"model": "tiny", "prompt": "The cat", "max_tokens": 200, "min_tokens": 200, "n": ANSWERS, "stream": True}


async def _begin_and_leave(http: httpx.AsyncClient) -> None:
    async with http.stream("POST", "/v1/completions", json=LONG) as answer:
        if answer.status_code == 200:
            await anext(answer.aiter_lines())


async def _abandon(url: str) -> None:
    """Each stream is left once it has begun, or when another has left: those behind it would wait for minutes."""
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        tasks = [asyncio.create_task(_begin_and_leave(http)) for _ in range(STREAMS)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.slow
def test_abandoned_streams_leave_no_slot_taken(service):
    url = service.removesuffix("/v1")
    asyncio.run(_abandon(url))
    replicas = ray_serve.get_deployment_handle(app.NAME, app.NAME)

    def load() -> Load:
        (answered,) = replicas.broadcast("load").results()
        return answered

    wait_until(lambda: load().running + load().waiting == 0, "the slots", FREE_WITHIN_S)
    short = {"model": "tiny", "prompt": "The cat", "max_tokens": 1}
    assert httpx.post(f"{url}/v1/completions", json=short, timeout=60).status_code == 200
