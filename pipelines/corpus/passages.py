"""Passages that stand in several documents: kept in one of them, taken out of the others.

A passage is SPAN sentences that follow one another, as in C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2),
with at least FEWEST_WORDS words; a sentence ends with its line, or with . ! ? before a space. Two passages are the
same if their words are. Of the documents that have it, it stays in the one that is preferred as in `duplicates`; there
every occurrence stays, so a song keeps its refrain. In the others its sentences go. The steps:

1. `passages`: a task a part leaves the hashes of its passages, sorted, for the documents that are not dropped.
2. `repeats`: a task takes a range of hashes from all parts and says which passages go, by document.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pipelines.corpus.words import mix, word_hashes
from pipelines.partitions import Step, Summary, Work, gather, in_range, ranges, read_columns, write_table

SPAN = 3
FEWEST_WORDS = 20
PASSAGES_PER_TASK = 1 << 20

_END = re.compile(r"\n+|(?<=[.!?])[ \t]+")


def sentences(text: str) -> list[str]:
    """`text` in sentences that join to it again: each has the white space that follows it."""
    cuts = [0, *(found.end() for found in _END.finditer(text)), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts) if end > begin]


def passages_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes, documents and first sentences of the passages of `texts`: uint64, uint32, uint32 (passages,)."""
    said = [sentences(text) for text in texts]
    words, offsets = word_hashes([sentence for one in said for sentence in one])
    counts = np.diff(offsets)
    total = np.zeros(len(words) + 1, dtype=np.uint64)
    np.cumsum(mix(words), out=total[1:])
    hashes = mix(total[offsets[1:]] - total[offsets[:-1]])  # a bag of words is enough to tell a sentence
    length = np.array([len(one) for one in said], dtype=np.int64)
    document = np.repeat(np.arange(len(said)), length)
    place = np.arange(len(counts)) - np.repeat(np.cumsum(length) - length, length)
    first = np.flatnonzero(place + SPAN <= length[document])
    long = np.sum([counts[first + step] for step in range(SPAN)], axis=0) >= FEWEST_WORDS if len(first) else first > 0
    first = first[long]
    joined = np.zeros(len(first), dtype=np.uint64)
    for step in range(SPAN):
        joined = mix(joined + hashes[first + step])
    return joined, document[first].astype(np.uint32), place[first].astype(np.uint32)


def without(text: str, firsts: list[int]) -> str:
    """`text` less the sentences of the passages that begin at the sentences `firsts`."""
    gone = {first + step for first in firsts for step in range(SPAN)}
    return "".join(sentence for place, sentence in enumerate(sentences(text)) if place not in gone)


@dataclass
class Found:
    """The passages of a part's documents: hashes, rows of the part, first sentences."""

    hashes: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint64)])
    rows: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint32)])
    firsts: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint32)])

    def add(self, texts: list[str], rows: list[int]) -> None:
        """`rows`: of the documents with these `texts`."""
        hashes, document, first = passages_of(texts)
        self.hashes.append(hashes)
        self.rows.append(np.array(rows, dtype=np.uint32)[document])
        self.firsts.append(first)

    def write(self, step: Step, number: int) -> int:
        """Leave NNNNN.arrow, sorted by hash. Returns the number of passages."""
        hashes, rows, firsts = map(np.concatenate, (self.hashes, self.rows, self.firsts))
        order = np.argsort(hashes, kind="stable")
        write_table(step.file(number, "arrow"), hash=hashes[order], row=rows[order], first=firsts[order])
        return len(order)


def find(work: Work, passages: Step, facts: Step, parts: int, number: int) -> Step | None:
    """Find which of `number` passages in `parts` parts go. `facts`: the step with what is known of each document.

    None if none do; else the step whose files `repeats_of` reads.
    """
    tasks = ranges(1 + number // PASSAGES_PER_TASK)
    found = work.each("repeats", tasks, partial(_repeats, passages=passages, facts=facts, parts=parts))
    return work.step("repeats") if any(summary["repeats"] for summary in found) else None


def repeats_of(part: int, repeats: Step) -> dict[int, list[int]]:
    """First sentences of the passages that go, by row of the part."""
    found = gather(repeats.files(), "address", part << 32, (part + 1) << 32)
    gone: dict[int, list[int]] = {}
    for address, first in zip(found["address"].tolist(), found["first"].tolist(), strict=True):
        gone.setdefault(address & 0xFFFFFFFF, []).append(first)
    return gone


def _repeats(number: int, item: dict[str, Any], step: Step, passages: Step, facts: Step, parts: int) -> Summary:
    """The passages of this range that stand in more than one document, but those of the document that keeps them."""
    low, high = int(item["low"]), int(item["high"])
    found = [_shared_part(passages, facts, part, low, high) for part in range(parts)]
    column = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    order = np.lexsort([column["address"], column["id"], ~column["length"], column["priority"], column["hash"]])
    column = {name: values[order] for name, values in column.items()}
    starts = np.flatnonzero(np.diff(column["hash"], prepend=~column["hash"][:1]) != 0)
    keeper = np.repeat(column["address"][starts], np.diff(starts, append=len(order)))
    gone = np.flatnonzero(column["address"] != keeper)
    gone = gone[np.lexsort([column["first"][gone], column["address"][gone]])]
    write_table(step.file(number, "arrow"), address=column["address"][gone], first=column["first"][gone])
    return {"repeats": len(gone)}


def _shared_part(passages: Step, facts: Step, part: int, low: int, high: int) -> dict[str, np.ndarray]:
    own = in_range(passages.file(part, "arrow"), "hash", low, high)
    known = read_columns(facts.file(part, "facts.arrow"))
    row = own["row"]
    return {
        "hash": own["hash"],
        "first": own["first"],
        "address": row + (np.uint64(part) << np.uint64(32)),
        **{name: known[name][row] for name in ("id", "length", "priority")},
    }
