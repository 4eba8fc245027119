"""One engine driven for many callers: a thread of its own steps it, and every token goes to whoever asked for it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm.engine import Engine, Token
from llm.sampling import SamplingParams

MAX_REQUESTS = 512  # running and waiting; beyond it a client is told to come back

Request = tuple[list[int], SamplingParams]


class Unavailable(Exception):
    """The replica can't generate: its model is still loading, or the engine failed."""


class Overloaded(Exception):
    """The replica has as many requests as it lets wait."""


class Replica:
    """Owns an engine. Its callers share one event loop; only the replica's own thread changes the engine."""

    def __init__(self, load: Callable[[], Engine]):
        """Starts `load` in the replica's thread, from a running event loop. `ready` once the engine made a token."""
        self.failure: Exception | None = None
        self._engine: Engine | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._queues: dict[str, asyncio.Queue[Token | Unavailable]] = {}  # a request's tokens, by its id in the engine
        self._work = asyncio.Event()
        self._driver = asyncio.create_task(self._drive(load))

    @property
    def ready(self) -> bool:
        return self._engine is not None and self.failure is None

    @property
    def engine(self) -> Engine:
        """The engine, to read what never changes. Unavailable while it can't step."""
        if self.failure is not None:
            raise Unavailable(f"the engine failed: {self.failure}")
        if self._engine is None:
            raise Unavailable("the model is still loading")
        return self._engine

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what could not run: ValueError for a bad request, Overloaded, Unavailable."""
        for prompt_ids, params in requests:
            self.engine.check(prompt_ids, params)
        if len(self._queues) + len(requests) > MAX_REQUESTS:
            raise Overloaded(f"{len(self._queues)} requests are running or waiting, the most is {MAX_REQUESTS}")

    async def tokens(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Token]]:
        """The tokens of all `requests` as they come, each with its request's index.

        A caller that goes away (closes the iterator, or is cancelled) frees the slots. Unavailable: the engine failed.
        """
        engine = self.engine
        queue: asyncio.Queue[Token | Unavailable] = asyncio.Queue()
        index_of = {uuid.uuid4().hex: index for index in range(len(requests))}
        self._queues |= dict.fromkeys(index_of, queue)
        unfinished = set(index_of)
        try:
            for request_id, index in index_of.items():
                await self._in_thread(engine.add, *requests[index], request_id)
                self._work.set()
            while unfinished:
                token = await queue.get()
                if isinstance(token, Unavailable):
                    raise token
                if token.finish_reason:
                    unfinished.remove(token.request_id)
                yield index_of[token.request_id], token
        finally:
            for request_id in index_of:
                del self._queues[request_id]
            for request_id in unfinished:
                self._thread.submit(engine.cancel, request_id)

    async def _drive(self, load: Callable[[], Engine]) -> None:
        """Load the engine, then step it whenever it has work; after a failure everyone who waits is told."""
        try:
            engine = await self._in_thread(_load_and_try, load)
            self._engine = engine
            while True:
                await self._work.wait()
                for token in await self._in_thread(engine.step):
                    if token.request_id in self._queues:  # else cancelled while the step ran
                        self._queues[token.request_id].put_nowait(token)
                if not engine.has_work:
                    self._work.clear()  # whoever adds a request sets it afterwards
        except Exception as error:
            self.failure = error
            for queue in set(self._queues.values()):
                queue.put_nowait(Unavailable(f"the engine failed: {error}"))
            raise

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _load_and_try(load: Callable[[], Engine]) -> Engine:
    """An engine that has generated one token, so that the first user doesn't pay for what happens once."""
    engine = load()
    engine.generate([[0]], SamplingParams(max_new_tokens=1, temperature=0))
    return engine
