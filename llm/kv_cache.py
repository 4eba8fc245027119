"""Keys and values of all running requests, each at its own position, and of the prefixes that are kept for others.

Every layer has two buffers: rows, one for each running request, and a pool of blocks, `BLOCK` positions each, in which
beginnings of earlier requests stay. Both start small; together they never hold more than `limit` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 16  # positions that are kept or copied together: a prefix is shared in whole blocks


@dataclass(frozen=True)
class Plan:
    """Where one forward pass of n rows with q queries each writes and reads; the same for every layer."""

    rows: slice | Tensor  # the rows of the batch; a slice reads the buffer in place, an index (n,) copies
    write_row: Tensor  # (m,) row of each new token
    write_position: Tensor  # (m,) position of each new token in its row
    source: Tensor | None  # (m,) its index among the n * q queries; None: all of them, in order (no padding)
    longest: int  # positions to read, the longest row's


@dataclass(frozen=True)
class Places:
    """Blocks in rows and in the pool: number `index[i]` of row `row[i]` is `block[i]` there; each (m,)."""

    row: Tensor
    index: Tensor
    block: Tensor


class Buffer:
    """The keys, or the values, of one layer."""

    rows: Tensor  # (rows, kv_heads, width, head_dim)
    blocks: Tensor  # (blocks, kv_heads, BLOCK, head_dim)

    def __init__(self, states: Tensor, rows: int, width: int, blocks: int):
        _, heads, _, size = states.shape
        # Zeros, as what lies behind a mask still is multiplied (by 0), and garbage may be NaN.
        self.rows = states.new_zeros(rows, heads, width, size)
        self.blocks = states.new_zeros(blocks, heads, BLOCK, size)

    def write_and_read(self, states: Tensor, plan: Plan) -> Tensor:
        new = states.transpose(1, 2).flatten(0, 1)  # (n * q, kv_heads, head_dim)
        self.rows[plan.write_row, :, plan.write_position] = new if plan.source is None else new[plan.source]
        return self.rows[plan.rows, :, : plan.longest]

    def reshape(self, rows: int, width: int, used_rows: int, used_width: int) -> None:
        old, heads, size = self.rows, self.rows.shape[1], self.rows.shape[3]
        self.rows = old.new_zeros(rows, heads, width, size)
        self.rows[:used_rows, :, :used_width] = old[:used_rows, :, :used_width]

    def repool(self, blocks: int) -> None:
        old = self.blocks
        self.blocks = old.new_zeros(blocks, *old.shape[1:])
        kept = min(blocks, len(old))
        self.blocks[:kept] = old[:kept]

    def keep(self, places: Places) -> None:
        self.blocks[places.block] = self._by_block()[places.row, :, places.index]

    def restore(self, places: Places) -> None:
        self._by_block()[places.row, :, places.index] = self.blocks[places.block]

    def _by_block(self) -> Tensor:
        return self.rows.unflatten(2, (-1, BLOCK))  # a view: (rows, kv_heads, width / BLOCK, BLOCK, head_dim)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, whose buffers are made at its first pass."""

    def __init__(self, owner: SlotCache):
        super().__init__()
        self.owner = owner
        self.buffers: tuple[Buffer, ...] = ()  # of the keys and of the values, which may differ in shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.owner.rows, self.owner.width, self.owner.blocks
        self.buffers = Buffer(key_states, *shape), Buffer(value_states, *shape)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (n, kv_heads, q, head_dim); return those of the rows, `longest` positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.owner.plan
        keys, values = self.buffers
        return keys.write_and_read(key_states, plan), values.write_and_read(value_states, plan)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.plan.longest, 0

    def get_seq_length(self) -> int:
        return self.owner.plan.longest

    def get_max_length(self) -> int:
        return self.owner.width


class SlotCache(Cache):
    """At most `slots` rows and a pool of blocks, together at most `limit` positions, for each of `layers` layers.

    Set `plan` before each forward pass.
    """

    plan: Plan

    def __init__(self, layers: int, slots: int, limit: int, device: torch.device):
        self.slots, self.limit, self.device = slots, limit, device
        self.rows = self.width = self.blocks = 0
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    @property
    def positions(self) -> int:
        """How many positions there is memory for now."""
        return self.rows * self.width + self.blocks * BLOCK

    @property
    def buffers(self) -> list[Buffer]:
        return [buffer for layer in self.layers for buffer in layer.buffers]

    @torch.inference_mode()
    def reserve(self, rows: int, width: int, used: int) -> None:
        """Room for `rows` requests of `width` positions, of which `used` hold something. The pool must leave it."""
        if rows <= self.rows and width <= self.width:
            return
        rows_before = self.rows
        self.rows, self.width = self._shape(rows, width)
        for buffer in self.buffers:
            buffer.reshape(self.rows, self.width, min(rows, rows_before), used)

    def _shape(self, rows: int, width: int) -> tuple[int, int]:
        """Rows and positions to make, at least those asked for: some more, so that few requests reshape the cache."""
        room = self.limit - self.blocks * BLOCK
        most_rows = self.rows if rows <= self.rows else max(rows, min(2 * self.rows, self.slots))
        most_width = self.width if width <= self.width else max(width, _whole_blocks(self.width * 3 // 2))
        if most_rows * most_width <= room:
            return most_rows, most_width
        # Rows that are many and narrow must not stand in the way of a long one, so either may shrink to what is asked.
        return min(self.slots, room // width), width

    @torch.inference_mode()
    def repool(self, blocks: int) -> None:
        """Make the pool `blocks` blocks large; it keeps those that still have a place."""
        self.blocks = blocks
        for buffer in self.buffers:
            buffer.repool(blocks)

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row over another."""
        for buffer in self.buffers:
            buffer.rows[target, :, :length] = buffer.rows[source, :, :length]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Forget what a row held, for whoever gets it next: what is NaN would stay so behind a mask."""
        for buffer in self.buffers:
            buffer.rows[row] = 0

    @torch.inference_mode()
    def keep(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Copy blocks out of rows into the pool: (row, number of the block in it, place in the pool) each."""
        if places:
            found = self._places(places)
            for buffer in self.buffers:
                buffer.keep(found)

    @torch.inference_mode()
    def restore(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Copy blocks of the pool into rows, named as in `keep`."""
        if places:
            found = self._places(places)
            for buffer in self.buffers:
                buffer.restore(found)

    def _places(self, places: Sequence[tuple[int, int, int]]) -> Places:
        return Places(*torch.tensor(places, device=self.device).unbind(1))


def _whole_blocks(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


def plan_decode(positions: Tensor, longest: int) -> Plan:
    """The plan of one new token in each of the rows 0 to n - 1, at `positions` (n,), `longest` with the new one."""
    rows = torch.arange(len(positions), device=positions.device)
    return Plan(slice(0, len(positions)), rows, positions, None, longest)


def plan_prefill(rows: list[int], starts: list[int], lengths: list[int], device: torch.device) -> Plan:
    """The plan of `lengths[i]` new tokens in row `rows[i]` from `starts[i]` on, queries padded to the longest."""
    row = torch.tensor(rows, device=device)
    start, length = torch.tensor(starts, device=device), torch.tensor(lengths, device=device)
    width = max(lengths)
    query = torch.arange(width, device=device)
    index, offset = (query < length[:, None]).nonzero(as_tuple=True)
    longest = max(s + n for s, n in zip(starts, lengths, strict=True))
    first, count = rows[0], len(rows)
    side_by_side = rows == list(range(first, first + count))
    read = slice(first, first + count) if side_by_side else row
    return Plan(read, row[index], start[index] + offset, index * width + offset, longest)
