"""A queue of what generates, read: all that has come at once or one by one, errors raised, an end at the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from serve.backend import DeadlineExceeded

Item = TypeVar("Item")


async def all_of(queue: asyncio.Queue[Item | Exception]) -> list[Item]:
    """What is in the queue, at least one; an exception in it is raised once what came before it has been taken."""
    items: list[Item] = []
    while not items or not queue.empty():
        one = queue.get_nowait() if items else await queue.get()
        if not isinstance(one, Exception):
            items.append(one)
        elif not items:
            raise one
        else:
            queue.put_nowait(one)
            break
    return items


async def one_by_one(batches: AsyncGenerator[list[Item], None]) -> AsyncGenerator[Item, None]:
    """What the batches hold; they are closed with it."""
    async with aclosing(batches):
        async for batch in batches:
            for item in batch:
                yield item


def alarm(queue: asyncio.Queue[Item | Exception], deadline_s: float | None) -> asyncio.TimerHandle | None:
    """Puts an end to what is read from `queue` when the deadline is over."""
    if deadline_s is None:
        return None
    error = DeadlineExceeded(f"the answer took longer than the {deadline_s:g} s that it may")
    return asyncio.get_running_loop().call_later(deadline_s, queue.put_nowait, error)
