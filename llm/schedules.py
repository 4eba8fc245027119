"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, decay: str, final: float) -> float:
    """The rate at `step` (from 0): linear warm-up to `peak`, then down to `final` x peak at the last step.

    `decay` is "cosine" (Loshchilov and Hutter 2017, arXiv 1608.03983), "linear" or "none".
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "none": 1.0}[decay]
    return peak * (final + (1 - final) * left)
