"""Which documents go as duplicates: against components found by other means, in any order, for any number of tasks."""

import random

import numpy as np
import pytest

from pipelines.corpus import duplicates
from pipelines.corpus.minhash import Keys, keys_of
from tests.pipelines.corpus.in_process import work_in

WORDS = [f"word{n}" for n in range(2000)]


def leave(work, parts):
    """Write the keys of `parts`: lists of (id, text, priority) each; returns how many keys there are."""
    read, total = work.step("read"), 0
    read.folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        keys = keys_of([text for _, text, _ in part], 5, 14, 8)
        lengths = [len(text) for _, text, _ in part]
        priority = part[0][2] if part else 0
        total += duplicates.write_keys(read, number, keys, [name for name, _, _ in part], lengths, priority)
    return total


def lost_of(work, parts):
    """Ids of the documents that go, with the id of the one that is kept for each."""
    total = leave(work, parts)
    losers = duplicates.find(work, work.step("read"), len(parts), total)
    if losers is None:
        return {}
    found = {}
    for number, part in enumerate(parts):
        columns = duplicates.losers_of(number, losers)
        found |= {part[row][0]: f"{kept:016x}" for row, kept in zip(columns["row"], columns["kept"], strict=True)}
    return found


def text(seed, words=200):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(original, share, seed):
    """`original` with that share of its words replaced."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) if draw.random() < share else word for word in original.split())


def jaccard(one, other):
    sets = [{tuple(text.split()[i : i + 5]) for i in range(len(text.split()) - 4)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def corpus():
    """30 documents of their own, 10 of them twice word for word, 10 with few words changed."""
    originals = [(f"{n:016x}", text(n), 0) for n in range(30)]
    copies = [(f"{100 + n:016x}", text(n).upper() + "!", 0) for n in range(10)]
    near = [(f"{200 + n:016x}", changed(text(n), 0.01, n), 0) for n in range(10, 20)]
    return originals + copies + near


def test_copies_and_near_copies_go_and_nothing_else(tmp_path):
    documents = corpus()
    texts = {name: said for name, said, _ in documents}
    lost = lost_of(work_in(tmp_path), [documents])
    assert len(lost) == 20
    for gone, kept in lost.items():
        assert (
            texts[gone].lower().strip("!") == texts[kept].lower().strip("!") or jaccard(texts[gone], texts[kept]) > 0.8
        )


def test_order_parts_and_tasks_do_not_matter(tmp_path, monkeypatch):
    documents = corpus()
    whole = lost_of(work_in(tmp_path / "whole"), [documents])
    random.Random(1).shuffle(documents)
    parts = [documents[:7], [], documents[7:30], documents[30:]]
    monkeypatch.setattr(duplicates, "KEYS_PER_TASK", 16)  # some forty tasks
    assert lost_of(work_in(tmp_path / "parts"), parts) == whole


def test_the_kept_one_is_of_the_first_source_then_the_longest_then_the_least_id(tmp_path):
    short, long = text(1), text(1) + " " + " ".join(WORDS[:2])
    same = [("00000000000000b2", long, 0), ("00000000000000a1", long, 0), ("00000000000000c3", short, 0)]
    assert lost_of(work_in(tmp_path / "length"), [same]) == {
        "00000000000000b2": "00000000000000a1",
        "00000000000000c3": "00000000000000a1",
    }
    sources = [[("00000000000000b2", long, 1)], [("00000000000000c3", short, 0)]]
    assert lost_of(work_in(tmp_path / "source"), sources) == {"00000000000000b2": "00000000000000c3"}


def test_texts_without_words_are_never_duplicates(tmp_path):
    assert lost_of(work_in(tmp_path), [[("0" * 16, "...", 0), ("1" * 16, "...", 0), ("2" * 16, "", 0)]]) == {}


@pytest.mark.parametrize("seed", range(5))
def test_components_are_those_of_a_search(tmp_path, monkeypatch, seed):
    """Chains, stars and cliques over random keys: documents that share any key, directly or by others."""
    draw = np.random.default_rng(seed)
    bands = np.where(
        draw.random((300, 4)) < 0.5, draw.integers(1, 200, (300, 4)), draw.integers(1000, 1 << 60, (300, 4))
    )
    keys = Keys(draw.integers(1 << 61, 1 << 62, 300).astype(np.uint64), bands.astype(np.uint64))
    monkeypatch.setattr(duplicates, "KEYS_PER_TASK", 100)
    work, ids = work_in(tmp_path), [f"{n:016x}" for n in range(300)]
    work.step("read").folder.mkdir(parents=True)
    total = duplicates.write_keys(work.step("read"), 0, keys, ids, [1] * 300, 0)
    losers = duplicates.find(work, work.step("read"), 1, total)
    found = duplicates.losers_of(0, losers)
    kept = dict(zip(found["row"].tolist(), found["kept"].tolist(), strict=True))
    assert {row: kept.get(row, row) for row in range(300)} == searched(np.hstack([keys.exact[:, None], keys.bands]))


def searched(keys):
    """The least document of each one's component, by walking from document to document."""
    holders = {}
    for row, own in enumerate(keys.tolist()):
        for key in own:
            holders.setdefault(key, []).append(row)
    least = {}
    for first in range(len(keys)):
        waiting = [first]
        while waiting:
            row = waiting.pop()
            if row not in least:
                least[row] = first
                waiting += [other for key in keys[row].tolist() for other in holders[key]]
    return least


def test_work_goes_on_where_it_was(tmp_path, monkeypatch):
    """A command that dies in the third round leaves the steps before it; the next does only what is missing."""
    documents = corpus()
    whole = lost_of(work_in(tmp_path / "whole"), [documents])
    work = work_in(tmp_path / "killed")
    total = leave(work, [documents])
    star = duplicates._star

    def dying(number, item, step, **others):
        if step.folder.name == "star-01":
            raise KeyboardInterrupt
        return star(number, item, step, **others)

    monkeypatch.setattr(duplicates, "_star", dying)
    with pytest.raises(KeyboardInterrupt):
        duplicates.find(work, work.step("read"), 1, total)
    monkeypatch.setattr(duplicates, "_star", star)
    monkeypatch.setattr(duplicates, "_edges", never)
    losers = duplicates.find(work_in(tmp_path / "killed"), work.step("read"), 1, total)
    rows = duplicates.losers_of(0, losers)["row"].tolist()
    assert {documents[row][0] for row in rows} == set(whole)


def never(*arguments, **others):
    raise AssertionError("a step that is done was done again")
