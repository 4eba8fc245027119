"""The engines of one model on Ray Serve: a deployment of replicas, and the backend that calls them by its handle."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from cluster import mirror
from serve.backend import DeadlineExceeded, Load, ModelInfo, Overloaded, Request, Unavailable, check_prompt
from serve.options import Options
from serve.scaling import FIRST_TOKEN_S, QUEUED_TOKENS

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from llm.engine import Engine, Token
    from serve.replica import Replica
    from serve.vllm import Vllm

ATTEMPTS = 4  # of a request that has got nothing yet
ATTEMPT_AFTER_S = 0.2
LOOK_EVERY_S = 1.0  # at the replicas' load
LOOK_TAKES_S = 5.0  # at most
PAUSE_S = 0.002  # between two messages of a stream, for each other stream of its replica: a message takes about that
LONGEST_PAUSE_S = 0.1
LAST_WORDS_S = 1.0  # for whoever waits to learn that the engine failed, before its process ends

Piece = tuple[int, int, str, float, list[tuple[int, float]], Any]  # a token as it travels, its request's index first
Some = TypeVar("Some")

logger = logging.getLogger(__name__)


@ray_serve.deployment
class EngineReplica:
    """One replica: an engine, loaded before Ray Serve sends requests. Its process ends when the engine fails."""

    async def __init__(self, model_folder: str, options: Options):  # type: ignore[misc]
        self.replica = _generating(model_folder, options)
        self._streams = 0
        await self.replica.describe()
        self._end = asyncio.create_task(self._end_with_engine())

    async def describe(self) -> ModelInfo:
        return await self.replica.describe()

    async def load(self) -> Load:
        return self.replica.load()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve, whose autoscaling policy gets it."""
        load = self.replica.load()
        return {QUEUED_TOKENS: float(load.queued_tokens), FIRST_TOKEN_S: load.first_token_s}

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose engine has failed."""
        if self.replica.failure is not None:
            raise RuntimeError(f"the engine failed: {self.replica.failure}")

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        return await self.replica.embed(prompts)

    async def generate(self, requests: list[Request], deadline_s: float | None) -> AsyncGenerator[list[Piece], None]:
        """The tokens of all requests, those that came since the last message together.

        Messages cost more than tokens: with many streams each sends fewer of them.
        """
        self._streams += 1
        try:
            async with aclosing(self.replica.batches(requests, deadline_s=deadline_s)) as batches:
                async for batch in batches:
                    yield [_piece(index, token) for index, token in batch]
                    await asyncio.sleep(min(LONGEST_PAUSE_S, PAUSE_S * (self._streams - 1)))
        finally:
            self._streams -= 1

    async def _end_with_engine(self) -> None:
        await self.replica.failed()
        logger.error("the engine failed, so its process ends: %s", self.replica.failure)
        await asyncio.sleep(LAST_WORDS_S)
        os._exit(1)


def _generating(model_folder: str, options: Options) -> Replica | Vllm:
    """What generates in this process, or a vLLM server beside it."""
    if options.engine == "vllm":
        from serve import vllm

        return vllm.started(mirror.here(Path(model_folder)), options)
    from serve.replica import Replica

    return Replica(lambda: load_engine(model_folder, options), max_requests=options.max_requests)


def load_engine(model_folder: str, options: Options) -> Engine:
    """The engine of one replica. Ray gives its processes one thread for each CPU; torch is told to use them."""
    import torch

    from llm.loading import load

    torch.set_num_threads(max(1, int(options.cpus)))
    dtype = {} if options.dtype is None else {"dtype": options.dtype}
    return load(mirror.here(Path(model_folder)), slots=options.slots, **dtype)


class Engines:
    """serve.backend.Backend over the replicas of one deployment.

    Waits with a request while there is no replica, unless too many wait already. A request that has got nothing when
    its replica dies is sent to another one.
    """

    def __init__(self, handle: DeploymentHandle, options: Options):
        """From a running event loop."""
        self.failure: str | None = None
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._options = options
        self._info: ModelInfo | None = None
        self._load = Load()
        self._running = 0  # requests from here
        self._looking = asyncio.create_task(self._look())

    @property
    def ready(self) -> bool:
        return self._info is not None and (self._load.replicas > 0 or self._options.replicas == 0)

    async def describe(self) -> ModelInfo:
        """The model; waits for a replica, which it wakes if there is none."""
        if self._info is None:
            self._info = await self._call("describe")
        return self._info

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what can be known here to be no use; replicas look closer."""
        if self._info is not None:
            for prompt_ids, params in requests:
                check_prompt(prompt_ids, params.max_new_tokens, self._info)
                params.check_vocabulary(self._info.vocab_size)
        most = self._options.most * self._options.max_requests
        if self._running + len(requests) > most:
            raise Overloaded(f"{self._running} requests are running or waiting, the most is {most}")

    async def tokens(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncGenerator[tuple[int, Token], None]:
        """As serve.backend.Backend says it."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        self._running += len(requests)
        try:
            for attempt in range(ATTEMPTS):
                begun = False
                try:
                    async with aclosing(self._batches(list(requests), end)) as batches:
                        async for batch in batches:
                            begun = True
                            for piece in batch:
                                yield _token(piece)
                    return
                except Unavailable:
                    if begun or attempt == ATTEMPTS - 1:
                        raise
                await asyncio.sleep(ATTEMPT_AFTER_S)
        finally:
            self._running -= len(requests)

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """As serve.backend.Backend says it."""
        return await self._call("embed", prompts)

    def load(self) -> Load:
        """Of all replicas, when last looked at."""
        return self._load

    async def _batches(self, requests: list[Request], end: float | None) -> AsyncGenerator[list[Piece], None]:
        """What one replica sends, until `end`, in seconds of time.monotonic."""
        left = None if end is None else max(0.0, end - time.monotonic())
        response, ended = self._generate.remote(requests, left), False
        try:
            while not ended:
                batch = await _until(end, anext(response, None))
                ended = batch is None
                if batch:
                    yield batch
        finally:
            if not ended:
                with suppress(Exception):  # one that was never sent raises again why
                    response.cancel()

    async def _call(self, method: str, *arguments: Any) -> Any:
        """What a method of one replica returns; asked of another one if that replica dies."""
        for _ in range(ATTEMPTS - 1):
            with suppress(Unavailable):
                return await self._call_once(method, *arguments)
            await asyncio.sleep(ATTEMPT_AFTER_S)
        return await self._call_once(method, *arguments)

    async def _call_once(self, method: str, *arguments: Any) -> Any:
        response = getattr(self._handle, method).remote(*arguments)
        try:
            return await _until(None, response)
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _look(self) -> None:
        """Keep the load up to date, without waking a replica after the first."""
        while True:
            with suppress(Exception):  # a replica that is slow or dying: what was seen last is the best guess
                await self.describe()
                self._load = await self._seen()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _seen(self) -> Load:
        try:
            loads = await self._handle.broadcast("load").results_async(timeout_s=LOOK_TAKES_S, return_exceptions=True)
        except DeploymentUnavailableError:  # there is no replica
            return Load()
        return sum((load for load in loads if isinstance(load, Load)), Load())


async def _until(end: float | None, result: Awaitable[Some]) -> Some:
    """`result`, with Ray's errors as the backend's. DeadlineExceeded at `end`, in seconds of time.monotonic."""
    try:
        async with asyncio.timeout(None if end is None else end - time.monotonic()):
            try:
                return await result
            except asyncio.CancelledError:
                # A call that ended with its replica looks just as if we were to end.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise Unavailable("the replica ended") from None
    except TimeoutError:
        raise DeadlineExceeded("the answer took longer than it may") from None
    except (RayError, RayServeException) as error:
        _raise_known(error)


def _raise_known(error: Exception) -> NoReturn:
    """Raise what the backend's callers know instead of what Ray raised."""
    if isinstance(error, BackPressureError):
        raise Overloaded("too many requests wait for a replica") from error
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, Exception) and not isinstance(cause, (RayError, RayServeException)):
        raise cause from None
    raise Unavailable(f"the replica is gone ({type(error).__name__})") from error


def _piece(index: int, token: Token) -> Piece:
    return index, token.id, token.text, token.logprob, token.top, token.finish_reason


def _token(piece: Piece) -> tuple[int, Token]:
    from llm.engine import Token

    index, token, text, logprob, top, reason = piece
    return index, Token(str(index), token, text, logprob, top, reason)
