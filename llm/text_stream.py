"""Text piece by piece as ids come: never half a character, never a stop string or the beginning of one."""

from __future__ import annotations

from collections.abc import Callable

# A character cut off between two tokens decodes to one of these at the end of the text.
UNFINISHED = "\ufffd"
# Ids decoded together at most, and how many of them stay as context for the next: UTF-8 characters have four bytes, so
# an unfinished one lies within the last three ids. The oldest id's own text may be misspelt (half a character, a
# leading space lost); it was shown before.
WINDOW, CONTEXT = 8, 4


class TextStream:
    """The text of one answer. All pieces joined are `decode(all ids)`, cut before the first stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()):
        """`decode` turns a list of ids into text."""
        self.decode = decode
        self.stop = stop
        self.stopped = False  # a stop string has come; what follows it is not text
        self._ids: list[int] = []  # the window that is decoded
        self._shown = ""  # how much of its text has left the window
        self._held = ""  # text that may turn out to begin a stop string

    def push(self, token: int) -> str:
        """Take the next id; return the text that is now certain, often "" and at times more than one token's."""
        self._ids.append(token)
        text = self.decode(self._ids)
        certain = text.removesuffix(UNFINISHED)
        piece = certain[len(self._shown) :]
        self._shown = certain
        if len(self._ids) >= WINDOW:
            self._ids = self._ids[-CONTEXT:]
            self._shown = self.decode(self._ids).removesuffix(UNFINISHED)
        return self._before_stop(piece)

    def finish(self) -> str:
        """The rest of the text once no more ids come: what a stop string could have begun, an unfinished character."""
        rest = self._before_stop(self.decode(self._ids)[len(self._shown) :])
        if self.stopped:
            return rest
        held, self._held = self._held, ""
        return rest + held

    def _before_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
