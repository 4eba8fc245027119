"""Which requests run: those whose whole prompt and answer have room in the cache, in order of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from llm.kv_cache import BLOCK
from llm.prefixes import Chain
from llm.sampling import Sampler, SamplingParams
from llm.text_stream import TextStream


@dataclass(eq=False)
class Request:
    """One request on its way. What it knows are its prompt's ids and those that it has made."""

    id: str
    number: int  # order of arrival
    prompt_ids: list[int]
    params: SamplingParams
    sampler: Sampler
    text: TextStream
    chain: Chain
    row: int = -1  # of the cache, while it runs
    computed: int = 0  # positions whose keys and values are in the cache
    new_ids: list[int] = field(default_factory=list)

    @property
    def unread(self) -> int:
        """Known tokens that the model hasn't seen."""
        return len(self.prompt_ids) + len(self.new_ids) - self.computed

    @property
    def decoding(self) -> bool:
        """Only the token that it made last is unread."""
        return bool(self.new_ids) and self.unread == 1

    @property
    def queued_tokens(self) -> int:
        return max(0, len(self.prompt_ids) - self.computed) + self.params.max_new_tokens - len(self.new_ids)

    @property
    def positions(self) -> int:
        """Positions that it may come to need."""
        return positions_of(len(self.prompt_ids) + self.params.max_new_tokens)

    def known(self, start: int, end: int) -> list[int]:
        """The ids at positions `start` to `end` of what it knows."""
        if end <= len(self.prompt_ids):
            return self.prompt_ids[start:end]
        return (self.prompt_ids + self.new_ids)[start:end]


def positions_of(tokens: int) -> int:
    """Positions that so many tokens take: whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


class Scheduler:
    """The requests that wait and those that run, each in one row of a cache of at most `limit` positions.

    All rows are as wide as the widest request needs, so `limit` holds (rows) x (most positions of one).
    """

    def __init__(self, slots: int, limit: int):
        self.slots, self.limit = slots, limit
        self.rows: list[Request | None] = []  # None: left by a request, to be filled before the next step
        self.waiting: deque[Request] = deque()
        self.running = 0

    def __iter__(self) -> Iterator[Request]:
        return (request for request in self.rows if request is not None)

    @property
    def widest(self) -> int:
        return max((request.positions for request in self), default=0)

    def admit(self) -> bool:
        """Give rows to those that have waited longest, as long as they fit; True if there was one."""
        if not self.waiting:
            return False
        widest, before = self.widest, self.running
        while self.waiting and self.running < self.slots:
            widest = max(widest, self.waiting[0].positions)
            if (self.running + 1) * widest > self.limit:
                break  # the next may be smaller, but then a large one could wait for ever
            self._place(self.waiting.popleft())
        return self.running > before

    def _place(self, request: Request) -> None:
        request.row = self.rows.index(None) if None in self.rows else len(self.rows)
        self.rows[request.row : request.row + 1] = [request]
        self.running += 1

    def release(self, request: Request) -> None:
        """Free the row of a running request."""
        self.rows[request.row] = None
        request.row = -1
        self.running -= 1

    def close_gaps(self) -> list[tuple[int, int, int]]:
        """Move the last requests into rows that are free, so that a batch is a view of the cache.

        Returns what that asks of the cache: (row, its new row, positions to copy) each.
        """
        moves = []
        for gap in [row for row, request in enumerate(self.rows) if request is None]:
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if gap >= len(self.rows):
                break
            last = self.rows.pop()
            assert last is not None  # the loop above saw to it
            moves.append((last.row, gap, last.computed))
            self.rows[gap], last.row = last, gap
        return moves
