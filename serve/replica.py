"""One engine driven for many callers: a thread of its own steps it, and every token goes to whoever asked for it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llm.engine import Engine, Token
from llm.sampling import SamplingParams
from serve.backend import Load, ModelInfo, Overloaded, Request, Unavailable
from serve.queues import alarm, all_of, one_by_one

MAX_REQUESTS = 512  # running and waiting; beyond it a client is told to come back
LOOK_BACK_S = 10.0  # for how long a wait for a first token counts as one of late
FADING = 0.98  # what a step counts for after the next one


@dataclass(eq=False)
class _Pending:
    """A request in the engine, and where its tokens go."""

    queue: asyncio.Queue[Token | Exception]
    prompt: int  # tokens still to read
    answer: int  # tokens at most still to write
    since: float = field(default_factory=time.monotonic)
    begun: bool = False

    def advance(self) -> None:
        """One token more has been written."""
        self.prompt, self.answer, self.begun = 0, self.answer - 1, True


@dataclass
class _Pace:
    """How fast answers are written while all slots are taken, of late."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds = FADING * self.tokens + tokens, FADING * self.seconds + seconds

    def seconds_for(self, tokens: int) -> float:
        """0 as long as nothing is known."""
        return tokens * self.seconds / self.tokens if self.tokens else 0.0


