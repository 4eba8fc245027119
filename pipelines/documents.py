"""Documents as every later stage reads them: in order, and parted into training text and held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import mirror


def parts(folder: Path) -> list[Path]:
    """The Parquet files of a documents folder, in order."""
    return [folder / name for name in mirror.files(folder) if name.endswith(".parquet")]


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document belongs to the held-out share: decided by its id, which is a hash, alone."""
    return int(document_id[:8], 16) < share * 2**32


def read(part: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """One Parquet file, a bounded batch at a time."""
    with pq.ParquetFile(mirror.here(part)) as file:
        yield from file.iter_batches(batch_size=256, columns=columns)
