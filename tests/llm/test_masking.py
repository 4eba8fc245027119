"""BERT's masking by whole words: how much, what in its place, whose words, and the same whoever does it."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.masking import Kind, Masker, Masking, Plan, empty, joined, mask_rows
from llm.packing import IGNORED
from llm.vocabulary import END_OF_TEXT, MASK, encode_text, gpt2_tokenizer, train_tokenizer

TEXT = (
    "It's a truth, universally acknowledged: the naïve traveller had left 1234 café crèmes!\n\n"
    "    def add(self, first, second):\n        return first + second  # they've 日本語 🙂\n"
)
ROW_TOKENS = 200


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, vocab_size=330)


@pytest.fixture(scope="module")
def masker(tokenizer):
    return Masker(tokenizer.backend_tokenizer)


def positions_of(*lengths: int) -> np.ndarray:
    return np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])


def spelt(tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist())


def words_of(masker, tokenizer, ids: list[int]) -> list[str]:
    row = np.array(ids, dtype=np.int32)
    words = masker.words(row, positions_of(len(row)))
    return [spelt(tokenizer, row[words == word]) for word in range(words.max() + 1)]


# Words


def test_words_are_what_the_tokenizer_never_merges_over(masker, tokenizer):
    ids = encode_text(tokenizer, "It's 42 naïve\n\n  cats, 日本語!")
    expected = ["It", "'s", " 4", "2", " naïve", "\n\n ", " cats", ",", " 日本語", "!"]
    assert words_of(masker, tokenizer, ids) == expected
    assert len(ids) > len(expected)  # some have several tokens


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cn"]), max_size=80))
def test_words_are_the_tokenizers_own_parts(masker, tokenizer, text):
    if ids := encode_text(tokenizer, text):
        parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert words_of(masker, tokenizer, ids) == [text[begin:end] for _, (begin, end) in parts]


def test_a_word_ends_with_its_piece_and_at_a_special_token(masker, tokenizer):
    ids, end = encode_text(tokenizer, "traveller"), tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert len(ids) > 1
    half = len(ids) // 2
    cut = masker.words(np.array(ids), positions_of(half, len(ids) - half))
    assert cut.tolist() == [0] * half + [1] * (len(ids) - half)
    ended = masker.words(np.array([*ids, end, *ids]), positions_of(2 * len(ids) + 1))
    assert ended.tolist() == [0] * len(ids) + [-1] + [1] * len(ids)


def test_a_piece_may_begin_and_end_inside_a_character(masker, tokenizer):
    ids = encode_text(tokenizer, "🙂 🙂")[1:-1]
    assert len(ids) > 2
    assert masker.words(np.array(ids), positions_of(len(ids))).min() == 0


def test_tokenizers_of_another_sort_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers

    with pytest.raises(ValueError, match=re.escape(MASK)):
        Masker(gpt2_tokenizer())
    words = Tokenizer(models.WordLevel({MASK: 0, "a b": 1}, unk_token=MASK))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="byte-level"):
        Masker(words)


# What is hidden


def masked(masker, tokenizer, rate: float = 0.15, rows: int = 400, seed: int = 5):
    """Rows of the text over and over, and what became of them."""
    ids = (encode_text(tokenizer, TEXT) * 3)[:ROW_TOKENS]
    batch = {
        "input_ids": np.tile(np.array(ids, dtype=np.int32), (rows, 1)),
        "position_ids": np.tile(positions_of(90, ROW_TOKENS - 90), (rows, 1)),
        "labels": np.tile(np.array(ids, dtype=np.int32), (rows, 1)),
    }
    masking = Masking("", rate, 1.0, seed)
    numbers, kinds = np.arange(rows), np.full(rows, Kind.MASKED)
    tokens = np.full(rows, ROW_TOKENS - 2)
    plan = Plan(numbers, np.zeros_like(numbers), kinds, masking.targets(kinds, tokens, tokens))
    return batch, plan, mask_rows(batch, plan, masker, seed)


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_every_row_has_exactly_the_targets_that_were_planned(masker, tokenizer, rate):
    _, plan, after = masked(masker, tokenizer, rate, rows=50)
    assert plan.targets.tolist() == [round(rate * (ROW_TOKENS - 2))] * 50
    assert (after["labels"] != IGNORED).sum(axis=1).tolist() == plan.targets.tolist()


def within(count: int, of: int, share: float) -> bool:
    """Whether `count` successes `of` trials are what chance allows: five standard deviations."""
    return abs(count - share * of) < 5 * math.sqrt(of * share * (1 - share))


def test_of_the_chosen_8_in_10_are_masked_1_is_random_1_is_kept(masker, tokenizer):
    before, _, after = masked(masker, tokenizer)
    chosen = after["labels"] != IGNORED
    old, new = before["input_ids"][chosen], after["input_ids"][chosen]
    assert (after["labels"][chosen] == old).all()
    mask = tokenizer.mask_token_id
    ordinary = len(tokenizer) - len(tokenizer.all_special_ids)
    assert within((new == mask).sum(), old.size, 0.8)
    assert within((new == old).sum(), old.size, 0.1 + 0.1 / ordinary)
    drawn = new[(new != mask) & (new != old)]
    assert not np.isin(drawn, tokenizer.all_special_ids).any()
    assert len(np.unique(drawn)) > 0.9 * min(ordinary, len(drawn) / 5)


def test_words_are_hidden_whole_and_all_alike(masker, tokenizer):
    before, _, after = masked(masker, tokenizer)
    words = masker.words(before["input_ids"][0], before["position_ids"][0])
    sizes = np.bincount(words)
    cut, times = 0, np.zeros(len(sizes), dtype=int)
    for row, labels in enumerate(after["labels"]):
        scored = np.bincount(words[labels != IGNORED], minlength=len(sizes))
        hidden = np.bincount(words[after["input_ids"][row] != before["input_ids"][row]], minlength=len(sizes))
        assert not hidden[scored == 0].any()
        cut += int(((scored > 0) & (scored < sizes)).sum())
        times += scored == sizes
    assert cut <= len(after["labels"]) / 4  # at most one a row, where nothing shorter was left
    short = times[sizes == 1]
    assert all(within(one, len(after["labels"]), short.mean() / len(after["labels"])) for one in short)


def test_a_row_of_one_long_word_is_hidden_whole_and_told_in_part(masker, tokenizer):
    ids = np.array(encode_text(tokenizer, "q" * 40), dtype=np.int32)
    hidden = masker.hide_words(ids, positions_of(40), 6, np.random.default_rng(0))
    assert (hidden.labels != IGNORED).tolist() == [True] * 6 + [False] * 34
    assert (hidden.input_ids == tokenizer.mask_token_id).sum() > 25


def test_special_tokens_and_padding_are_never_touched(masker, tokenizer):
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = np.array([*encode_text(tokenizer, "a b c d"), end, *[pad] * 5], dtype=np.int32)
    text = len(ids) - 6
    for seed in range(50):
        hidden = masker.hide_words(ids, positions_of(text + 1, 5), text, np.random.default_rng(seed))
        assert (hidden.labels[:text] == ids[:text]).all()
        assert (hidden.labels[text:] == IGNORED).all()
        assert hidden.input_ids[text:].tolist() == ids[text:].tolist()


def test_a_single_token_is_always_the_mask(masker, tokenizer):
    ids = np.array([*encode_text(tokenizer, TEXT), tokenizer.eos_token_id], dtype=np.int32)
    places = set()
    for seed in range(60):
        hidden = masker.hide_one(ids, positions_of(len(ids)), 1, np.random.default_rng(seed))
        (place,) = np.flatnonzero(hidden.labels != IGNORED)
        assert hidden.input_ids[place] == tokenizer.mask_token_id
        assert hidden.labels[place] == ids[place]
        assert np.delete(hidden.input_ids, place).tolist() == np.delete(ids, place).tolist()
        places.add(int(place))
    assert len(places) > 20
    none = masker.hide_one(ids, positions_of(len(ids)), 0, np.random.default_rng(0))
    assert (none.labels == IGNORED).all()
    assert (none.input_ids == ids).all()


# Who does it, and when


def test_rows_are_the_same_whoever_makes_them_and_other_at_another_reading(masker, tokenizer):
    before, plan, after = masked(masker, tokenizer, rows=12)
    for first in (0, 4, 9):
        part = {name: values[first : first + 3] for name, values in before.items()}
        alone = mask_rows(part, plan.part(first, first + 3), masker, 5)
        for name, values in alone.items():
            assert (values == after[name][first : first + 3]).all()
    again = mask_rows(before, plan._replace(readings=plan.readings + 1), masker, 5)
    other_seed = mask_rows(before, plan, masker, 6)
    for other in (again, other_seed):
        assert all((one != two).any() for one, two in zip(other["labels"], after["labels"], strict=True))
    assert (before["labels"] != IGNORED).all()  # what was read is not changed


def test_the_share_of_mixed_rows_is_drawn_for_each_row_and_reading():
    masking = Masking("", 0.15, 0.3, seed=1)
    rows = np.arange(4000)
    first, second = masking.kinds(rows, rows * 0), masking.kinds(rows, rows * 0 + 1)
    assert within((first == Kind.MASKED).sum(), 4000, 0.3)
    assert within(((first == Kind.MASKED) & (second == Kind.MASKED)).sum(), 4000, 0.09)
    assert set(first.tolist()) == {Kind.CAUSAL, Kind.MASKED}
    assert (masking.kinds(rows[7:9], rows[7:9] * 0) == first[7:9]).all()


def test_causal_and_empty_rows_stay_as_they_are(masker, tokenizer):
    before, plan, _ = masked(masker, tokenizer, rows=3)
    kinds = np.array([Kind.CAUSAL, Kind.MASKED, Kind.MASKED])
    rows = np.array([0, 1, -1])
    after = mask_rows(before, plan._replace(kinds=kinds, rows=rows), masker, 5)
    assert after["kind"].tolist() == [0, 1, 1]
    for row in (0, 2):
        assert all((after[name][row] == before[name][row]).all() for name in before)
    assert (after["input_ids"][1] != before["input_ids"][1]).any()


def test_targets_by_kind():
    masking = Masking("", 0.15, 0.5, seed=0)
    kinds = np.array([Kind.CAUSAL, Kind.MASKED, Kind.MASKED, Kind.MASKED, Kind.SINGLE, Kind.SINGLE])
    causal, tokens = np.array([63, 63, 63, 63, 63, 63]), np.array([60, 60, 3, 0, 60, 0])
    assert masking.targets(kinds, causal, tokens).tolist() == [63, 9, 1, 0, 1, 0]


def test_plans_are_joined_and_filled_up():
    plan = Plan(*(np.arange(3) + 10 * column for column in range(4)))
    filled = joined([plan.part(1, 3), empty(2)])
    assert [column.tolist() for column in filled] == [[1, 2, -1, -1], [11, 12, 0, 0], [21, 22, 0, 0], [31, 32, 0, 0]]
