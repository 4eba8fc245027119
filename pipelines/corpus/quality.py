"""Rules by which a document is kept: what is measured of its text, and the bounds, both as published.

Reads a text; gives back the text, or the first rule that it breaks and the value measured. The sets, in the order in
which they are asked; within a set the order is that of RULES:

    gopher-quality     Rae et al. 2021, arXiv 2112.11446, section A.1.1
    gopher-repetition  the same, Table A1
    c4                 Raffel et al. 2020, arXiv 1910.10683, section 2.2. It also takes lines out of the text.
    fineweb            Penedo et al. 2024, arXiv 2406.17557, section 3.6; of what C4 left of the text

Where a paper leaves open how to count, it is counted as in datatrove 0.10.1, the code that FineWeb was made with.
Where the two part:

    - Duplicated lines may hold 0.1 of the characters, as in the FineWeb paper; the code has 0.01.
    - A short line has fewer than 30 characters, as in that paper; in the code one of 30 is short too.
    - A value equal to a bound is kept, as in the code; the FineWeb paper drops it.
    - An n-gram that comes once isn't repeated, so a text of few words isn't dropped for its first one.
    - Of C4, lines needn't end in punctuation (FineWeb, section 3.5), and no list of bad words is brought along.

Words are told apart much as spaCy's tokenizer does, which the code uses: of what stands between spaces, symbols at the
ends are words of their own, those inside belong to it but for -, / and =; an English clitic ('s, 't, 'll) is a word;
repeated dots, dashes and the like are one; an address is one.

The bounds were found on English. Stop words are English words: elsewhere set `gopher-stop-words` to 0. Word lengths,
words per line and n-grams need a script that puts spaces between words (not Chinese, Japanese, Thai). What is left,
duplicated lines and paragraphs, line lengths and punctuation (of every script), holds in all languages.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, lru_cache
from math import inf
from typing import NamedTuple

import numpy as np
import regex

RULE_SETS = ("gopher-quality", "gopher-repetition", "c4", "fineweb")
# Articles may be as short as an entry of a dictionary, books are longer than 100,000 words, and code isn't prose.
DEFAULT_SETS: dict[str, tuple[str, ...]] = {
    "web": RULE_SETS,
    "article": ("gopher-repetition",),
    "book": ("gopher-repetition",),
    "code": (),
}

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
ELLIPSES = ("...", "\u2026")
BULLETS = ("\u2022", "-")
LEAST_LINE_WORDS = 3
LONGEST_WORD = 1000
SHORT_LINE = 30
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

TOP_SIZES = (2, 3, 4)
REPEATED_SIZES = (5, 6, 7, 8, 9, 10)
MIX = np.uint64(0x9E3779B97F4A7C15)

CLITIC = r"['\u2019](?:s|t|re|ve|ll|d|m)\b"
# What a word may begin with (--all, /bin), and hold between its letters and digits: 3.14, 10:30, a.example, O'Neill,
# f(x, a='b; but not well-known, either/or, a=b.
RUN = r"[-/@\\|~^.]+"
FIRST = rf"(?<![\w)\]]){RUN}(?=\w)"
INNER = rf"\.(?=[\da-z_])|[,:/](?=\d)|(?!{CLITIC})[:/<>=]?[^\w\s.,:/<>=-]+"
WORD = re.compile(rf"(?:https?://|www\.)\S*\w|(?:{FIRST})?\w+(?:(?:{INNER})\w+)*|{CLITIC}|{RUN}|[^\w\s]")
LONG_WORD = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD + 1}}}")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE_END = re.compile(r"(?:[!?]|(?<!\.)\.)[\"'\u2019\u201d)\]]*[ \t]+(?=\S)|[\u3002\uff01\uff1f](?=.)")
# Unicode's property, whatever the script.
TERMINAL = regex.compile(r"\p{Sentence_Terminal}")


class Rule(NamedTuple):
    """A document keeps a rule where low <= measure <= high."""

    name: str
    rule_set: str
    measure: Callable[[Features], float]
    low: float
    high: float
    about: str


QUALITY, REPETITION, C4, FINEWEB = RULE_SETS
RULES: tuple[Rule, ...] = (
    # Gopher, section A.1.1.
    Rule("gopher-min-words", QUALITY, lambda f: f.word_count, 50, inf, "words that aren't symbols"),
    Rule("gopher-max-words", QUALITY, lambda f: f.word_count, 0, 100_000, "words that aren't symbols"),
    Rule("gopher-min-word-length", QUALITY, lambda f: f.mean_word_length, 3, inf, "mean characters of a word"),
    Rule("gopher-max-word-length", QUALITY, lambda f: f.mean_word_length, 0, 10, "mean characters of a word"),
    Rule("gopher-hashes", QUALITY, lambda f: f.per_word("#"), 0, 0.1, "hash signs per word or symbol"),
    Rule("gopher-ellipses", QUALITY, lambda f: f.per_word(*ELLIPSES), 0, 0.1, "ellipses per word or symbol"),
    Rule("gopher-bullet-lines", QUALITY, lambda f: f.bullet_lines, 0, 0.9, "share of lines that begin with a bullet"),
    Rule("gopher-ellipsis-lines", QUALITY, lambda f: f.ellipsis_lines, 0, 0.3, "share of lines that end with one"),
    Rule("gopher-letters", QUALITY, lambda f: f.lettered_words, 0.8, inf, "share of words and symbols with a letter"),
    Rule("gopher-stop-words", QUALITY, lambda f: f.stop_words, 2, inf, "different English stop words"),
    # Gopher, table A1.
    Rule("gopher-paragraphs", REPETITION, lambda f: f.paragraphs.pieces, 0, 0.30, "share of repeated paragraphs"),
    Rule(
        "gopher-paragraph-characters", REPETITION, lambda f: f.paragraphs.characters, 0, 0.20, "share of text in them"
    ),
    Rule("gopher-lines", REPETITION, lambda f: f.repeated.pieces, 0, 0.30, "share of repeated lines"),
    Rule("gopher-line-characters", REPETITION, lambda f: f.repeated.characters, 0, 0.20, "share of text in them"),
    Rule("gopher-top-2-gram", REPETITION, lambda f: f.top_ngram(2), 0, 0.20, "share of text in the top 2-gram"),
    Rule("gopher-top-3-gram", REPETITION, lambda f: f.top_ngram(3), 0, 0.18, "share of text in the top 3-gram"),
    Rule("gopher-top-4-gram", REPETITION, lambda f: f.top_ngram(4), 0, 0.16, "share of text in the top 4-gram"),
    Rule("gopher-5-grams", REPETITION, lambda f: f.repeats(5), 0, 0.15, "share of text in repeated 5-grams"),
    Rule("gopher-6-grams", REPETITION, lambda f: f.repeats(6), 0, 0.14, "share of text in repeated 6-grams"),
    Rule("gopher-7-grams", REPETITION, lambda f: f.repeats(7), 0, 0.13, "share of text in repeated 7-grams"),
    Rule("gopher-8-grams", REPETITION, lambda f: f.repeats(8), 0, 0.12, "share of text in repeated 8-grams"),
    Rule("gopher-9-grams", REPETITION, lambda f: f.repeats(9), 0, 0.11, "share of text in repeated 9-grams"),
    Rule("gopher-10-grams", REPETITION, lambda f: f.repeats(10), 0, 0.10, "share of text in repeated 10-grams"),
    # C4, section 2.2, over the lines that it keeps.
    Rule("c4-lorem-ipsum", C4, lambda f: f.text.lower().count("lorem ipsum"), 0, 0, "times 'lorem ipsum'"),
    Rule("c4-curly-brackets", C4, lambda f: f.text.count("{"), 0, 0, "opening curly brackets"),
    Rule("c4-sentences", C4, lambda f: f.sentences, 5, inf, "sentences"),
    # FineWeb, section 3.6; the last isn't in the paper, but in the code.
    Rule("fineweb-line-ends", FINEWEB, lambda f: f.finished_lines, 0.12, inf, "share of lines that end a sentence"),
    Rule("fineweb-short-lines", FINEWEB, lambda f: f.short_lines, 0, 0.67, "share of lines of under 30 characters"),
    Rule("fineweb-line-characters", FINEWEB, lambda f: f.filled.characters, 0, 0.1, "share of text in repeated lines"),
    Rule("fineweb-newlines", FINEWEB, lambda f: f.per_word("\n"), 0, 0.3, "line ends per word or symbol"),
)


class Judgement(NamedTuple):
    """text: what is kept; as it came, if a rule is broken. broken: the first such rule. value: what it measured."""

    text: str
    broken: str | None
    value: float | None


def judge(text: str, rule_sets: Collection[str], thresholds: Mapping[str, float] = {}) -> Judgement:
    """The text that is kept, or the first rule of `rule_sets` that `text` breaks, in the order of RULES.

    thresholds: other bounds, by name of the rule. ValueError, with the nearest name, if a set or a rule isn't known.
    """
    features = Features(text)
    whole = True
    for rule in _chosen(tuple(rule_sets), tuple(sorted(thresholds.items()))):
        if whole and rule.rule_set == "c4":
            features, whole = Features(c4_lines(text)), False
        value = rule.measure(features)
        if not rule.low <= value <= rule.high:
            return Judgement(text, rule.name, float(value))
    return Judgement(features.text, None, None)


def c4_lines(text: str) -> str:
    """The lines of `text` that C4 keeps, without white space around them and marks of citation.

    Out go lines of fewer than 3 words (blank ones, so), those with a word of more than 1000 characters, and those that
    speak of Javascript, cookies or terms of use. The numbers are those of the journal's edition, JMLR 21(140), 2020.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line.split(None, LEAST_LINE_WORDS - 1)) >= LEAST_LINE_WORDS]
    if LONG_WORD.search(text):
        lines = [line for line in lines if not LONG_WORD.search(line)]
    if any(phrase in text.lower() for phrase in ("javascript", *POLICY)):
        lines = [line for line in lines if not _is_furniture(line.lower())]
    kept = "\n".join(lines)
    return CITATION.sub("", kept).strip() if "[" in kept else kept


