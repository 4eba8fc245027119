"""Parts of a step by the clock, and slow ranks by their sums."""

import time

import pytest
import torch

from llm.clocks import STEPS, Clock, SlowRanks


def test_phases_add_up_and_a_new_step_begins_at_nothing():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        clock.begin()
        for phase, seconds in [("forward", 0.02), ("backward", 0.03), ("forward", 0.02)]:
            clock.at(phase)
            time.sleep(seconds)
        clock.end()
    assert clock.seconds() == pytest.approx({"forward": 0.04, "backward": 0.03}, abs=0.015)


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
