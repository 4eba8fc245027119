"""Keys and values of all running requests in one fixed buffer per layer, where each row is at its own position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Plan:
    """Where one forward pass of n rows with q queries each writes and reads; the same for every layer."""

    rows: slice | Tensor  # the slots of the batch; a slice reads the buffer in place, an index (n,) copies
    write_row: Tensor  # (m,) slot of each new token
    write_position: Tensor  # (m,) position of each new token in its slot
    source: Tensor | None  # (m,) its index among the n * q queries; None: all of them, in order (no padding)
    longest: int  # positions to read, the longest row's


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: two buffers (slots, kv_heads, context, head_dim), made at the first pass."""

    def __init__(self, owner: SlotCache):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._buffer(key_states)
        self.values = self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, states: Tensor) -> Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros(self.owner.slots, heads, self.owner.context, width)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (n, kv_heads, q, head_dim); return those of the rows, `longest` positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.owner.plan
        return self._write_and_read(self.keys, key_states, plan), self._write_and_read(self.values, value_states, plan)

    @staticmethod
    def _write_and_read(buffer: Tensor, states: Tensor, plan: Plan) -> Tensor:
        new = states.transpose(1, 2).flatten(0, 1)  # (n * q, kv_heads, head_dim)
        buffer[plan.write_row, :, plan.write_position] = new if plan.source is None else new[plan.source]
        return buffer[plan.rows, :, : plan.longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.plan.longest, 0

    def get_seq_length(self) -> int:
        return self.owner.plan.longest

    def get_max_length(self) -> int:
        return self.owner.context


class SlotCache(Cache):
    """`slots` rows of at most `context` positions for each of `layers` layers. Set `plan` before each forward pass."""

    plan: Plan

    def __init__(self, layers: int, slots: int, context: int):
        self.slots, self.context = slots, context
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row over another."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                if buffer is not None:
                    buffer[target, :, :length] = buffer[source, :, :length]


def plan_decode(positions: list[int], device: torch.device) -> Plan:
    """The plan of one new token in each of the rows 0 to n - 1, at `positions`."""
    rows = torch.arange(len(positions), device=device)
    return Plan(slice(0, len(positions)), rows, torch.tensor(positions, device=device), None, max(positions) + 1)


def plan_prefill(rows: list[int], starts: list[int], lengths: list[int], device: torch.device) -> Plan:
    """The plan of `lengths[i]` new tokens in row `rows[i]` from `starts[i]` on, queries padded to the longest."""
    row = torch.tensor(rows, device=device)
    start, length = torch.tensor(starts, device=device), torch.tensor(lengths, device=device)
    width = max(lengths)
    query = torch.arange(width, device=device)
    index, offset = (query < length[:, None]).nonzero(as_tuple=True)
    longest = max(s + n for s, n in zip(starts, lengths, strict=True))
    return Plan(row, row[index], start[index] + offset, index * width + offset, longest)
