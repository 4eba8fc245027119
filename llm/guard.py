"""Steps that must not count: which those are, and which global batches are left out because of them.

A window is a range of global batches [first, end) that no step takes. Step k takes the k-th batch outside all windows,
so a window moves later steps alone: a checkpoint from before it goes on after it.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from statistics import fmean, pstdev

HISTORY = 128  # losses that a loss is compared with
FEWEST = 32  # without so many there is nothing to compare with
LEAST_DEVIATION = 0.01  # nats a token: below it losses are noise, and the standard deviation of a few of them too

Window = tuple[int, int]


def batch_of(step: int, windows: Sequence[Window]) -> int:
    """The global batch that `step` takes. `windows`: ascending and disjoint."""
    batch = step
    for first, end in windows:
        if batch < first:
            break
        batch += end - first
    return batch


def with_window(windows: Sequence[Window], first: int, end: int) -> list[Window]:
    """The windows and one more, which may overlap them: ascending and disjoint."""
    everything = list(windows)
    insort(everything, (first, end))
    merged = everything[:1]
    for one in everything[1:]:
        if one[0] <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], one[1]))
        else:
            merged.append(one)
    return merged


def left_out_before(batch: int, windows: Sequence[Window]) -> range:
    """The batches left out between `batch` and the one that is trained on before it."""
    return next((range(first, end) for first, end in windows if end == batch), range(0))


def verdict(loss: float, norm: float, history: Sequence[float], sigmas: float | None) -> str | None:
    """Why a step must not count, None if it may.

    loss: nats a target; norm: of the gradient before clipping; history: the losses before it, newest last. A loss is a
    spike where it is `sigmas` standard deviations above the mean of the last 128 (None: it never is).
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    recent = list(history)[-HISTORY:]
    if sigmas is None or len(recent) < FEWEST:
        return None
    mean, deviation = fmean(recent), max(pstdev(recent), LEAST_DEVIATION)
    if loss <= mean + sigmas * deviation:
        return None
    return f"the loss is {loss:.3f}, {(loss - mean) / deviation:.0f} standard deviations above {mean:.3f}"
