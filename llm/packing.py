"""Documents to rows: the packing index, and the rows that it names.

A row is one training sequence. Its pieces of documents don't see each other: positions begin at 0 in each piece, and
the first token of a piece is no target, because nothing before it belongs to it. Rows can also be read with their
pieces not isolated: as one text, in which each token but the first is a target.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from llm.shardfile import Shards, read_arrow

IGNORED = -100  # a label that carries no loss: torch's cross-entropy default
COLUMNS = ("row", "document", "start", "length", "loss_tokens")
# Documents that are packed together, consecutive ones: memory is bounded, and a row's pieces lie in few shards.
WINDOW = 1 << 16


@dataclass(frozen=True)
class PackingIndex:
    """Which pieces of which documents make each row, ordered by row.

    row, document, start, length: one entry a piece, int64. `document` counts over the whole shard set, `start` and
    `length` are tokens inside it. `loss_tokens` counts the piece's tokens that carry loss while it is isolated.
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

    def targets(self, rows: np.ndarray, isolated: bool = True) -> np.ndarray:
        """How many tokens of each of `rows` carry loss; none of an id below 0. Same shape, int64."""
        first, end = np.searchsorted(self.row, rows), np.searchsorted(self.row, rows + 1)
        total = np.concatenate([[0], np.cumsum(self.loss_tokens)])
        joints = 0 if isolated else np.maximum(end - first - 1, 0)
        return total[end] - total[first] + joints


