"""A page to documents: mended, judged, masked, cut. What isn't taken is said, with the rule and the measured value.

1. Characters are repaired (`unicode`), of books also lines and hyphens (`books`).
2. The rules of the source's sets judge the page as a whole (`quality`).
3. Personal data are masked (`personal`).
4. A page longer than `max_characters` is cut, where it can be before a chapter, else after a blank line.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipelines.corpus import books, personal, quality
from pipelines.corpus.records import Document, Dropped, Page, Refusal
from pipelines.corpus.unicode import repair
from pipelines.schema import IngestSettings, Source


@dataclass
class Cleaner:
    """What is done with the pages of a source. `masked` counts what was masked, by kind."""

    source: Source
    settings: IngestSettings
    masked: Counter[str] = field(default_factory=Counter)

    def documents(self, page: Page) -> Iterator[Document | Dropped]:
        """The documents of a page, or why there are none."""
        text = repair(page.text)
        if page.kind == "book":
            text = books.mend(text).text
        if len(text) < self.settings.min_characters:
            yield self._drop(page, text, "too short", float(len(text)), "characters")
            return
        sets = self.source.rules if self.source.rules is not None else quality.DEFAULT_SETS[page.kind]
        verdict = quality.judge(text, sets, {**self.settings.thresholds, **self.source.thresholds})
        if verdict.broken:
            yield self._drop(page, text, verdict.broken, verdict.value, "")
            return
        if len(verdict.text) < self.settings.min_characters:
            yield self._drop(page, text, "too short", float(len(verdict.text)), "characters that the rules left")
            return
        masked, counts = personal.mask(verdict.text, self.settings.mask)
        self.masked.update(counts)
        yield from self._cut(page, masked)

    def refused(self, refusal: Refusal, url: str, kind: str) -> Dropped:
        """What was refused when it was read, as a row of `dropped`."""
        page = Page((refusal.url or url).encode("utf-8", "backslashreplace").decode(), refusal.text, kind, {})
        return self._drop(page, refusal.text, refusal.reason, refusal.value, refusal.detail)

    def contaminated(self, document: Document, runs: int) -> Dropped:
        return Dropped(*document, "contaminated", float(runs), "runs of words shared with what will be evaluated")

    def _cut(self, page: Page, text: str) -> Iterator[Document]:
        chapters = books.chapters(text) if page.kind == "book" else []
        pieces = cut(text, self.settings.max_characters, chapters, self.settings.min_characters)
        for number, piece in enumerate(pieces, start=1):
            place = {"piece": number, "pieces": len(pieces)} if len(pieces) > 1 else {}
            name = document_id(self.source.name, page.url, number, piece)
            yield Document(name, piece, *self._labels(page), _json({**page.meta, **place}))

    def _drop(self, page: Page, text: str, reason: str, value: float | None, detail: str) -> Dropped:
        """A row of `dropped`. People look at those more than at documents: what is personal is masked all the same."""
        safe, _ = personal.mask(repair(text), personal.KINDS)
        name = document_id(self.source.name, page.url, 0, safe)
        return Dropped(name, safe, *self._labels(page), _json(page.meta), reason, value, detail)

    def _labels(self, page: Page) -> tuple[str, str, str, str]:
        """kind, source, url, licence."""
        return page.kind, self.source.name, page.url, page.licence or self.source.licence or "unknown"


def cut(text: str, longest: int, chapters: list[int], shortest: int = 1) -> list[str]:
    """`text` in pieces of at most `longest` characters that join to it again; the last has `shortest` at least, where
    that is no more than half of `longest`.

    Each ends, if one lies in its second half, before the last chapter (offsets in `chapters`, ascending), else after
    the last blank line, else line, else space.
    """
    pieces, start = [], 0
    while len(text) - start > longest:
        latest = min(start + longest, max(len(text) - shortest, start + longest // 2 + 1))
        end = _break(text, start + longest // 2, latest, chapters)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def document_id(source: str, url: str, piece: int, text: str) -> str:
    """16 hex digits that name a document by where it comes from and what it says."""
    return hashlib.sha256("\0".join([source, url, str(piece), text]).encode()).hexdigest()[:16]


def _break(text: str, earliest: int, latest: int, chapters: list[int]) -> int:
    chapter = bisect.bisect_right(chapters, latest) - 1
    if chapter >= 0 and chapters[chapter] > earliest:
        return chapters[chapter]
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, earliest, latest)
        if at >= 0:
            return at + len(mark)
    return latest


def _json(meta: dict) -> str:
    return json.dumps(meta, ensure_ascii=False, sort_keys=True)
