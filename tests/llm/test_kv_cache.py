from __future__ import annotations

import random

import pytest
import torch

from llm.kv_cache import BLOCK, Plan, SlotCache, plan_decode, plan_prefill
from llm.prefixes import Prefixes

CPU = torch.device("cpu")
HEADS, SIZE = 2, 4


def cache_of(rows: int, width: int, *, slots: int = 8, limit: int = 64 * BLOCK) -> SlotCache:
    """A cache of one layer, with its buffers made."""
    cache = SlotCache(1, slots, limit, CPU)
    cache.reserve(rows, width, 0)
    write(cache, plan_decode(torch.tensor([0]), 1), torch.zeros(1, HEADS, 1, SIZE))
    return cache


def write(cache: SlotCache, plan: Plan, states: torch.Tensor) -> torch.Tensor:
    cache.plan = plan
    keys, values = cache.update(states, states + 1, 0)
    torch.testing.assert_close(values[keys != 0], keys[keys != 0] + 1)
    return keys


def numbers(start: int, count: int) -> torch.Tensor:
    """States (1, HEADS, count, SIZE) that say their position."""
    return torch.arange(start, start + count).float()[None, None, :, None].expand(1, HEADS, count, SIZE) + 1


def content(cache: SlotCache, row: int, length: int) -> list[float]:
    return cache.layers[0].buffers[0].rows[row, 0, :length, 0].tolist()


def fill(cache: SlotCache, row: int, length: int, offset: int = 0) -> list[float]:
    write(cache, plan_prefill([row], [0], [length], CPU), numbers(offset, length))
    return content(cache, row, length)


def test_rows_are_written_where_each_is_and_read_to_the_longest():
    cache = cache_of(3, 32)
    states = torch.cat([numbers(100, 3), numbers(200, 3)])
    read = write(cache, plan_prefill([2, 0], [0, 5], [3, 2], CPU), states)
    assert read.shape == (2, HEADS, 7, SIZE)
    assert read[0, 0, :3, 0].tolist() == [101, 102, 103]
    assert read[1, 0, 5:, 0].tolist() == [201, 202]  # the third query is padding, and nowhere
    assert content(cache, 0, 8)[7] == 0


def test_a_batch_of_neighbours_is_read_in_place():
    cache = cache_of(4, 32)
    buffer = cache.layers[0].buffers[0].rows
    for plan in [plan_decode(torch.tensor([3, 4]), 5), plan_prefill([1, 2], [0, 0], [2, 2], CPU)]:
        read = write(cache, plan, torch.ones(2, HEADS, 2 if plan.source is not None else 1, SIZE))
        assert read.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_it_starts_empty_and_grows_within_its_limit():
    cache = SlotCache(1, 8, 20 * BLOCK, CPU)
    assert cache.positions == 0
    cache.reserve(1, BLOCK, 0)
    assert cache.positions == BLOCK
    written = []
    for rows, width in [(2, 2 * BLOCK), (8, 2 * BLOCK), (1, 20 * BLOCK), (5, 4 * BLOCK), (2, 10 * BLOCK)]:
        used = min(BLOCK, width) if written else 0
        cache.reserve(rows, width, used)
        assert cache.rows >= rows
        assert cache.width >= width
        assert cache.positions <= cache.limit
        assert not written or content(cache, 0, BLOCK) == written
        written = written or fill(cache, 0, BLOCK)


def test_moving_a_row_copies_it():
    cache = cache_of(2, 32)
    written = fill(cache, 1, 20)
    cache.move(1, 0, 20)
    assert content(cache, 0, 20) == written


