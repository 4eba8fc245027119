"""Which steps must not count, and which batches are left out for them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.guard import batch_of, left_out_before, verdict, with_window

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)).map(lambda one: (one[0], sum(one))), max_size=6)


@given(SPANS)
def test_steps_take_all_batches_outside_the_windows_in_order(spans):
    windows = []
    for first, end in spans:
        windows = with_window(windows, first, end)
    left_out = {batch for span in spans for batch in range(*span)}
    outside = [batch for batch in range(100) if batch not in left_out][:40]
    assert [batch_of(step, windows) for step in range(40)] == outside
    told = [batch for batch in outside for batch in left_out_before(batch, windows)]
    assert told == sorted(batch for batch in left_out if batch < outside[-1])


def test_a_window_moves_no_step_before_it():
    assert [batch_of(step, [(5, 8)]) for step in range(7)] == [0, 1, 2, 3, 4, 8, 9]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_no_number_never_counts(loss, norm):
    assert verdict(loss, norm, [], None)


def test_a_loss_far_above_the_last_ones_is_a_spike():
    history = [2.0, 2.2] * 16  # mean 2.1, standard deviation 0.1
    assert verdict(2.9, 1.0, history, 8.0) is None
    assert "9 standard deviations above 2.100" in str(verdict(3.0, 1.0, history, 8.0))
    assert verdict(3.0, 1.0, history, None) is None, "where no bound is set"
    assert verdict(30.0, 1.0, history[:20], 8.0) is None, "with too little to compare with"


def test_noise_around_a_loss_that_stands_still_is_no_spike():
    assert verdict(1.05, 1.0, [1.0] * 64, 10.0) is None
    assert verdict(1.11, 1.0, [1.0] * 64, 10.0)
    assert verdict(2.0, 1.0, [9.0] * 200 + [1.0, 1.1] * 64, 8.0), "older losses are forgotten"
