"""The order of the rows: a seeded permutation of each epoch that can be entered anywhere at no cost.

Position p of the endless stream of rows lies in epoch p // N, where N is the number of rows, and there names row
permutation_epoch(p % N). Global batch k is positions k*B to (k+1)*B - 1, so it is the same set for any number of
workers, and a batch that an epoch's end leaves short is filled from the next epoch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROUNDS = 4


def batch_rows(step: int, global_batch: int, num_rows: int, seed: int, mixture: Mixture | None = None) -> np.ndarray:
    """Row ids of global batch `step` (counted from 0). Shape (global_batch,), int64.

    Without a `mixture` all rows count the same: each comes once an epoch.
    """
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    return mixed_rows(positions, mixture, seed) if mixture else stream_rows(positions, num_rows, seed)


def stream_rows(positions: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Row ids at `positions` of the endless stream. Same shape as `positions`, int64."""
    epochs, places = np.divmod(positions, num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permute(places[here], num_rows, _mix(np.uint64(seed), epoch))
    return rows


class Mixture(NamedTuple):
    """How a stream is mixed from sources whose rows follow one another. Shapes (sources,), int64.

    rows: how many each source has. share: how many of a round's rows come from it; after share.sum() rows the next
    round begins. A source whose share is more than its rows comes more than once, each time in another order.
    """

    rows: np.ndarray
    share: np.ndarray

    def epochs(self, positions: int) -> np.ndarray:
        """How often each source has been read after `positions` rows of the stream, if they end a round. Floats."""
        return positions / self.share.sum() * self.share / np.maximum(self.rows, 1)


def mix_of(rows: np.ndarray, weights: np.ndarray, positions: int, max_epochs: float) -> Mixture:
    """The mixture that gives each source its weight of `positions` rows exactly, but for less than a row.

    Shapes (sources,). No source is read more than `max_epochs` times: what is over goes to the others by their
    weights. ValueError if all together have too little.
    """
    most = np.floor(rows * max_epochs).astype(np.int64)
    if most[weights > 0].sum() < positions:
        raise ValueError(
            f"{positions:,} rows are wanted, {most[weights > 0].sum():,} are there in {max_epochs:g} epochs"
        )
    share, free = np.zeros(len(rows), dtype=np.int64), weights > 0
    while True:
        wanted = _apportion(positions - int(share.sum()), np.where(free, weights, 0))
        over = free & (wanted > most)
        if not over.any():
            return Mixture(rows, share + wanted)
        share[over], free = most[over], free & ~over


def _apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` in whole parts by weight: the largest remainders are rounded up (Hamilton's method)."""
    exact = total * weights / max(weights.sum(), 1e-300)
    parts = np.floor(exact).astype(np.int64)
    short = int(total - parts.sum()) if weights.any() else 0
    parts[np.argsort(parts - exact, kind="stable")[:short]] += 1
    return parts


def mixed_rows(positions: np.ndarray, mixture: Mixture, seed: int) -> np.ndarray:
    """Row ids at `positions` of the endless mixed stream. Same shape as `positions`, int64.

    A round's places are permuted; each belongs to a source, and is the n-th of that source's places in all rounds so
    far; the source's own rows are permuted anew each time that it is read.
    """
    ends = np.cumsum(mixture.share)
    rounds = positions // ends[-1]
    place = stream_rows(positions, int(ends[-1]), seed)
    source = np.searchsorted(ends, place, side="right")
    nth = rounds * mixture.share[source] + place - (ends - mixture.share)[source]
    rows = np.empty_like(positions)
    for number in np.unique(source):
        own = source == number
        first = mixture.rows[:number].sum()
        rows[own] = first + stream_rows(nth[own], int(mixture.rows[number]), _source_seed(seed, number))
    return rows


def _source_seed(seed: int, source: int) -> int:
    return int(_mix(np.uint64(seed), source + 1) >> np.uint64(1))


def spread(count: int, total: int) -> np.ndarray:
    """`count` of the numbers 0 to `total` - 1, spread evenly: shape (min(count, total),), int64."""
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


def permute(index: np.ndarray, size: int, key: int | np.uint64) -> np.ndarray:
    """Images of `index` (values in [0, size)) under the permutation of [0, size) that `key` names.

    A balanced Feistel network (Luby and Rackoff 1988) over the next even power of two, walked along its cycle until
    it falls inside [0, size) (Black and Rogaway 2002): no table, O(1) for any entry.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    image = _feistel(index.astype(np.uint64), half, key)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], half, key)
    return image.astype(np.int64)


def _feistel(value: np.ndarray, half: int, key: int | np.uint64) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = value >> np.uint64(half), value & mask
    for turn in range(ROUNDS):
        left, right = right, left ^ (_mix(right, _mix(np.uint64(key), turn)) & mask)
    return (left << np.uint64(half)) | right


def _mix(value, key):
    """SplitMix64's finaliser (Steele et al. 2014) over value and key; wraps modulo 2^64 on purpose."""
    with np.errstate(over="ignore"):
        z = np.uint64(value) + (np.uint64(key) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