class Replica:
    """Owns an engine. Its callers share one event loop; only the replica's own thread changes the engine."""

    def __init__(self, load: Callable[[], Engine], *, max_requests: int = MAX_REQUESTS):
        """Starts `load` in the replica's thread, from a running event loop. `ready` once the engine made a token."""
        self.failure: str | None = None
        self._engine: Engine | None = None
        self._max_requests = max_requests
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        # Embeddings are computed beside the tokens, or a long text would stop them.
        self._embedding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedding")
        # A grammar is tried before it is used, which a stranger's can make take seconds.
        self._trying = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._pending: dict[str, _Pending] = {}  # by its id in the engine
        self._pace = _Pace()
        self._waits: deque[tuple[float, float]] = deque()  # when a first token came, and after how long
        self._work = asyncio.Event()
        self._changed = asyncio.Event()  # loaded, or failed
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

    async def describe(self) -> ModelInfo:
        """The model, once it is loaded. Unavailable if it can't be."""
        await self._changed.wait()
        engine = self.engine
        return ModelInfo(
            context=engine.context,
            vocab_size=engine.vocab_size,
            end_ids=frozenset(engine.end_ids),
            generates=True,
            embeds=True,
            slots=engine.slots,
        )

    async def failed(self) -> None:
        """Returns when the engine has failed."""
        await asyncio.wait([self._driver])

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what could not run: ValueError for a bad request, Overloaded, Unavailable."""
        for prompt_ids, params in requests:
            self.engine.check(prompt_ids, params)
        self._check_room(len(requests))

    def tokens(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncGenerator[tuple[int, Token], None]:
        """The tokens of all `requests` as they come, each with its request's index.

        A caller that goes away (closes the iterator, or is cancelled) frees the slots. Unavailable: the engine failed.
        """
        return one_by_one(self.batches(requests, deadline_s=deadline_s))

    async def batches(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncGenerator[list[tuple[int, Token]], None]:
        """The same, with all that has come since the caller looked last at once."""
        engine = self.engine
        self._check_room(len(requests))
        self._check_deadline(requests, deadline_s)
        await self._try_grammars(engine, requests)
        queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        index_of = {uuid.uuid4().hex: index for index in range(len(requests))}
        self._pending |= {key: _pending(queue, requests[index]) for key, index in index_of.items()}
        ending = alarm(queue, deadline_s)
        unfinished = set(index_of)
        try:
            for request_id, index in index_of.items():
                await self._in_thread(engine.add, *requests[index], request_id)
                self._work.set()
            while unfinished:
                batch = await all_of(queue)
                unfinished -= {token.request_id for token in batch if token.finish_reason}
                yield [(index_of[token.request_id], token) for token in batch]
        finally:
            if ending:
                ending.cancel()
            for request_id in index_of:
                del self._pending[request_id]
            for request_id in unfinished:
                self._thread.submit(engine.cancel, request_id)

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """The mean-pooled last hidden states of each prompt. ValueError for one that couldn't be read."""
        model = self.engine.model
        answers = []
        for prompt in prompts:  # one by one, so that nobody's many texts hold up another's single one
            self.engine.check(prompt, SamplingParams(max_new_tokens=1))
            vectors = await asyncio.get_running_loop().run_in_executor(self._embedding, _embed, model, prompt)
            answers.append(vectors)
        return answers

    def load(self) -> Load:
        """The load now; its longest wait is of those that wait, and of those that began in the last LOOK_BACK_S."""
        now = time.monotonic()
        while self._waits and now - self._waits[0][0] > LOOK_BACK_S:
            self._waits.popleft()
        pending = self._pending.values()
        waits = [wait for _, wait in self._waits] + [now - each.since for each in pending if not each.begun]
        running = min(len(pending), self._engine.slots) if self._engine else 0
        return Load(
            replicas=1,
            running=running,
            waiting=len(pending) - running,
            queued_tokens=sum(each.prompt + each.answer for each in pending),
            first_token_s=max(waits, default=0.0),
        )

    async def _try_grammars(self, engine: Engine, requests: Sequence[Request]) -> None:
        """So that the engine, when it gets them, remembers the verdict and others' tokens don't wait. ValueError."""
        for prompt_ids, params in requests:
            if params.grammar is not None:
                await asyncio.get_running_loop().run_in_executor(self._trying, engine.check, prompt_ids, params)

    def _check_room(self, count: int) -> None:
        if len(self._pending) + count > self._max_requests:
            raise Overloaded(f"{len(self._pending)} requests are running or waiting, the most is {self._max_requests}")

    def _check_deadline(self, requests: Sequence[Request], deadline_s: float | None) -> None:
        """Overloaded if the answers would not be there in time: what can't be, need not be begun."""
        if deadline_s is None or len(self._pending) < self.engine.slots:
            return
        own = sum(params.max_new_tokens for _, params in requests)
        expected = self._pace.seconds_for(own + sum(each.answer for each in self._pending.values()))
        if expected > deadline_s:
            raise Overloaded(
                f"with {len(self._pending)} requests before it the answer could take {expected:.1f} s, more than the "
                f"{deadline_s:.1f} s that are left for it",
                retry_after_s=expected - deadline_s,
            )

    async def _drive(self, load: Callable[[], Engine]) -> None:
        """Load the engine, then step it whenever it has work; after a failure everyone who waits is told."""
        try:
            engine = await self._in_thread(_load_and_try, load)
            self._engine = engine
            self._changed.set()
            while True:
                await self._work.wait()
                full, started = len(self._pending) >= engine.slots, time.monotonic()
                tokens = await self._in_thread(engine.step)
                if full:
                    self._pace.add(len(tokens), time.monotonic() - started)
                self._hand_out(tokens)
                if not engine.has_work:
                    self._work.clear()  # whoever adds a request sets it afterwards
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._changed.set()
            for queue in {pending.queue for pending in self._pending.values()}:
                queue.put_nowait(Unavailable(f"the engine failed: {self.failure}"))
            raise

    def _hand_out(self, tokens: Sequence[Token]) -> None:
        now = time.monotonic()
        for token in tokens:
            pending = self._pending.get(token.request_id)
            if pending is None:  # cancelled while the step ran
                continue
            if not pending.begun:
                self._waits.append((now, now - pending.since))
            pending.advance()
            pending.queue.put_nowait(token)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _pending(queue: asyncio.Queue[Token | Exception], request: Request) -> _Pending:
    prompt_ids, params = request
    return _Pending(queue, len(prompt_ids), params.max_new_tokens)


def _embed(model: Any, prompt: list[int]) -> list[float]:
    from llm.embedding import embed

    return embed(model, [prompt])[0].tolist()


def _load_and_try(load: Callable[[], Engine]) -> Engine:
    """An engine that has generated one token, so that the first user doesn't pay for what happens once."""
    engine = load()
    engine.generate([[0]], SamplingParams(max_new_tokens=1, temperature=0))
    return engine
