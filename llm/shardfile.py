"""Token shards: Arrow files of documents as token ids, mapped into memory rather than read.

A shard set is a folder: `shard-*.arrow` (columns `id`, `tokens` and, where a token's label is not the token itself,
`labels`; one row a document) and `packing.arrow`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa

BLOCK = 1 << 20  # tokens looked at together


def id_type(vocab_size: int) -> pa.DataType:
    """The narrowest type that holds every id."""
    return pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()


def token_lists(documents: list[np.ndarray], vocab_size: int) -> pa.LargeListArray:
    """The token ids of documents, one list each."""
    offsets = pa.array(np.concatenate([[0], np.cumsum([len(document) for document in documents])]), pa.int64())
    flat = np.concatenate(documents) if documents else np.empty(0, np.uint32)
    return pa.LargeListArray.from_arrays(offsets, pa.array(flat, type=id_type(vocab_size)))


def write_shard(
    path: Path,
    ids: list[str],
    documents: list[np.ndarray],
    vocab_size: int,
    labels: list[np.ndarray] | None = None,
) -> None:
    """Write one shard. `documents[i]` holds the token ids of document `ids[i]`, `labels[i]` a label for each."""
    tokens = token_lists(documents, vocab_size)
    table = pa.table({"id": pa.array(ids), "tokens": tokens})
    if labels is not None:
        flat = pa.array(np.concatenate(labels), pa.int32())
        table = table.append_column("labels", pa.LargeListArray.from_arrays(tokens.offsets, flat))
    write_arrow(path, table)


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as an Arrow file of one batch, so that its columns are mapped in one piece."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))


def check_boundaries(tokens: pa.LargeListArray, special: list[int], end: int) -> np.ndarray:
    """Tokens in each document, int64 (documents,).

    ValueError unless the id `end` ends every document and no other of the ids `special` is anywhere.
    """
    offsets, values = tokens.offsets.to_numpy(), tokens.values.to_numpy()
    is_special = np.zeros(int(values.max(initial=0)) + 1, dtype=bool)
    is_special[[one for one in special if one < len(is_special)]] = True
    # In blocks: an index into an array is copied to 8 bytes a number first.
    starts = range(0, len(values), BLOCK)
    blocks = [start + np.flatnonzero(is_special[values[start : start + BLOCK]]) for start in starts]
    found = np.concatenate([np.empty(0, np.int64), *blocks])
    if not (np.array_equal(found, offsets[1:] - 1) and (values[found] == end).all()):
        raise ValueError(f"the id {end} must end every document, and there may be no special id anywhere else")
    return np.diff(offsets)


def read_arrow(path: Path) -> pa.Table:
    """An Arrow file as a table over mapped memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Shards:
    """All shards of a set as one sequence of documents, in the order of the files' names."""

    def __init__(self, folder: Path):
        tables = [read_arrow(path) for path in sorted(folder.glob("shard-*.arrow"))]
        lists = [table.column("tokens").chunk(0) for table in tables]
        self._values = [part.values.to_numpy() for part in lists]
        self._offsets = [part.offsets.to_numpy() for part in lists]
        self._labels = [
            table.column("labels").chunk(0).values.to_numpy() if "labels" in table.column_names else values
            for table, values in zip(tables, self._values, strict=True)
        ]
        self._first = np.cumsum([0] + [len(part) for part in lists])

    def lengths(self) -> np.ndarray:
        """Tokens in each document, int64."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets] or [np.empty(0, np.int64)])

    def tokens(self, document: int, start: int, length: int) -> np.ndarray:
        """Ids `start` to `start + length` of a document, without copying."""
        shard, begin = self._find(document, start)
        return self._values[shard][begin : begin + length]

    def labels(self, document: int, start: int, length: int) -> np.ndarray:
        """The labels of those ids, which are the ids themselves unless the set says otherwise."""
        shard, begin = self._find(document, start)
        return self._labels[shard][begin : begin + length]

    def _find(self, document: int, start: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return shard, int(self._offsets[shard][document - self._first[shard]]) + start

    def flat(self, limit: int) -> np.ndarray:
        """About `limit` ids of the set: as large a share of every shard, from its beginning."""
        share = min(1.0, limit / max(1, sum(map(len, self._values))))
        taken = [values[: math.ceil(share * len(values))] for values in self._values]
        return np.concatenate(taken or [np.empty(0, np.uint16)])