def _is_furniture(line: str) -> bool:
    return "javascript" in line or any(phrase in line for phrase in POLICY)


@lru_cache(maxsize=64)
def _chosen(rule_sets: tuple[str, ...], thresholds: tuple[tuple[str, float], ...]) -> tuple[Rule, ...]:
    _check(rule_sets, RULE_SETS, "set of rules")
    bounds = dict(thresholds)
    _check(bounds, [rule.name for rule in RULES], "rule")
    return tuple(_bounded(rule, bounds.get(rule.name)) for rule in RULES if rule.rule_set in rule_sets)


def _check(names: Iterable[str], known: Collection[str], what: str) -> None:
    for name in names:
        if name not in known:
            (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"unknown {what} '{name}', the nearest is '{nearest}'")


def _bounded(rule: Rule, bound: float | None) -> Rule:
    if bound is None:
        return rule
    return rule._replace(low=bound) if rule.high == inf else rule._replace(high=bound)


# What is measured


class Features:
    """What the rules need to know of a text, each found when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text: str = text

    @cached_property
    def words(self) -> list[str]:
        """Words and symbols, in their order."""
        return WORD.findall(self.text)

    @cached_property
    def word_lengths(self) -> list[int]:
        """Characters of every word that isn't a symbol."""
        return [len(word) for word in self.words if word[-1].isalnum() or word[0].isalnum()]

    @property
    def word_count(self) -> int:
        return len(self.word_lengths)

    @property
    def mean_word_length(self) -> float:
        return _share(sum(self.word_lengths), len(self.word_lengths))

    @property
    def stop_words(self) -> int:
        """Different ones, in lower case."""
        return len(STOP_WORDS.intersection(self.words))

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def filled_lines(self) -> list[str]:
        """Lines that aren't blank, without white space at their ends."""
        return [line for line in map(str.rstrip, self.text.split("\n")) if line]

    @property
    def bullet_lines(self) -> float:
        return _share(sum(line.lstrip().startswith(BULLETS) for line in self.lines), len(self.lines))

    @property
    def ellipsis_lines(self) -> float:
        return _share(sum(line.rstrip().endswith(ELLIPSES) for line in self.lines), len(self.lines))

    @property
    def short_lines(self) -> float:
        return _share(sum(len(line) < SHORT_LINE for line in self.filled_lines), len(self.filled_lines))

    @property
    def finished_lines(self) -> float:
        return _share(sum(map(_ends_sentence, self.filled_lines)), len(self.filled_lines))

    @property
    def lettered_words(self) -> float:
        return _share(sum(map(_has_letter, self.words)), len(self.words))

    @property
    def sentences(self) -> int:
        """Every line ends one."""
        return len(self.filled_lines) + len(SENTENCE_END.findall(self.text))

    @cached_property
    def repeated(self) -> Repeats:
        return _repeats(re.split(r"\n+", self.text), len(self.text))

    @cached_property
    def paragraphs(self) -> Repeats:
        return _repeats(re.split(r"\n{2,}", self.text.strip()), len(self.text))

    @cached_property
    def filled(self) -> Repeats:
        return _repeats(self.filled_lines, sum(map(len, self.filled_lines)))

    @cached_property
    def ngrams(self) -> NGrams:
        return ngrams(self.words)

    def per_word(self, *marks: str) -> float:
        """How often the marks come, of the number of words and symbols."""
        return _share(sum(map(self.text.count, marks)), len(self.words))

    def top_ngram(self, n: int) -> float:
        return _share(self.ngrams.top[n], len(self.text))

    def repeats(self, n: int) -> float:
        return _share(self.ngrams.repeated[n], len(self.text))


