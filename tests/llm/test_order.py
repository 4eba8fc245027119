"""The order of the rows."""

import numpy as np
import pytest

from llm.order import batch_rows, permute, stream_rows

GOLDEN = [13, 39, 28, 2, 74, 38, 35, 57]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permutation_names_every_row_once(size):
    image = permute(np.arange(size), size, key=12345)
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_can_be_entered_anywhere():
    whole = permute(np.arange(1000), 1000, key=7)
    assert permute(np.array([998, 3, 500]), 1000, key=7).tolist() == whole[[998, 3, 500]].tolist()


def test_permutation_is_no_identity_and_follows_its_key():
    orders = [permute(np.arange(500), 500, key=key) for key in range(20)]
    assert len({order.tobytes() for order in orders}) == 20
    fixed_points = np.mean([np.sum(order == np.arange(500)) for order in orders])
    assert fixed_points < 4  # a random permutation has one on average


def test_batches_make_epochs_without_gap_or_repeat():
    num_rows, batch = 10, 4
    rows = np.concatenate([batch_rows(step, batch, num_rows, seed=1) for step in range(10)])
    epochs = rows.reshape(4, num_rows)
    assert all(sorted(epoch.tolist()) == list(range(num_rows)) for epoch in epochs)
    assert len({epoch.tobytes() for epoch in epochs}) == 4, "each epoch has an order of its own"


def test_seed_decides_the_order():
    assert batch_rows(0, 8, 100, seed=1).tolist() == batch_rows(0, 8, 100, seed=1).tolist()
    assert batch_rows(0, 8, 100, seed=1).tolist() != batch_rows(0, 8, 100, seed=2).tolist()


def test_order_does_not_change_between_versions():
    # A run resumed by a later version must go on in the order in which it began.
    assert stream_rows(np.arange(8), 100, seed=1337).tolist() == GOLDEN
