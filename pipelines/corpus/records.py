"""What passes between the steps of `ingest`: a page as it was read, a document that is kept, one that is dropped."""

from __future__ import annotations

from typing import NamedTuple


class Page(NamedTuple):
    """A text as it was found, not yet mended, judged or cut.

    url: where it came from. kind: book, article, web or code. meta: what else is known of it, as JSON values; of code
    also `repository`, shared by the files of one, and `language`. licence: its own, where the file says one, else that
    of the source holds.
    """

    url: str
    text: str
    kind: str
    meta: dict[str, str | int]
    licence: str | None = None


class Refusal(Exception):
    """Why something isn't taken.

    reason: one of a few, without figures, by which drops are counted. value: what was measured, if anything was.
    detail: what else helps its owner. text: what was thrown away, as far as it could be read: kept with the drop.
    """

    def __init__(self, reason: str, detail: str = "", url: str = "", text: str = "", value: float | None = None):
        super().__init__(reason, detail)
        self.reason, self.detail, self.url, self.text, self.value = reason, detail, url, text, value


class Document(NamedTuple):
    """A row of `documents`. `meta` is a JSON object."""

    id: str
    text: str
    kind: str
    source: str
    url: str
    licence: str
    meta: str


class Dropped(NamedTuple):
    """A row of `dropped`: what a document would have been, and why it is none.

    reason: one of a few. value: what was measured. detail: says more.
    """

    id: str
    text: str
    kind: str
    source: str
    url: str
    licence: str
    meta: str
    reason: str
    value: float | None
    detail: str
