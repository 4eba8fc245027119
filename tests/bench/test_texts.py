"""Text to measure with: the same for the same seed, of the size asked for, and as similar as it says."""

import json
from itertools import combinations

import numpy as np
import pytest

from tests.bench import texts
from tests.bench.measure import Invalid
from tests.bench.texts import gather, jaccard, perturbed, planted, write_jsonl

LOOKS = ("old", "grey", "fast", "wild", "small", "late", "sad", "tall", "soon")
SOURCE = [
    " ".join(f"The {look} dog{n} saw a {look} cat on hill{n % 7} and ran home {look} again." for look in LOOKS)
    for n in range(40)
]


@pytest.fixture(scope="module")
def pool():
    return gather(SOURCE)


def test_a_pool_holds_every_word_of_the_text_in_order(pool):
    assert " ".join(pool.words[pool.ids]) == " ".join(SOURCE)
    assert pool.starts[0] == 0
    assert pool.starts[-1] == len(pool.ids)


def test_short_sentences_are_joined_and_long_ones_cut():
    long, short = " ".join(["word"] * 130) + ".", "One two. Three four five. Six seven eight nine."
    assert np.diff(gather([long]).starts).tolist() == [60, 60, 10]
    assert np.diff(gather([short]).starts).tolist() == [9]


def test_only_words_in_lower_case_without_marks_may_be_substituted():
    pool = gather(["Alpha beta, gamma delta-x epsilon 7th eta theta. "])
    assert set(pool.words[pool.ids[pool.plain]]) == {"gamma", "epsilon", "eta"}


def test_a_script_without_lower_case_is_mixed_too():
    pool = gather(["一 二 三 四 五 六 七 八 九 十"])
    assert len(pool.plain) == 10
    assert set(next(perturbed(pool, 1_000, 1)).split()) <= set(pool.words)


def test_no_text_is_told():
    with pytest.raises(Invalid, match="no sentences"):
        gather(["", " \n"])


def test_the_same_seed_gives_the_same_text_and_another_seed_another(pool):
    one, same, other = (list(perturbed(pool, 200_000, seed)) for seed in (1, 1, 2))
    assert one == same
    assert one[0] != other[0]


def test_a_larger_corpus_begins_with_the_smaller_one(pool):
    small, large = (list(perturbed(pool, size, 1)) for size in (50_000, 150_000))
    assert large[: len(small)] == small


def test_a_corpus_ends_with_the_document_that_reaches_its_size(pool):
    documents = list(perturbed(pool, 100_000, 1))
    assert sum(len(text.encode()) for text in documents) >= 100_000
    assert sum(len(text.encode()) for text in documents[:-1]) < 100_000


def test_perturbed_text_keeps_the_frequencies_of_words(pool):
    words = " ".join(perturbed(pool, 300_000, 1)).split()
    share = {word: (words.count(word) / len(words), " ".join(SOURCE).split().count(word)) for word in ("saw", "cat")}
    total = len(" ".join(SOURCE).split())
    for found, expected in share.values():
        assert found == pytest.approx(expected / total, rel=0.1)


def test_some_words_are_substituted_and_most_stay():
    letters = "abcdefghijklmnopqrst"
    pool = gather([" ".join(one + two + three for one in letters for two in letters for three in letters)])
    changed = texts._substituted(pool, np.arange(8_000), np.random.default_rng(1)) != pool.ids
    assert changed.mean() == pytest.approx(0.15, abs=0.02)


def test_documents_of_real_text_are_no_near_duplicates_of_one_another():
    real = gather(file.path.read_text() for file in texts.resolve(texts.INSTALLED[0])[:3])
    documents = list(perturbed(real, 120_000, 1))[:25]
    assert max(jaccard(one, other) for one, other in combinations(documents, 2)) < 0.3


def test_jaccard_of_five_grams_by_hand():
    assert jaccard("a b c d e f", "a b c d e f") == 1
    assert jaccard("a b c d e f", "A b, c d e x") == pytest.approx(1 / 3)  # abcde; bcdef, bcdex
    assert jaccard("a b c d", "a b c d") == 0  # no 5-gram at all


def test_near_duplicates_say_their_similarity_and_cover_the_range(pool):
    originals = list(perturbed(pool, 400_000, 1))
    found = planted(pool, originals, 1)
    assert all(pair.original in originals and pair.jaccard == jaccard(pair.original, pair.copy) for pair in found[:20])
    assert all(pair.original != pair.copy for pair in found)
    similar = [pair.jaccard for pair in found]
    assert min(similar) < 0.75 < 0.85 < max(similar)
    assert found == planted(pool, originals, 1)


def test_every_text_is_written_once_into_files_of_about_the_size(tmp_path):
    given = [f"text {number} é" * 20 for number in range(50)]
    assert write_jsonl(given, tmp_path / "out", 1_000) == 50
    files = sorted((tmp_path / "out").iterdir())
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == given
    assert len({row["id"] for row in rows}) == 50
    assert len(files) > 5
    assert [path.name for path in files[:2]] == ["part-00000.jsonl", "part-00001.jsonl"]


def test_without_a_folder_the_text_comes_from_installed_packages_and_says_so(monkeypatch):
    monkeypatch.delenv(texts.DATA_FOLDER, raising=False)
    assert "is not set" in texts.described()
    assert len(next(texts.real_texts())) > 10_000


def test_a_folder_of_ones_own_is_read_instead(monkeypatch, tmp_path):
    import lzma

    with lzma.open(tmp_path / "mine.jsonl.xz", "wt", encoding="utf-8") as out:
        out.write(json.dumps({"text": "naïve"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    monkeypatch.setenv(texts.DATA_FOLDER, str(tmp_path))
    assert list(texts.real_texts()) == ["naïve", "two"]
