"""Small shard sets: what the stages after pretraining stream into training, in the same form as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm.packing import PackingIndex, write_index
from llm.shardfile import write_shard


@dataclass(frozen=True)
class Piece:
    """One isolated sequence of a row: ids (T,), and a label for each of them (`llm.packing.IGNORED` for none)."""

    id: str
    ids: list[int]
    labels: list[int]


def write_rows(
    folder: Path, pieces: list[Piece], vocab_size: int, index: Callable[[np.ndarray], PackingIndex]
) -> PackingIndex:
    """Write a shard set of `pieces`. `index` makes the packing index of their lengths (pieces,)."""
    folder.mkdir()
    write_shard(
        folder / "shard-00000-000.arrow",
        [piece.id for piece in pieces],
        [np.array(piece.ids, dtype=np.uint32) for piece in pieces],
        vocab_size,
        [np.array(piece.labels, dtype=np.int32) for piece in pieces],
    )
    packed = index(np.array([len(piece.ids) for piece in pieces], dtype=np.int64))
    write_index(packed, folder / "packing.arrow")
    return packed
