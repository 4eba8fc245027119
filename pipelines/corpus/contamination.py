"""Text that a model will be measured on must not be among what it is trained on.

A document is contaminated if it shares a run of `ngram` words with a text that will be evaluated (Brown et al.
2020, arXiv 2005.14165, appendix C: 13 words, 8 at least). An evaluated text of FEWEST to `ngram` - 1 words counts as a
whole; a shorter one can't be told from ordinary speech, and counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipelines.corpus.words import ngram_hashes, word_hashes
from pipelines.partitions import read_columns, write_table

FEWEST = 8  # words
TEXTS_AT_ONCE = 512

Runs = dict[int, np.ndarray]  # hashes of runs of words, sorted, by their length in words


def runs_of(texts: Iterable[str], ngram: int) -> Runs:
    """The runs of words by which `texts` are known."""
    found: dict[int, list[np.ndarray]] = {}
    for batch in _batches(texts):
        words, offsets = word_hashes(batch)
        lengths = np.diff(offsets)
        for n in range(min(FEWEST, ngram), ngram + 1):
            grams, first = ngram_hashes(words, offsets, n)
            chosen = lengths >= n if n == ngram else lengths == n
            found.setdefault(n, []).append(grams[np.repeat(chosen, np.diff(first))])
    runs = {n: np.unique(np.concatenate(parts)) for n, parts in found.items()}
    return {n: hashes for n, hashes in runs.items() if len(hashes)}


def shared(texts: list[str], runs: Runs) -> np.ndarray:
    """How many of their runs of words each of `texts` has in common with `runs`, int64 (texts,)."""
    counts = np.zeros(len(texts), dtype=np.int64)
    if not runs:
        return counts
    words, offsets = word_hashes(texts)
    for n, known in runs.items():
        grams, first = ngram_hashes(words, offsets, n)
        place = np.minimum(np.searchsorted(known, grams), len(known) - 1)
        hits = np.concatenate([[0], np.cumsum(known[place] == grams)])
        counts += hits[first[1:]] - hits[first[:-1]]
    return counts


def write_runs(runs: Runs, path: Path) -> None:
    """Save `runs` as an Arrow file."""
    length = np.concatenate(
        [np.full(len(hashes), n, np.uint8) for n, hashes in runs.items()] or [np.empty(0, np.uint8)]
    )
    write_table(path, length=length, hash=np.concatenate([*runs.values(), np.empty(0, np.uint64)]))


def read_runs(path: Path) -> Runs:
    """The runs in `path`."""
    columns = read_columns(path)
    return {int(n): columns["hash"][columns["length"] == n] for n in np.unique(columns["length"])}


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == TEXTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
