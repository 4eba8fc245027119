"""Documents to rows."""

import numpy as np
import pytest

from llm.packing import COLUMNS, IGNORED, RowReader, pack, pack_groups, pack_whole, read_index, write_index
from llm.shardfile import Shards, write_shard

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


@pytest.mark.parametrize("row_tokens", [1, 3, 8, 100])
def test_pack_uses_every_token_once(row_tokens):
    lengths = np.random.default_rng(0).integers(1, 50, size=200)
    index = pack(lengths, row_tokens)
    taken = {
        (int(d), int(s) + k)
        for d, s, n in zip(index.document, index.start, index.length, strict=True)
        for k in range(n)
    }
    assert len(taken) == index.length.sum() == lengths.sum()
    per_row = np.bincount(index.row, index.length)
    assert (per_row[:-1] == row_tokens).all()
    assert 0 < per_row[-1] <= row_tokens


def test_pack_of_nothing_has_no_rows():
    assert pack(np.array([], dtype=np.int64), 4).num_rows == 0


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


def test_filler_rows_carry_no_target(shard_set):
    rows = RowReader(shard_set, pad_id=0).read(np.array([-1]))
    assert (rows["labels"] == IGNORED).all()
    assert (rows["input_ids"] == 0).all()


def test_targets_counts_what_the_labels_hold(shard_set):
    reader = RowReader(shard_set, pad_id=0)
    every = np.arange(reader.index.num_rows)
    counted = (reader.read(every)["labels"] != IGNORED).sum(axis=1)
    assert reader.index.targets(every).tolist() == counted.tolist()


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