# N-grams


class NGrams(NamedTuple):
    """Characters in repeated n-grams, by n.

    top: in all occurrences of the most frequent n-gram (the first of several), its words joined by spaces; 0 where
    none comes twice. Of TOP_SIZES. repeated: in all n-grams that came before, their words joined by nothing; those
    that overlap one already counted are passed over, and aren't remembered. Of REPEATED_SIZES.
    """

    top: dict[int, int]
    repeated: dict[int, int]


def ngrams(words: list[str]) -> NGrams:
    """What is repeated of `words`, which are told apart by 64-bit hashes.

    Python's hashes differ from process to process; the counts don't. A (n+1)-gram can only recur where the n-gram that
    it begins with does, so from size to size there are fewer places to look at.
    """
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    ends = np.cumsum([0, *map(len, words)])
    places, keys = np.arange(len(words)), hashes
    top, repeated = dict.fromkeys(TOP_SIZES, 0), dict.fromkeys(REPEATED_SIZES, 0)
    for n in (*TOP_SIZES, *REPEATED_SIZES):
        places, keys = _lengthened(places, keys, hashes, n)
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        recurs = counts[group] > 1
        places, keys, group = places[recurs], keys[recurs], group[recurs]
        if not len(places):
            break
        if n in top:
            top[n] = _top_characters(places, counts[group], ends, n)
        else:
            repeated[n] = _repeated_characters(places, group, ends, n)
    return NGrams(top, repeated)


