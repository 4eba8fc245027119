"""The order of the rows."""

import numpy as np
import pytest

from llm.order import Mixture, batch_rows, mix_of, mixed_rows, permute, spread, stream_rows

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


def test_a_mixture_has_its_weights_to_the_row_and_every_row_equally_often():
    mixture = mix_of(np.array([100, 40, 7]), np.array([0.5, 0.25, 0.25]), positions=80, max_epochs=4)
    assert mixture.share.tolist() == [40, 20, 20]
    assert mixture.epochs(80).tolist() == pytest.approx([0.4, 0.5, 20 / 7])
    rows = mixed_rows(np.arange(160), mixture, seed=3)
    assert [int(((rows >= low) & (rows < high)).sum()) for low, high in ((0, 100), (100, 140), (140, 147))] == [
        80,
        40,
        40,
    ]
    times = np.bincount(rows, minlength=147)
    assert set(times[:100]) == {0, 1}, "no row twice before each came once"
    assert set(times[100:140]) == {1}
    assert set(times[140:]) == {5, 6}
    whole = mixed_rows(np.arange(80), mixture, seed=3)
    assert mixed_rows(np.array([79, 5]), mixture, seed=3).tolist() == whole[[79, 5]].tolist(), "entered anywhere"


def test_a_source_that_is_all_read_leaves_its_share_to_the_others():
    mixture = mix_of(np.array([10, 1000, 1000]), np.array([2.0, 1.0, 1.0]), positions=100, max_epochs=2)
    assert mixture.share.tolist() == [20, 40, 40]
    with pytest.raises(ValueError, match=r"100 rows are wanted, 60 are there in 2 epochs"):
        mix_of(np.array([10, 20, 1000]), np.array([2.0, 1.0, 0.0]), positions=100, max_epochs=2)


def test_shares_are_whole_and_none_is_lost():
    for positions in range(1, 40):
        share = mix_of(np.array([100, 100, 100]), np.array([1, 1, 1e-3]), positions, max_epochs=4).share
        assert share.sum() == positions
        assert np.abs(share - positions * np.array([1, 1, 1e-3]) / 2.001).max() < 1


def test_mixture_batches_are_cut_from_one_stream():
    mixture = Mixture(np.array([10, 4]), np.array([5, 5]))
    batches = np.concatenate([batch_rows(step, 4, 14, 1, mixture) for step in range(10)])
    assert batches.tolist() == mixed_rows(np.arange(40), mixture, 1).tolist()


def test_spread_is_even_and_in_order():
    assert spread(4, 10).tolist() == [0, 2, 5, 7]
    assert spread(9, 3).tolist() == [0, 1, 2]
    assert spread(3, 0).tolist() == []
