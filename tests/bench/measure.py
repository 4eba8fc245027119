"""Comparing two ways of doing the same work, and saying what came out.

A figure is a ratio, higher is better. Both arms are warmed up once, then take turns in pairs, each going first in
every other pair. The value is the ratio of the medians; the interval goes from the least to the greatest ratio within
a pair, and always holds the value.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from cluster.local import CHECKOUT, usable_cpus
from llm.files import write_json

PAIRS = 5
FOLDER = CHECKOUT / "runs" / "bench"


class Invalid(Exception):
    """The two arms didn't do the same work, so that a figure would say nothing."""


class Turn(NamedTuple):
    """One run of an arm. seconds: how long it took. made: what it made, as far as that has to be compared."""

    seconds: float
    made: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What a benchmark says. `detail`: absolute figures, with their units in the names."""

    name: str
    value: float
    low: float
    high: float
    bar: float
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.value >= self.bar

    def line(self) -> str:
        """How it is printed."""
        spread = f"[{self.low:.3g}, {self.high:.3g}]"
        return f"BENCH {self.name} {self.value:.3g} {spread} bar {self.bar:g} {'met' if self.met else 'short'}"


def compare(
    name: str,
    bar: float,
    ours: Callable[[], Turn],
    theirs: Callable[[], Turn],
    agree: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    pairs: int = PAIRS,
) -> Figure:
    """How many times as fast as `theirs` is `ours`.

    `agree` is given what each made, raises Invalid where that isn't the same, and returns what is to be told of it.
    """
    arms = (ours, theirs)
    facts = agree(ours().made, theirs().made)
    turns = [_pair(arms, number) for number in range(pairs)]
    for mine, other in turns:
        facts = agree(mine.made, other.made)
    seconds = {
        side: [pair[arm].seconds for pair in turns] for arm, side in enumerate(("our_seconds", "their_seconds"))
    }
    return Figure(name, *ratio(*seconds.values()), bar, {**facts, **seconds})


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """How many times as long `theirs` took: of the medians, the least and the greatest within a pair."""
    pairs = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    return median(theirs) / median(ours), min(pairs), max(pairs)


def at_most(name: str, measured: float, limit: float, detail: dict[str, Any]) -> Figure:
    """A figure that has to stay below `limit`, turned over: 1 at the limit, more below it."""
    value = limit / measured
    return Figure(name, value, value, value, 1.0, detail)


def report(figures: list[Figure], about: dict[str, Any], path: Path) -> None:
    """Write the figures and what they were measured on as JSON to `path`."""
    where = {"cpus": usable_cpus(), "machine": platform.platform(), "python": platform.python_version()}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(figure), "met": figure.met} for figure in figures]
    write_json(path, {"when": when, **where, **about, "figures": rows})


def shown(figure: Figure) -> str:
    """What the figure is made of, for whoever wants absolute numbers."""
    return f"  {figure.name}: {json.dumps(figure.detail)}"


def _pair(arms: tuple[Callable[[], Turn], Callable[[], Turn]], number: int) -> tuple[Turn, Turn]:
    if number % 2:
        second, first = arms[1](), arms[0]()
        return first, second
    return arms[0](), arms[1]()
