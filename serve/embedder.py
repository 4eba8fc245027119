"""A model that fills in words, served for what it can: a vector for a text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from serve.backend import Load, ModelInfo, Overloaded, Request, Unavailable, check_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llm.engine import Token


class Embedder:
    """serve.backend.Backend for a model that continues no text. Texts are read one after another, in a thread."""

    def __init__(self, load: Callable[[], PreTrainedModel], *, max_requests: int):
        """Starts `load` in the thread, from a running event loop."""
        self.failure: str | None = None
        self._max_requests = max_requests
        self._model: PreTrainedModel | None = None
        self._waiting: list[int] = []  # tokens to read, of each request
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedding")
        self._loading = asyncio.create_task(self._load(load))

    @property
    def ready(self) -> bool:
        return self._model is not None

    async def describe(self) -> ModelInfo:
        """The model, once it is loaded. Unavailable if it can't be."""
        await asyncio.shield(self._loading)
        config = self._loaded().config
        return ModelInfo(
            context=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            end_ids=frozenset(),
            generates=False,
            embeds=True,
            slots=1,
        )

    async def failed(self) -> None:
        """Returns when the model could not be loaded; later nothing fails but a request."""
        await asyncio.shield(self._loading)
        if self.failure is None:
            await asyncio.Event().wait()

    def check(self, requests: Sequence[Request]) -> None:
        """Nothing can be generated."""
        raise ValueError("the model fills in words, it can't continue a text")

    async def tokens(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncGenerator[tuple[int, Token], None]:
        """None: a ValueError."""
        async for batch in self.batches(requests, deadline_s=deadline_s):
            for pair in batch:
                yield pair

    async def batches(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncGenerator[list[tuple[int, Token]], None]:
        """None: a ValueError."""
        self.check(requests)
        yield []

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """The mean-pooled last hidden states of each prompt. ValueError for one that couldn't be read."""
        info, model = await self.describe(), self._loaded()
        for prompt in prompts:
            check_prompt(prompt, 0, info)
        if len(self._waiting) >= self._max_requests:
            raise Overloaded(f"{len(self._waiting)} requests wait for vectors, the most is {self._max_requests}")
        self._waiting.append(sum(map(len, prompts)))
        try:
            return [await self._in_thread(embedding, model, prompt) for prompt in prompts]
        finally:
            self._waiting.remove(sum(map(len, prompts)))

    def load(self) -> Load:
        """Tokens to read count as queued."""
        running = min(1, len(self._waiting))
        return Load(1, running, len(self._waiting) - running, sum(self._waiting))

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            raise Unavailable(f"the model couldn't be loaded: {self.failure}" if self.failure else "it still loads")
        return self._model

    async def _load(self, load: Callable[[], PreTrainedModel]) -> None:
        try:
            self._model = await self._in_thread(load)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def embedding(model: Any, prompt: list[int]) -> list[float]:
    """The vector of one text. It is computed alone, so that nobody's many texts hold up another's single one."""
    from llm.embedding import embed

    return embed(model, [prompt])[0].tolist()
