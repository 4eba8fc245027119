"""How long the parts of a step take, and which rank is slower than the others."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median

import torch

STEPS = 20  # over which ranks are compared
SLOW = 1.5  # times the others' median
LOST_S = 1.0  # seconds that it must cost in these steps: of a few milliseconds each, noise is half


class Clock:
    """Seconds in each phase of a step; on a GPU as it works them off, without holding it up."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []

    def begin(self) -> None:
        """Forget the step before."""
        self._marks = []

    def at(self, phase: str) -> None:
        """What comes now belongs to `phase`."""
        self._marks.append((phase, self._now()))

    def end(self) -> None:
        """The last phase is over."""
        self.at("")

    def seconds(self) -> dict[str, float]:
        """Of each phase, added up. On a GPU it must have worked off the step."""
        found = {phase: 0.0 for phase, _ in self._marks if phase}
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            found[phase] += self._between(begun, ended)
        return found

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begun, ended) -> float:
        if not self._on_gpu:
            return ended - begun
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000


@dataclass
class SlowRanks:
    """Compares how long each rank takes for what it does by itself, over STEPS steps at a time."""

    sums: list[float] = field(default_factory=list)
    steps: int = 0

    def add(self, seconds: list[float]) -> tuple[int, float] | None:
        """A step's seconds by rank. After every STEPS-th step the slowest rank and how many times the others' median
        it took, if that is SLOW or more and costs LOST_S.
        """
        self.sums = [old + new for old, new in zip(self.sums or [0.0] * len(seconds), seconds, strict=True)]
        self.steps += 1
        if self.steps < STEPS or len(seconds) < 2:
            return None
        sums, self.sums, self.steps = self.sums, [], 0
        slowest = max(range(len(sums)), key=sums.__getitem__)
        others = median(sums[:slowest] + sums[slowest + 1 :])
        slow = sums[slowest] >= max(SLOW * others, others + LOST_S)
        return (slowest, sums[slowest] / max(others, 1e-9)) if slow else None
