"""Stretches of a parameter: where the values that one rank holds are among those that another saved.

A stretch begins at some value of a range of columns and goes on row by row, so it is a few boxes: the rest of its
first row, whole rows, and the beginning of its last. What two stretches have in common is what their boxes have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from llm.slices import Columns


class Stretch(NamedTuple):
    """`numel` values from `start` on, counted row by row in `columns`; None: in the whole, flattened."""

    start: int
    numel: int
    columns: Columns | None = None


class Box(NamedTuple):
    """`rows` rows of `width` columns, which lie in the stretch from `at` on."""

    at: int
    row: int
    rows: int
    column: int
    width: int


class Shared(NamedTuple):
    """A box that two stretches have in common, as each has it: values `begin` to `end`, in rows of `width`, of which
    `left` to `right` are meant."""

    begin: int
    end: int
    width: int
    left: int
    right: int


def overlaps(mine: Stretch, theirs: Stretch) -> Iterator[tuple[Shared, Shared]]:
    """What two stretches of one parameter have in common, as the first has it and as the second does."""
    width = next((stretch.columns.total for stretch in (mine, theirs) if stretch.columns), 1)
    for own in _boxes(mine, width):
        for other in _boxes(theirs, width):
            rows = max(own.row, other.row), min(own.row + own.rows, other.row + other.rows)
            columns = max(own.column, other.column), min(own.column + own.width, other.column + other.width)
            if rows[0] < rows[1] and columns[0] < columns[1]:
                yield _in(own, rows, columns), _in(other, rows, columns)


def _in(box: Box, rows: tuple[int, int], columns: tuple[int, int]) -> Shared:
    begin, end = (box.at + (row - box.row) * box.width for row in rows)
    left, right = (column - box.column for column in columns)
    return Shared(begin, end, box.width, left, right)


def _boxes(stretch: Stretch, width: int) -> Iterator[Box]:
    """`width`: columns of the whole matrix; 1 where it need not be known."""
    first, width, _ = stretch.columns or Columns(0, width, width)
    row, column = divmod(stretch.start, width)
    at = 0
    while at < stretch.numel:
        left = stretch.numel - at
        whole_rows = left // width if column == 0 else 0
        box = Box(at, row, max(1, whole_rows), first + column, width if whole_rows else min(width - column, left))
        yield box
        at, row, column = at + box.rows * box.width, row + box.rows, 0


def view(values: torch.Tensor, shared: Shared) -> torch.Tensor:
    """The box in values of the stretch from `shared.begin` on, (end - begin,) to (rows, columns)."""
    return values.view(-1, shared.width)[:, shared.left : shared.right]
