"""Documents to rows: the packing index, and the rows that it names.

A row is one training sequence. Its pieces of documents never see each other: positions begin at 0 in each piece, and
the first token of a piece is no target, because nothing before it belongs to it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from llm.shardfile import Shards, read_arrow

IGNORED = -100  # a label that carries no loss: torch's cross-entropy default
COLUMNS = ("row", "document", "start", "length", "loss_tokens")


@dataclass(frozen=True)
class PackingIndex:
    """Which pieces of which documents make each row, ordered by row.

    row, document, start, length: one entry a piece, int64. `document` counts over the whole shard set, `start` and
    `length` are tokens inside it. `loss_tokens` counts the piece's tokens that carry loss.
    """

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    loss_tokens: np.ndarray
    row_tokens: int

    @property
    def num_rows(self) -> int:
        return int(self.row[-1]) + 1 if len(self.row) else 0

    def pieces(self, row: int) -> range:
        """Entries of `row`."""
        first, end = np.searchsorted(self.row, [row, row + 1])
        return range(int(first), int(end))

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens of each of `rows` carry loss. Same shape, int64."""
        first, end = np.searchsorted(self.row, rows), np.searchsorted(self.row, rows + 1)
        total = np.concatenate([[0], np.cumsum(self.loss_tokens)])
        return total[end] - total[first]


def pack(lengths: np.ndarray, row_tokens: int) -> PackingIndex:
    """Lay documents of `lengths` tokens end to end and cut every `row_tokens`: no token is dropped or repeated.

    Only the last row can be short. All tokens carry loss but the first of each piece, which nothing predicts. Shape of
    `lengths`: (documents,), all positive.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - lengths
    cuts = np.union1d(starts, np.arange(0, total, row_tokens, dtype=np.int64))
    document = np.searchsorted(ends, cuts, side="right")
    length = np.diff(np.append(cuts, total))
    return PackingIndex(cuts // row_tokens, document, cuts - starts[document], length, length - 1, row_tokens)


def joined(parts: list[PackingIndex], documents: list[int]) -> PackingIndex:
    """The rows of several indices one after another; part i is over `documents[i]` documents, that follow likewise."""
    rows = np.cumsum([0, *(part.num_rows for part in parts)])
    firsts = np.cumsum([0, *documents])
    columns = {
        "row": [part.row + row for part, row in zip(parts, rows, strict=False)],
        "document": [part.document + first for part, first in zip(parts, firsts, strict=False)],
        **{name: [getattr(part, name) for part in parts] for name in ("start", "length", "loss_tokens")},
    }
    return PackingIndex(
        **{name: np.concatenate(values) for name, values in columns.items()}, row_tokens=parts[0].row_tokens
    )


def pack_groups(lengths: np.ndarray, group: np.ndarray, loss_tokens: np.ndarray, row_tokens: int) -> PackingIndex:
    """One row a group: documents of the same number in `group` (0, 1, ..., ascending) stand in it one after another.

    Shapes (documents,). `loss_tokens` is what each document counts for in its row's targets.
    """
    return PackingIndex(group, np.arange(len(group)), np.zeros_like(group), lengths, loss_tokens, row_tokens)


def pack_whole(lengths: np.ndarray, loss_tokens: np.ndarray, row_tokens: int) -> PackingIndex:
    """Put whole documents into as few rows as best-fit finds: each goes where it leaves the least room (Johnson 1973).

    For conversations, which must not be cut. Shapes (documents,); every length at most `row_tokens`.
    """
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    row = np.empty(len(lengths), dtype=np.int64)
    num_rows = 0
    for document, length in enumerate(lengths.tolist()):
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            bisect.insort(rooms, (row_tokens, num_rows))
            num_rows += 1
        left, row[document] = rooms.pop(place)
        bisect.insort(rooms, (left - length, int(row[document])))
    order = np.argsort(row, kind="stable")
    return PackingIndex(row[order], order, np.zeros_like(order), lengths[order], loss_tokens[order], row_tokens)


def write_index(index: PackingIndex, path: Path) -> None:
    """Save `index` as an Arrow file that is read without copying."""
    table = pa.table({name: getattr(index, name) for name in COLUMNS})
    table = table.replace_schema_metadata({"row_tokens": str(index.row_tokens)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_index(path: Path) -> PackingIndex:
    """The index in `path`, mapped into memory."""
    table = read_arrow(path)
    columns = {name: table.column(name).combine_chunks().to_numpy() for name in table.column_names}
    return PackingIndex(**columns, row_tokens=int(table.schema.metadata[b"row_tokens"]))


class RowReader:
    """Rows of a shard set, by id: reads token shards through their packing index, and holds nothing but maps."""

    def __init__(self, folder: Path, pad_id: int):
        self.index = read_index(folder / "packing.arrow")
        self._shards = Shards(folder)
        self._pad_id = pad_id

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`input_ids`, `position_ids` and `labels` of `rows`, each (len(rows), row_tokens) int32.

        labels[t] belongs to token t: the token itself where it is a target (the loss shifts them), or what the shard
        set says instead, and IGNORED elsewhere. An id below 0 gives an empty row: padding without a target.
        """
        shape = (len(rows), self.index.row_tokens)
        batch = {
            "input_ids": np.full(shape, self._pad_id, dtype=np.int32),
            "position_ids": np.zeros(shape, dtype=np.int32),
            "labels": np.full(shape, IGNORED, dtype=np.int32),
        }
        for place, row in enumerate(rows):
            if row >= 0:
                self._fill(batch, place, int(row))
        return batch

    def _fill(self, batch: dict[str, np.ndarray], place: int, row: int) -> None:
        at = 0
        for piece in self.index.pieces(row):
            start, length = int(self.index.start[piece]), int(self.index.length[piece])
            tokens = self._shards.tokens(int(self.index.document[piece]), start, length)
            batch["input_ids"][place, at : at + length] = tokens
            batch["position_ids"][place, at : at + length] = np.arange(length)
            labels = self._shards.labels(int(self.index.document[piece]), start, length)
            batch["labels"][place, at + 1 : at + length] = labels[1:]
            at += length
        # Padding counts on from 0 like a piece of its own, so that no real token attends to it.
        batch["position_ids"][place, at:] = np.arange(self.index.row_tokens - at)
