"""Plots in text against drawings made by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.plots import FILLS, braille, duration, number, parts_bar, span, sparkline, thinned

NUMBERS = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60)


def dots(lines: list[str]) -> list[str]:
    """The dots of braille lines, a character each."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    cells = [[ord(letter) - 0x2800 for letter in line] for line in lines]
    return ["".join("#" if cell & bit else "." for cell in line for bit in row) for line in cells for row in bits]


def test_a_line_rises_from_the_lower_edge_to_the_upper_one():
    assert dots(braille([0, 1, 2, 3], width=2, height=1)) == ["...#", "..#.", ".#..", "#..."]


def test_a_step_is_joined_without_a_gap():
    assert dots(braille([0, 0, 7, 7], width=2, height=2)) == ["..##", *["..#."] * 6, "##.."]


def test_few_values_are_stretched_over_the_whole_width():
    assert dots(braille([0, 3], width=2, height=1)) == ["...#", "..#.", ".#..", "#..."]


def test_many_values_are_averaged():
    assert braille([0, 2, 1, 3, 2, 4, 3, 5], width=2, height=1) == braille([1, 2, 3, 4], width=2, height=1)


def test_what_never_changes_is_a_line_in_the_middle():
    assert dots(braille([5] * 4, width=2, height=1)) == ["....", "....", "####", "...."]


def test_what_is_not_finite_leaves_a_gap():
    assert dots(braille([0, math.nan, math.inf, 3], width=2, height=1)) == ["...#", "....", "....", "#..."]
    assert sparkline([0, math.nan, 1], 3) == "▁ █"


@given(NUMBERS, st.integers(1, 30), st.integers(1, 6))
def test_a_plot_has_the_size_that_was_asked_for(values, width, height):
    assert [len(line) for line in braille(values, width, height)] == [width] * height
    assert len(sparkline(values, width)) == min(width, len(values))


def test_a_mean_is_of_what_is_finite():
    assert thinned([1, 3, math.nan, 5], 2) == [2, 5]
    assert span([math.nan, 2, math.inf, 1]) == (1, 2)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=len(FILLS)), st.integers(1, 200))
def test_the_parts_of_a_bar_fill_it_and_are_off_by_less_than_one(values, width):
    parts = {str(at): value for at, value in enumerate(values)}
    taken = parts_bar(parts, width)
    assert list(taken) == list(parts)
    if (whole := sum(values)) > 0:
        assert sum(taken.values()) == width
        assert all(abs(taken[name] - value / whole * width) < 1.001 for name, value in parts.items())


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (3.14159, "3.142"), (0.0125, "0.0125"), (3e-5, "3.0e-05"), (4096, "4096"), (12_345, "12.35k"),
     (2.5e6, "2.50M"), (989.5e12, "989.50T"), (-0.5, "-0.5"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value, said):
    assert number(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-1, "0 s"), (0.4, "0 s"), (42, "42 s"), (60, "1 min"), (200, "3 min 20 s"), (7_500, "2 h 5 min"),
     (270_000, "3 d 3 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, said):
    assert duration(seconds) == said
