"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, steps: int, decay: str, final: float, decay_share: float = 1.0
) -> float:
    """The rate at `step` (from 0): linear warm-up to `peak`, then down to `final` x peak at the last step.

    `decay` is "cosine" (Loshchilov and Hutter 2017, arXiv 1608.03983), "linear", "wsd" (warm-up, stable, decay: down
    in a line in the last `decay_share` of the steps alone; Hu et al. 2024, arXiv 2404.06395) or "none".
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    first = max(warmup_steps, steps - round(decay_share * steps)) if decay == "wsd" else warmup_steps
    done = min(1.0, max(0.0, (step - first) / max(1, steps - 1 - first)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if decay == "cosine" else 1 - done
    return peak if decay == "none" else peak * (final + (1 - final) * left)