def _lengthened(places: np.ndarray, keys: np.ndarray, hashes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of places of (n-1)-grams those that have a word behind them, and the hashes of the n-grams there."""
    inside = np.searchsorted(places, len(hashes) - n, side="right")
    places, mixed = places[:inside], keys[:inside] * MIX
    return places, (mixed ^ (mixed >> np.uint64(29))) + hashes[places + n - 1]


def _top_characters(places: np.ndarray, counts: np.ndarray, ends: np.ndarray, n: int) -> int:
    first = np.argmax(counts)
    start = places[first]
    return int(counts[first] * (ends[start + n] - ends[start] + n - 1))


def _repeated_characters(places: np.ndarray, group: np.ndarray, ends: np.ndarray, n: int) -> int:
    lengths = (ends[places + n] - ends[places]).tolist()
    seen: set[int] = set()
    total = free = 0
    for place, number, length in zip(places.tolist(), group.tolist(), lengths, strict=True):
        if place >= free and number in seen:
            total, free = total + length, place + n
        elif place >= free:
            seen.add(number)
    return total


# Lines and words


class Repeats(NamedTuple):
    """The share of pieces that came before, and the share of characters that is theirs."""

    pieces: float
    characters: float


def _repeats(pieces: list[str], characters: int) -> Repeats:
    extra = Counter(pieces)
    if len(extra) == len(pieces):
        return Repeats(0.0, 0.0)
    extra.subtract(list(extra))
    repeated = sum(len(piece) * times for piece, times in extra.items())
    return Repeats(_share(extra.total(), len(pieces)), _share(repeated, characters))


def _share(part: float, whole: float) -> float:
    """0 of nothing."""
    return part / whole if whole else 0.0


def _has_letter(word: str) -> bool:
    return word.isalpha() or (len(word) > 1 and any(map(str.isalpha, word)))


def _ends_sentence(line: str) -> bool:
    last = line[-1]
    return last in ".?!" or (not last.isascii() and bool(TERMINAL.match(last)))
