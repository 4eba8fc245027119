"""Small plots in text, for terminals: lines of braille, sparklines of blocks, bars of parts. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

LEVELS = "▁▂▃▄▅▆▇█"
# Told apart without colours too.
FILLS = "█▓▒░╳╱·"
# Bits of the eight dots of a braille cell (U+2800), by row from above, left and right.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def braille(values: Sequence[float], width: int, height: int) -> list[str]:
    """A line through `values`, evenly spaced from left to right: `height` lines of `width` characters.

    The highest value touches the upper edge and the lowest the lower one. Values that aren't finite are left out.
    """
    columns = _stretched(thinned(values, 2 * width), 2 * width)
    low, high = span(columns)
    rows = [_row(value, low, high, 4 * height) for value in columns]
    cells = [[0x2800] * width for _ in range(height)]
    for x, (top, bottom) in enumerate(_strokes(rows)):
        for y in range(top, bottom + 1):
            cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    return ["".join(map(chr, line)) for line in cells]


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as one line of at most `width` blocks, the lowest the flattest; a gap where none is finite."""
    columns = thinned(values, width)
    low, high = span(columns)
    steps = len(LEVELS) - 1
    shares = [(value - low) / (high - low) if high > low else 0.0 for value in columns]
    return "".join(LEVELS[round(share * steps)] if math.isfinite(share) else " " for share in shares)


def parts_bar(parts: Mapping[str, float], width: int) -> dict[str, int]:
    """How many of `width` characters each part takes, by largest remainder, so that they fill it together."""
    whole = sum(parts.values())
    shares = {name: value / whole * width if whole > 0 else 0.0 for name, value in parts.items()}
    taken = {name: int(share) for name, share in shares.items()}
    missing = width - sum(taken.values()) if whole > 0 else 0
    for name in sorted(shares, key=lambda name: taken[name] - shares[name])[:missing]:
        taken[name] += 1
    return taken


def thinned(values: Sequence[float], columns: int) -> list[float]:
    """At most `columns` values: means of equal stretches, over what is finite in them."""
    count = min(columns, len(values))
    if not count:
        return []
    given = np.asarray(values, dtype=np.float64)
    begins, finite = np.arange(count) * len(given) // count, np.isfinite(given)
    counts = np.add.reduceat(finite.astype(np.int64), begins)
    sums = np.add.reduceat(np.where(finite, given, 0.0), begins)
    return [float(one / many) if many else math.nan for one, many in zip(sums, counts, strict=True)]


def span(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest of the values that are finite; zeros if none is."""
    given = np.asarray(values, dtype=np.float64)
    finite = given[np.isfinite(given)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def number(value: float) -> str:
    """A number in about seven characters, four digits of it: 12.35k, 0.0123, 3.0e-05."""
    if not math.isfinite(value):
        return str(value)
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.2f}{unit}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people say them, in two units: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    first = next((at for at, (_, size) in enumerate(units) if whole >= size), len(units) - 1)
    said = []
    for unit, size in units[first : first + 2]:
        said.append(f"{whole // size} {unit}")
        whole %= size
    return " ".join(said if not said[1:] or not said[1].startswith("0 ") else said[:1])


def _stretched(values: Sequence[float], columns: int) -> list[float]:
    """Fewer values than there are columns, with straight lines between them."""
    if not values:
        return [math.nan] * columns
    places = np.linspace(0.0, len(values) - 1.0, columns)
    return [float(value) for value in np.interp(places, np.arange(len(values)), values)]


def _row(value: float, low: float, high: float, rows: int) -> int | None:
    """The row of dots, from above, that a value falls on; None for none. What never changes lies in the middle."""
    if not math.isfinite(value):
        return None
    share = (value - low) / (high - low) if high > low else 0.5
    return round((1 - share) * (rows - 1))


def _strokes(rows: Sequence[int | None]) -> list[tuple[int, int]]:
    """First and last row of dots in each column, drawn up to where its neighbour on the left is."""
    strokes, before = [], None
    for row in rows:
        if row is None:
            strokes.append((0, -1))
        elif before is None or before == row:
            strokes.append((row, row))
        else:
            strokes.append((row, before - 1) if row < before else (before + 1, row))
        before = row
    return strokes