def pack(lengths: np.ndarray, row_tokens: int) -> PackingIndex:
    """Lay documents of `lengths` tokens end to end and cut every `row_tokens`: no token is dropped or repeated.

    Only the last row can be short. All tokens carry loss but the first of each piece, which nothing predicts. Shape of
    `lengths`: (documents,), all positive.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    # Two ascending runs, which a stable sort only merges.
    cuts = np.sort(np.concatenate([ends - lengths, np.arange(0, total, row_tokens)]), kind="stable")
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    return _index(np.stack([cuts, np.diff(np.append(cuts, total))]), lengths, row_tokens)


def pack_best_fit(lengths: np.ndarray, row_tokens: int, window: int = WINDOW) -> PackingIndex:
    """Fill rows with documents of `lengths` tokens and cut few of them: no token is dropped or repeated.

    Only the last row can be short. Tokens carry loss as in `pack`. After Ding et al. 2024 (arXiv 2404.10830), who pad
    what best fit leaves free; here a document is cut for it, and the remainder carried on. In `window` documents:

    1. A document gives whole rows from its beginning while it has them. What is left of it is a piece.
    2. A row takes the longest piece that waits. Then, until it is full: the piece that fills it exactly, or else the
       two that do, the most unequal; or else the longest that fits.
    3. Where none fits, the shortest is cut: its beginning fills the row, the remainder waits again.
    4. The pieces of a row that stays short go to the next window.

    Of pieces of one length the latest comes first. It takes sorting, and for each piece some operations on a number of
    at most twice as many bits as a row has tokens. Shape of `lengths`: (documents,), all positive.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    placed, carried = [], np.empty((2, 0), dtype=np.int64)
    for begin in range(0, len(lengths), window):
        here = slice(begin, begin + window)
        whole, pieces = _whole_rows(starts[here], lengths[here], row_tokens)
        pieces = _fill_rows(np.concatenate([carried, pieces], axis=1), row_tokens)
        full = np.searchsorted(np.cumsum(pieces[1]), pieces[1].sum() // row_tokens * row_tokens, side="right")
        placed += [whole, pieces[:, :full]]
        carried = pieces[:, full:]
    return _index(np.concatenate([*placed, carried], axis=1), lengths, row_tokens)


PACKINGS = {"best_fit": pack_best_fit, "concatenate": pack}


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
    """Rows of a shard set, by id: reads token shards through their packing index, and holds nothing but maps.

    isolated: whether the pieces of a row are sequences of their own. If not, positions count through the row, and the
    first token of each piece but the row's first is a target too.
    """

    def __init__(self, folder: Path, pad_id: int, isolated: bool = True):
        self.index = read_index(folder / "packing.arrow")
        self._shards = Shards(folder)
        self._pad_id = pad_id
        self._isolated = isolated

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """How many labels of each of `rows` aren't IGNORED. Same shape, int64."""
        return self.index.targets(rows, self._isolated)

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
            where, alone = slice(at, at + length), self._isolated or at == 0
            document = int(self.index.document[piece])
            batch["input_ids"][place, where] = self._shards.tokens(document, start, length)
            batch["position_ids"][place, where] = np.arange(length) + (0 if alone else at)
            batch["labels"][place, where] = self._shards.labels(document, start, length)
            if alone:
                batch["labels"][place, at] = IGNORED
            at += length
        # Padding counts on from 0 like a piece of its own, so that no real token attends to it.
        batch["position_ids"][place, at:] = np.arange(self.index.row_tokens - at)


def split_rows(columns: dict[str, np.ndarray], part: int, parts: int) -> dict[str, np.ndarray]:
    """A rank's part of the columns of rows, each (R, T) to (R, T / parts).

    `labels` become `targets`, moved by one before the cut: targets[:, t] is what the model is to say at t, so that the
    token after a part's last is asked for too.
    """
    columns = dict(columns)
    if (labels := columns.pop("labels", None)) is not None:
        after = np.full_like(labels[:, :1], IGNORED)
        columns["targets"] = np.concatenate([labels[:, 1:], after], axis=1)
    return {name: np.split(values, parts, axis=1)[part] for name, values in columns.items()}


# Packing. Pieces are an array (2, pieces): the place of the first token in all documents laid end to end, and the
# tokens.


def _index(pieces: np.ndarray, lengths: np.ndarray, row_tokens: int) -> PackingIndex:
    """The index of pieces that fill rows one after another."""
    first, length = pieces
    ends = np.cumsum(lengths, dtype=np.int64)
    document = np.searchsorted(ends, first, side="right")
    start = first - (ends - lengths)[document]
    return PackingIndex((np.cumsum(length) - length) // row_tokens, document, start, length, length - 1, row_tokens)


def _whole_rows(starts: np.ndarray, lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of documents that are whole rows, and what is left of each document."""
    rows, left = np.divmod(lengths, row_tokens)
    nth = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    whole = np.repeat(starts, rows) + nth * row_tokens
    rest = np.stack([starts + rows * row_tokens, left])
    return np.stack([whole, np.full_like(whole, row_tokens)]), rest[:, left > 0]


def _fill_rows(pieces: np.ndarray, row_tokens: int) -> np.ndarray:
    """The same tokens in the order in which they fill rows; some pieces are cut for it. All shorter than a row."""
    waiting, firsts, lengths, room = _Waiting(pieces), [], [], row_tokens
    while waiting.lengths:
        for length in waiting.best(room) if room < row_tokens else (waiting.longest,):
            first, taken = waiting.take(length), min(length, room)
            if taken < length:
                waiting.put(first + taken, length - taken)
            firsts.append(first)
            lengths.append(taken)
            room -= taken
        room = room or row_tokens
    return np.array([firsts, lengths], dtype=np.int64)


class _Waiting:
    """Pieces that wait for a row. Which lengths there are is one whole number: bit n is set if a piece of n waits."""

    def __init__(self, pieces: np.ndarray):
        first, length = pieces
        there, counts = np.unique(length, return_counts=True)
        by_length = np.split(first[np.argsort(length, kind="stable")], np.cumsum(counts)[:-1])
        # Not strict: nothing is split into one empty part.
        self._firsts = defaultdict(list, {int(n): part.tolist() for n, part in zip(there, by_length, strict=False)})
        self._double = 2 * int(there.max(initial=0))
        bits = np.bincount(there, minlength=self._double + 1)
        self.lengths = _number(bits)
        self._mirrored = _number(bits[::-1])  # bit `_double` - n

    @property
    def longest(self) -> int:
        return self.lengths.bit_length() - 1

    def best(self, room: int) -> tuple[int, ...]:
        """Lengths of what goes next into a row with `room` left, in order. Only a single one can be longer."""
        if room >= 2 * self.longest:  # neither one nor two can fill it, or two of the longest do
            return (self.longest,)
        fitting = self.lengths & ((2 << room) - 1)
        if not fitting:
            return ((self.lengths & -self.lengths).bit_length() - 1,)
        longest = fitting.bit_length() - 1
        pair = (fitting & (self._mirrored >> (self._double - room))).bit_length() - 1
        if longest == room or pair < 0 or (2 * pair == room and len(self._firsts[pair]) == 1):
            return (longest,)
        return pair, room - pair

    def take(self, length: int) -> int:
        """The first token of the latest piece of that length."""
        firsts = self._firsts[length]
        first = firsts.pop()
        if not firsts:
            self._flip(length)
        return first

    def put(self, first: int, length: int) -> None:
        firsts = self._firsts[length]
        if not firsts:
            self._flip(length)
        firsts.append(first)

    def _flip(self, length: int) -> None:
        self.lengths ^= 1 << length
        self._mirrored ^= 1 << (self._double - length)


def _number(bits: np.ndarray) -> int:
    """The whole number with these bits, the lowest first."""
    return int.from_bytes(np.packbits(bits.astype(bool), bitorder="little").tobytes(), "little")
