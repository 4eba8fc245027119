"""What the API asks of whatever generates: one engine in this process, replicas on Ray Serve, another server.

Imports neither torch nor Ray: the exceptions travel between processes, and every one that meets them imports this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llm.engine import Token
    from llm.sampling import SamplingParams

Request = tuple[list[int], "SamplingParams"]  # a prompt's ids and how to go on from them


class Unavailable(Exception):
    """Nothing can generate now: a model is still loading, or what ran it is gone. Worth another try soon."""


class Overloaded(Exception):
    """As many requests run and wait as are let. `retry_after_s`: when to come back."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message, retry_after_s)  # both, or the second would be lost between processes
        self.message, self.retry_after_s = message, retry_after_s

    def __str__(self) -> str:
        return self.message


class DeadlineExceeded(Exception):
    """The answer took longer than its request may."""


@dataclass(frozen=True)
class ModelInfo:
    """What never changes about a served model."""

    context: int  # positions of a prompt and its answer together
    vocab_size: int
    end_ids: frozenset[int]  # that end an answer
    generates: bool
    embeds: bool
    slots: int  # requests that one engine generates for at once


@dataclass(frozen=True)
class Load:
    """How much there is to do. Loads add up over replicas."""

    replicas: int = 0
    running: int = 0  # requests that hold a slot
    waiting: int = 0  # requests that wait for one
    queued_tokens: int = 0  # prompt tokens still to read and answer tokens at most still to write
    first_token_s: float = 0.0  # the longest that a request of late has waited, or waits, for its first token

    def __add__(self, other: Load) -> Load:
        return Load(
            self.replicas + other.replicas,
            self.running + other.running,
            self.waiting + other.waiting,
            self.queued_tokens + other.queued_tokens,
            max(self.first_token_s, other.first_token_s),
        )


class Backend(Protocol):
    """Generates for many callers, which share one event loop."""

    @property
    def ready(self) -> bool:
        """Whether a request would be served now, or would wake what serves it."""

    @property
    def failure(self) -> str | None:
        """Why nothing will be generated any more; None while all is well."""

    async def describe(self) -> ModelInfo:
        """Waits while the model loads. Unavailable if it won't be there."""

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what could not run: ValueError for a bad request, Overloaded, Unavailable."""

    def tokens(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncIterator[tuple[int, Token]]:
        """The tokens of all `requests` as they come, each with its request's index.

        Closing the iterator, or cancelling who iterates, frees the slots at once. Before the first token the errors of
        `check` may still come; Unavailable if the engine fails, DeadlineExceeded `deadline_s` seconds after the call.
        """

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """One vector for each prompt. ValueError for one that is empty or longer than the context."""

    def load(self) -> Load:
        """The load now, as far as it is known here."""


def check_prompt(prompt: Sequence[int], new_tokens: int, info: ModelInfo) -> None:
    """ValueError if `prompt` and `new_tokens` more could never run on the model that `info` describes."""
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token")
    outside = next((token for token in prompt if not 0 <= token < info.vocab_size), None)
    if outside is not None:
        raise ValueError(f"the prompt has id {outside}, outside the vocabulary of {info.vocab_size}")
    total = len(prompt) + new_tokens
    if total > info.context:
        raise ValueError(
            f"the prompt's {len(prompt)} tokens and max_new_tokens={new_tokens} make {total}, "
            f"more than the context of {info.context}: shorten either"
        )
