"""The command line that the benchmarks share: which figures, at which scale, in how many pairs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.bench import memory, texts
from tests.bench.measure import PAIRS, Figure, Invalid, report, shown

CPUS = 2


class Scale(NamedTuple):
    """How much less than the whole is measured, and in how many pairs. size: 1 for a measurement."""

    size: float
    pairs: int

    def of(self, whole: int) -> int:
        return max(1, round(whole * self.size))


Measure = Callable[[Scale], Iterable[Figure]]


def run(prog: str, figures: Mapping[str, Measure], arguments: list[str], path: Path) -> int:
    """Measure the figures asked for, all of them by default, and write them to `path`: 1 if one is invalid, else 0."""
    chosen = _parsed(prog, figures, arguments)
    scale = Scale(chosen.scale, chosen.pairs)
    print(f"text: {texts.described()}; scale {scale.size:g}, {scale.pairs} pairs", flush=True)
    measured: list[Figure] = []
    invalid = []
    for name in chosen.figures or figures:
        try:
            for figure in figures[name](scale):
                print(figure.line(), shown(figure), sep="\n", flush=True)
                measured.append(figure)
        except (Invalid, memory.Failed) as error:
            invalid.append(name)
            print(f"BENCH {name} invalid: {error}", flush=True)
        about = {"text": texts.described(), "scale": scale.size, "pairs": scale.pairs, "invalid": invalid}
        report(measured, about, path)  # each time, for whoever ends it before all are measured
    return 1 if invalid else 0


def on_few_cpus() -> None:
    """Keep this process, and all that it will start, to two CPUs, where the system can do that."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])


def _parsed(prog: str, figures: Mapping[str, Measure], arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {prog}")
    parser.add_argument("figures", nargs="*", choices=[[], *figures], metavar="FIGURE", help=", ".join(figures))
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"at least {PAIRS} for a measurement")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the work, to see whether it works at all")
    return parser.parse_args(arguments)
