"""Parts of a step by the clock, and slow ranks by their sums."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from llm import clocks
from llm.clocks import STEPS, Clock, SlowRanks


def test_phases_add_up_and_a_new_step_begins_at_nothing(monkeypatch):
    now = itertools.accumulate(itertools.cycle([5.0, 2.0, 3.0, 2.0]))  # between steps, and each phase
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=now.__next__))
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        clock.begin()
        for phase in ("forward", "backward", "forward"):
            clock.at(phase)
        clock.end()
        assert clock.seconds() == {"forward": 4.0, "backward": 3.0}


def test_the_slow_rank_is_told_every_so_many_steps_and_the_others_are_not():
    ranks = SlowRanks()
    told = [ranks.add([0.1, 0.1, 0.16, 0.1]) for _ in range(2 * STEPS)]
    assert [place for place, one in enumerate(told) if one] == [STEPS - 1, 2 * STEPS - 1]
    assert told[STEPS - 1] == (2, pytest.approx(1.6))
    assert not any(ranks.add([0.1, 0.14]) for _ in range(2 * STEPS))
    assert not any(ranks.add([0.01, 0.05]) for _ in range(2 * STEPS)), "it costs less than a second"


def test_one_slow_step_makes_no_slow_rank_and_a_rank_alone_is_never_one():
    ranks = SlowRanks()
    assert not any(ranks.add([0.1, 0.3 if step == 3 else 0.1]) for step in range(STEPS))
    assert not any(SlowRanks().add([9.0]) for _ in range(STEPS))
