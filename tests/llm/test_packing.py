"""Documents to rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.losses import next_token_nats
from llm.packing import (
    COLUMNS,
    IGNORED,
    PACKINGS,
    PackingIndex,
    RowReader,
    pack,
    pack_best_fit,
    pack_groups,
    pack_whole,
    read_index,
    write_index,
)
from llm.presets import PRESETS, build_model, llama_config
from llm.shardfile import Shards, write_shard
from tests.models import tiny_tokenizer

DOCUMENTS = [[10, 11, 12], [20, 21, 22, 23, 24], [30], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


@pytest.fixture
def shard_set(tmp_path):
    arrays = [np.array(document, dtype=np.uint32) for document in DOCUMENTS]
    write_shard(tmp_path / "shard-00000-000.arrow", ["a", "b"], arrays[:2], 300)
    write_shard(tmp_path / "shard-00001-000.arrow", ["c", "d"], arrays[2:], 300)
    write_index(pack(Shards(tmp_path).lengths(), 4), tmp_path / "packing.arrow")
    return tmp_path


def test_pack_cuts_a_row_every_four_tokens():
    index = pack(np.array([3, 5, 1, 9]), 4)
    pieces = list(zip(index.row, index.document, index.start, index.length, strict=True))
    assert pieces == [(0, 0, 0, 3), (0, 1, 0, 1), (1, 1, 1, 4), (2, 2, 0, 1), (2, 3, 0, 3), (3, 3, 3, 4), (4, 3, 7, 2)]


@given(lengths=st.lists(st.integers(1, 40), max_size=60), row_tokens=st.integers(1, 30), window=st.integers(1, 60))
def test_packing_uses_every_token_once_and_fills_every_row_but_the_last(lengths, row_tokens, window):
    lengths = np.array(lengths, dtype=np.int64)
    for index in (pack(lengths, row_tokens), pack_best_fit(lengths, row_tokens, window)):
        assert sorted(tokens_in(index)) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
        per_row = np.bincount(index.row, index.length)
        assert (per_row[:-1] == row_tokens).all()
        assert ((per_row[-1:] > 0) & (per_row[-1:] <= row_tokens)).all()
        assert (np.diff(index.row) >= 0).all()
        assert index.targets(np.arange(index.num_rows)).sum() == lengths.sum() - len(index.row)


def tokens_in(index: PackingIndex) -> list[tuple[int, int]]:
    """(document, place in it) of every token of the rows."""
    pieces = zip(index.document.tolist(), index.start.tolist(), index.length.tolist(), strict=True)
    return [(document, start + n) for document, start, length in pieces for n in range(length)]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5, 3, 6, 2, 4], [[(2, 0, 6), (3, 0, 2)], [(0, 0, 5), (1, 0, 3)], [(4, 0, 4)]]),  # the piece that fills
        ([2, 5, 1, 1], [[(1, 0, 5), (0, 0, 2), (3, 0, 1)], [(2, 0, 1)]]),  # the two that fill
        ([1, 1, 1, 3, 4], [[(4, 0, 4), (3, 0, 3), (2, 0, 1)], [(1, 0, 1), (0, 0, 1)]]),
        ([4, 2, 3], [[(0, 0, 4), (2, 0, 3), (1, 0, 1)], [(1, 1, 1)]]),  # one piece is no two
        ([5, 2, 2, 2], [[(0, 0, 5), (3, 0, 2), (2, 0, 1)], [(1, 0, 2), (2, 1, 1)]]),  # a cut, and its remainder
        ([6, 5], [[(0, 0, 6), (1, 0, 2)], [(1, 2, 3)]]),
        ([19, 2, 5], [[(0, 0, 8)], [(0, 8, 8)], [(2, 0, 5), (0, 16, 3)], [(1, 0, 2)]]),  # whole rows first
        ([8], [[(0, 0, 8)]]),
    ],
)
def test_best_fit_by_hand(lengths, rows):
    index = pack_best_fit(np.array(lengths), 8)
    pieces = list(zip(index.document, index.start, index.length, strict=True))
    assert [[pieces[n] for n in index.pieces(row)] for row in range(index.num_rows)] == rows


def test_what_fills_no_row_of_a_window_goes_to_the_next():
    index = pack_best_fit(np.array([6, 5, 3, 5]), 8, window=2)
    pieces = list(zip(index.row, index.document, index.start, index.length, strict=True))
    assert pieces == [(0, 0, 0, 6), (0, 1, 0, 2), (1, 3, 0, 5), (1, 2, 0, 3), (2, 1, 2, 3)]


@pytest.fixture(scope="module")
def web() -> np.ndarray:
    """Lengths like those of web pages in tokens: log-normal, median 400, one in seventeen over 2,048."""
    return np.random.default_rng(0).lognormal(np.log(400), 1.05, size=40_000).astype(np.int64) + 1


def test_best_fit_cuts_few_documents(web):
    assert 0.05 < np.mean(web > 2048) < 0.07
    before, after = (cut_needlessly(make(web, 2048), web) for make in (pack, pack_best_fit))
    assert before > 0.2
    assert after < before / 20


def cut_needlessly(index: PackingIndex, lengths: np.ndarray) -> float:
    """Share of the documents that are cut though a row could hold them."""
    pieces = np.bincount(index.document, minlength=len(lengths))
    return float(np.mean(pieces[lengths <= index.row_tokens] > 1))


def test_the_pieces_of_a_row_lie_near_one_another(web):
    index = pack_best_fit(web, 2048, window=2000)
    first = np.searchsorted(index.row, np.arange(index.num_rows))
    spread = np.maximum.reduceat(index.document, first) - np.minimum.reduceat(index.document, first)
    assert np.mean(spread < 2000) > 0.99


@pytest.mark.parametrize("make", PACKINGS.values())
def test_packing_of_nothing_has_no_rows(make):
    assert make(np.array([], dtype=np.int64), 4).num_rows == 0


def test_index_survives_its_file(tmp_path):
    index = pack(np.array([3, 5, 1, 9]), 4)
    write_index(index, tmp_path / "packing.arrow")
    again = read_index(tmp_path / "packing.arrow")
    assert again.row_tokens == 4
    for column in COLUMNS:
        assert getattr(again, column).tolist() == getattr(index, column).tolist()


def test_rows_hold_tokens_positions_and_labels(shard_set):
    rows = RowReader(shard_set, pad_id=0).read(np.array([0, 2, 4]))
    assert rows["input_ids"].tolist() == [[10, 11, 12, 20], [30, 40, 41, 42], [47, 48, 0, 0]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 0, 1]]
    x = IGNORED
    assert rows["labels"].tolist() == [[x, 11, 12, x], [x, x, 41, 42], [x, 48, x, x]]


def test_rows_that_are_not_isolated_are_one_text(shard_set):
    rows = RowReader(shard_set, pad_id=0, isolated=False).read(np.array([0, 2, 4]))
    assert rows["input_ids"].tolist() == [[10, 11, 12, 20], [30, 40, 41, 42], [47, 48, 0, 0]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1]], "but the padding is alone"
    x = IGNORED
    assert rows["labels"].tolist() == [[x, 11, 12, 20], [x, 40, 41, 42], [x, 48, x, x]]


def test_filler_rows_carry_no_target(shard_set):
    rows = RowReader(shard_set, pad_id=0).read(np.array([-1]))
    assert (rows["labels"] == IGNORED).all()
    assert (rows["input_ids"] == 0).all()


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("make", PACKINGS.values())
def test_targets_counts_what_the_labels_hold(shard_set, make, isolated):
    write_index(make(Shards(shard_set).lengths(), 4), shard_set / "packing.arrow")
    reader = RowReader(shard_set, 0, isolated)
    every = np.arange(reader.index.num_rows)
    counted = (reader.read(every)["labels"] != IGNORED).sum(axis=1)
    assert reader.targets(every).tolist() == counted.tolist()
    assert reader.targets(np.array([-1, 0, -1])).tolist() == [0, counted[0], 0]


def test_shards_read_as_one_sequence_of_documents(shard_set):
    shards = Shards(shard_set)
    assert shards.lengths().tolist() == [3, 5, 1, 9]
    assert shards.tokens(1, 2, 3).tolist() == [22, 23, 24]
    assert shards.tokens(3, 0, 2).tolist() == [40, 41]
    assert shards.flat(10).tolist() == [10, 11, 12, 20, 21, 30, 40, 41, 42, 43, 44]  # as large a share of both shards


def test_ids_beyond_16_bits_survive(tmp_path):
    write_shard(tmp_path / "shard-00000-000.arrow", ["a"], [np.array([70_000, 1], dtype=np.uint32)], 100_000)
    assert Shards(tmp_path).tokens(0, 0, 2).tolist() == [70_000, 1]


def test_whole_documents_go_where_they_leave_the_least_room():
    index = pack_whole(np.array([5, 6, 3, 2, 4, 4]), np.array([1, 2, 3, 4, 5, 6]), 8)
    rows = {row: index.document[index.row == row].tolist() for row in range(index.num_rows)}
    assert rows == {0: [0, 2], 1: [1, 3], 2: [4, 5]}
    assert index.targets(np.arange(3)).tolist() == [4, 6, 11]


def test_whole_documents_are_never_cut_and_all_placed():
    lengths = np.random.default_rng(0).integers(1, 33, size=300)
    index = pack_whole(lengths, lengths, 32)
    assert sorted(index.document.tolist()) == list(range(300))
    assert (index.start == 0).all()
    assert index.length.tolist() == lengths[index.document].tolist()
    assert np.bincount(index.row, index.length).max() <= 32
    assert index.num_rows <= 1.1 * np.ceil(lengths.sum() / 32)


def test_labels_can_differ_from_the_tokens(tmp_path):
    x = IGNORED
    tokens, labels = np.array([10, 11, 12, 13], dtype=np.uint32), np.array([x, x, 12, 3])
    write_shard(tmp_path / "shard-00000-000.arrow", ["a"], [tokens], 300, [labels])
    write_index(pack_whole(np.array([4]), np.array([2]), 6), tmp_path / "packing.arrow")
    rows = RowReader(tmp_path, pad_id=0).read(np.array([0]))
    assert rows["labels"].tolist() == [[x, x, 12, 3, x, x]]
    assert rows["input_ids"].tolist() == [[10, 11, 12, 13, 0, 0]]


def test_a_group_of_documents_is_a_row():
    index = pack_groups(np.array([3, 2, 4]), np.array([0, 0, 1]), np.array([1, 0, 1]), 8)
    assert index.num_rows == 2
    assert list(index.pieces(0)) == [0, 1]
    assert index.targets(np.arange(2)).tolist() == [1, 1]


# Training on packed rows


@pytest.fixture
def packed(tmp_path):
    """A shard set of random documents, packed by best fit into rows of 32: cut ones, whole ones, a short last row."""
    draw = np.random.default_rng(0)
    arrays = [draw.integers(3, 300, size=size, dtype=np.uint32) for size in (70, 20, 9, 17, 30, 5, 28, 3)]
    write_shard(tmp_path / "shard-00000-000.arrow", [str(n) for n in range(len(arrays))], arrays, 320)
    write_index(pack_best_fit(Shards(tmp_path).lengths(), 32), tmp_path / "packing.arrow")
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return build_model(llama_config(PRESETS["micro"], tiny_tokenizer()), seed=0)


def gradient(model, nats) -> torch.Tensor:
    """Of every weight, one after another."""
    return torch.cat([one.flatten() for one in torch.autograd.grad(nats, list(model.parameters()))])


def packed_gradient(model, reader: RowReader) -> torch.Tensor:
    """Of the summed loss of all rows of a set, as pretraining computes it."""
    columns = reader.read(np.arange(reader.index.num_rows))
    batch = {name: torch.from_numpy(values).long() for name, values in columns.items()}
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return gradient(model, next_token_nats(logits, batch["labels"]))


def plain_gradient(model, text: np.ndarray) -> torch.Tensor:
    """Of the summed loss of one text alone, by the loss of transformers."""
    ids = torch.from_numpy(text.astype(np.int64))[None]
    return gradient(model, model(ids, labels=ids).loss * (len(text) - 1))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_training_on_packed_rows_equals_training_on_the_pieces_one_by_one(packed, model):
    reader, shards = RowReader(packed, pad_id=1), Shards(packed)
    index = reader.index
    assert np.bincount(index.row).max() > 2
    assert (index.start > 0).any()
    pieces = [shards.tokens(*one) for one in zip(index.document, index.start, index.length, strict=True)]
    expected = sum(plain_gradient(model, piece) for piece in pieces if len(piece) > 1)
    assert difference(packed_gradient(model, reader), expected) < 1e-5
    assert difference(packed_gradient(model, RowReader(packed, 1, isolated=False)), expected) > 1e-2


@pytest.mark.parametrize("isolated", [True, False])
def test_padding_adds_nothing_to_a_gradient(packed, model, isolated):
    assert RowReader(packed, 1).index.length.sum() % 32, "the last row is padded"
    one, other = (packed_gradient(model, RowReader(packed, pad_id, isolated)) for pad_id in (1, 2))
    assert torch.equal(one, other)


def test_training_on_rows_that_are_not_isolated_equals_training_on_them_as_texts(packed, model):
    reader = RowReader(packed, 1, isolated=False)
    every = np.arange(reader.index.num_rows)
    sizes = np.bincount(reader.index.row, reader.index.length).astype(int)
    texts = [row[:size] for row, size in zip(reader.read(every)["input_ids"], sizes, strict=True)]
    expected = sum(plain_gradient(model, text) for text in texts if len(text) > 1)
    assert difference(packed_gradient(model, reader), expected) < 1e-5