class TestPrefixes:
    def test_what_one_row_held_another_gets(self):
        cache = cache_of(2, 64)
        prefixes = Prefixes(cache, 8)
        text = list(range(40))
        written = fill(cache, 0, 40)
        prefixes.keep([(0, prefixes.chain(text))])
        fill(cache, 0, 40, offset=500)
        begun = prefixes.chain([*text[:32], 7, 8, 9])
        assert prefixes.held(begun) == 2
        prefixes.restore([(1, begun)])
        assert content(cache, 1, 32) == written[:32]

    def test_a_chain_goes_on_and_stands_for_all_before_it(self):
        prefixes = Prefixes(cache_of(1, 64), 8)
        text = list(range(64))
        assert len(prefixes.chain(text[:63])) == 3
        assert prefixes.chain(text, prefixes.chain(text[:40])) == prefixes.chain(text)
        other = prefixes.chain([99, *text[1:]])
        assert not set(other) & set(prefixes.chain(text))

    def test_the_least_recently_used_goes_first_and_chains_stay_whole(self):
        cache = cache_of(1, 3 * BLOCK)
        prefixes = Prefixes(cache, 4)
        first, second, third = (prefixes.chain([n] * 2 * BLOCK) for n in range(3))
        prefixes.keep([(0, first)])
        prefixes.keep([(0, second)])
        prefixes.restore([(0, first)])
        prefixes.keep([(0, third[:1])])
        assert [prefixes.held(chain) for chain in (first, second, third)] == [2, 1, 1]

    def test_more_than_there_is_room_for_keeps_the_beginning(self):
        prefixes = Prefixes(cache_of(1, 8 * BLOCK), 3)
        chain = prefixes.chain([1] * 8 * BLOCK)
        prefixes.keep([(0, chain)])
        assert prefixes.held(chain) == 3

    def test_two_texts_in_one_step_may_take_each_others_place(self):
        cache = cache_of(2, BLOCK)
        prefixes = Prefixes(cache, 1)
        fill(cache, 0, BLOCK)
        written = fill(cache, 1, BLOCK, offset=50)
        chains = [prefixes.chain([n] * BLOCK) for n in range(2)]
        prefixes.keep(enumerate(chains))
        assert [prefixes.held(chain) for chain in chains] == [0, 1]
        prefixes.restore([(0, chains[1])])
        assert content(cache, 0, BLOCK) == written

    def test_rows_come_before_what_is_kept(self):
        cache = cache_of(1, 4 * BLOCK, slots=4, limit=8 * BLOCK)
        prefixes = Prefixes(cache, 4)
        chain = prefixes.chain([1] * 4 * BLOCK)
        prefixes.keep([(0, chain)])
        assert prefixes.held(chain) == 4
        prefixes.leave(8 * BLOCK)
        cache.reserve(2, 4 * BLOCK, 4 * BLOCK)
        assert (prefixes.held(chain), cache.positions) == (0, 8 * BLOCK)

    def test_dropped_prefixes_are_gone_and_their_room_is_free(self):
        prefixes = Prefixes(cache_of(1, 4 * BLOCK), 4)
        chains = [prefixes.chain([n] * 4 * BLOCK) for n in range(2)]
        prefixes.keep([(0, chains[0])])
        prefixes.drop()
        assert prefixes.held(chains[0]) == 0
        prefixes.keep([(0, chains[1])])
        assert prefixes.held(chains[1]) == 4

    @pytest.mark.parametrize("seed", range(2))
    def test_random_use_gives_every_row_its_own_text(self, seed):
        """Every position's state is a number made of all ids up to it: a block of another text would show."""
        rng = random.Random(seed)
        cache = cache_of(4, 6 * BLOCK, limit=40 * BLOCK)
        prefixes = Prefixes(cache, 10)
        for _ in range(100):
            row = rng.randrange(4)
            text = [rng.randrange(2)] * BLOCK * rng.randint(0, 4) + [
                rng.randrange(3) for _ in range(rng.randint(1, 30))
            ]
            chain = prefixes.chain(text)
            held = prefixes.held(chain)
            prefixes.restore([(row, chain[:held])] if held else [])
            start = held * BLOCK
            states = _states(text)
            write(cache, plan_prefill([row], [start], [len(text) - start], CPU), states[:, :, start:])
            assert content(cache, row, len(text)) == states[0, 0, :, 0].tolist()
            prefixes.keep([(row, chain)])
            assert len(prefixes) <= cache.blocks <= 10
            if rng.random() < 0.05:
                prefixes.drop()


def _states(text: list[int]) -> torch.Tensor:
    values, value = [], 1
    for token in text:
        value = (value * 31 + token + 7) % 65_521
        values.append(float(value))
    return torch.tensor(values)[None, None, :, None].expand(1, HEADS, len(text), SIZE)
