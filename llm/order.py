"""The order of the rows: a seeded permutation of each epoch that can be entered anywhere at no cost.

Position p of the endless stream of rows lies in epoch p // N, where N is the number of rows, and there names row
permutation_epoch(p % N). Global batch k is positions k*B to (k+1)*B - 1, so it is the same set for any number of
workers, and a batch that an epoch's end leaves short is filled from the next epoch.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 4


def batch_rows(step: int, global_batch: int, num_rows: int, seed: int) -> np.ndarray:
    """Row ids of global batch `step` (counted from 0). Shape (global_batch,), int64."""
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    return stream_rows(positions, num_rows, seed)


def stream_rows(positions: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Row ids at `positions` of the endless stream. Same shape as `positions`, int64."""
    epochs, places = np.divmod(positions, num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permute(places[here], num_rows, _mix(np.uint64(seed), epoch))
    return rows


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
