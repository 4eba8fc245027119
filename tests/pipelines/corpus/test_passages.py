"""Passages that several documents share: taken out of all but one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus import duplicates, passages
from pipelines.corpus.minhash import keys_of
from pipelines.corpus.passages import sentences, without
from tests.pipelines.corpus.in_process import work_in

SHARED = (
    "The committee met on Tuesday to hear the report. It was read by the secretary in full. "
    "No member asked for the floor afterwards. "
)


def said(name, count=6):
    return "".join(
        f"This is what {name} alone says in sentence {n} of the whole document here. " for n in range(count)
    )


def left_of(tmp_path, parts):
    """The texts of `parts`, lists of (id, text), without the passages that go."""
    work = work_in(tmp_path)
    total = 0
    for name in ("read", "passages"):
        work.step(name).folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        texts = [text for _, text in part]
        ids, lengths = [name for name, _ in part], [len(text) for text in texts]
        duplicates.write_keys(work.step("read"), number, keys_of(texts, 5, 14, 8), ids, lengths, 0)
        found = passages.Found()
        found.add(texts, list(range(len(texts))))
        total += found.write(work.step("passages"), number)
    repeats = passages.find(work, work.step("passages"), work.step("read"), len(parts), total)
    gone = [passages.repeats_of(number, repeats) if repeats else {} for number in range(len(parts))]
    return {
        name: without(text, gone[number].get(row, []))
        for number, part in enumerate(parts)
        for row, (name, text) in enumerate(part)
    }


def documents():
    return [
        ("00000000000000a1", said("one") + SHARED + said("one more")),
        ("00000000000000b2", said("two") + SHARED + said("two more")),
        ("00000000000000c3", said("three") + SHARED.upper() + SHARED),
        ("00000000000000d4", said("four", 20)),
    ]


@given(st.text(alphabet="ab.!? \n\t\u00a0", max_size=60))
def test_sentences_join_to_the_text(text):
    assert "".join(sentences(text)) == text
    assert all(sentences(text))


def test_a_line_ends_a_sentence_and_so_do_marks_before_a_space():
    assert sentences("One. Two!  3.14 is pi? Yes\nFour...\n\nFive") == [
        "One. ",
        "Two!  ",
        "3.14 is pi? ",
        "Yes\n",
        "Four...\n\n",
        "Five",
    ]


def test_a_shared_passage_stays_in_the_longest_document(tmp_path):
    before, after = dict(documents()), left_of(tmp_path, [documents()])
    assert after["00000000000000d4"] == before["00000000000000d4"]
    longest = max(("00000000000000a1", "00000000000000b2", "00000000000000c3"), key=lambda name: len(before[name]))
    assert after[longest] == before[longest]
    for name in set(before) - {longest, "00000000000000d4"}:
        assert SHARED not in after[name]
        assert after[name] == before[name].replace(SHARED, "").replace(SHARED.upper(), "")


def test_parts_and_tasks_do_not_matter(tmp_path, monkeypatch):
    whole = left_of(tmp_path / "whole", [documents()])
    monkeypatch.setattr(passages, "PASSAGES_PER_TASK", 5)
    turned = documents()[::-1]
    assert left_of(tmp_path / "parts", [turned[:1], [], turned[1:]]) == whole


def test_a_refrain_within_one_document_stays(tmp_path):
    song = [("00000000000000a1", SHARED + said("verse") + SHARED + said("other verse") + SHARED)]
    assert left_of(tmp_path, [song]) == dict(song)


def test_passages_of_few_words_are_no_passages():
    hashes, _, _ = passages.passages_of(["Yes. No. Yes. No. Why? Because. Oh."])
    assert len(hashes) == 0
    hashes, document, first = passages.passages_of(["", "One two. " * 3, SHARED])
    assert document.tolist() == [2]
    assert first.tolist() == [0]
    assert hashes.dtype == np.uint64
