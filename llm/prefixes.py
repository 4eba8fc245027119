"""Beginnings of texts that the cache keeps, so that who begins with the same tokens doesn't read them again."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from llm.kv_cache import BLOCK, SlotCache

# One digest for each whole block of a text, of everything up to its end: equal beginnings have equal ones. A digest
# that can't be forged, since a collision would hand one user the context of another.
Chain = list[bytes]
FIRST_POOL = 64  # blocks


class Prefixes:
    """Keeps blocks of keys and values in the cache's pool and forgets the least recently used first.

    A block is of use only behind all those before it. In the order of use a chain's later blocks are therefore older
    than its earlier ones, and what is forgotten first never breaks a chain in the middle.
    """

    def __init__(self, cache: SlotCache, most: int):
        """`most`: blocks to keep at most; 0 keeps and finds nothing."""
        self.cache = cache
        self.most = most
        self._places: dict[bytes, int] = {}  # place in the pool of each block kept, the least recently used first
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._places)

    def chain(self, ids: Sequence[int], begun: Chain | None = None) -> Chain:
        """The chain of `ids`; `begun` is that of a beginning of them."""
        chain = list(begun or ())
        end = len(ids) if self.most else 0
        for start in range(len(chain) * BLOCK, end - BLOCK + 1, BLOCK):
            before = chain[-1] if chain else b""
            block = array("q", ids[start : start + BLOCK]).tobytes()
            chain.append(blake2b(before + block, digest_size=16).digest())
        return chain

    def held(self, chain: Chain) -> int:
        """How many blocks of `chain`, from its first on, are kept."""
        return next((n for n, block in enumerate(chain) if block not in self._places), len(chain))

    def restore(self, wanted: Iterable[tuple[int, Chain]]) -> None:
        """Copy kept blocks into the beginnings of rows: (row, chain, all of it kept) each."""
        places = []
        for row, chain in wanted:
            places += [(row, index, self._places[block]) for index, block in enumerate(chain)]
            self._touch(chain)
        self.cache.restore(places)

    def keep(self, texts: Iterable[tuple[int, Chain]]) -> None:
        """Keep the beginnings of rows: (row, chain of what it holds) each; blocks kept already cost nothing."""
        new: dict[int, tuple[int, int, int]] = {}  # by place: a later block may have taken an earlier one's
        for row, chain in texts:
            for index, place in self._insert(chain):
                new[place] = (row, index, place)
        self.cache.keep(list(new.values()))

    def drop(self) -> None:
        """Forget everything, as when the weights are others."""
        self._places.clear()
        self._free = list(range(self.cache.blocks))

    def leave(self, positions: int) -> None:
        """See to it that the cache's rows can have `positions` in all: what is kept gives way to what runs."""
        if positions + self.cache.blocks * BLOCK > self.cache.limit:
            self.cache.repool(0)
            self.drop()

    def _insert(self, chain: Chain) -> list[tuple[int, int]]:
        """Take places for the blocks of `chain` that have none: (number of the block, place) each."""
        held = self.held(chain)
        missing = len(chain) - held - len(self._free)
        if missing > 0:
            self._grow(missing)
        chain = chain[: self.cache.blocks]  # so that none of its own blocks is the oldest
        self._touch(chain[:held])
        new = []
        for index in range(held, len(chain)):
            self._places[chain[index]] = place = self._take()
            new.append((index, place))
        self._touch(chain)
        return new

    def _grow(self, missing: int) -> None:
        """A larger pool, as far as the bounds allow."""
        before = self.cache.blocks
        room = (self.cache.limit - self.cache.rows * self.cache.width) // BLOCK
        size = min(max(before + missing, 2 * before, FIRST_POOL), self.most, room)
        if size > before:
            self.cache.repool(size)
            self._free += range(before, size)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        return self._places.pop(next(iter(self._places)))

    def _touch(self, chain: Chain) -> None:
        for block in reversed(chain):
            self._places[block] = self._places.pop(block)
