"""Files that grow: as they are on a disk, as numbered segments in object storage, which has no append.

    metrics.jsonl/0003-000012        a piece that the third writer added
    metrics.jsonl/0004-000000.base   what the fourth began with: all that counts of the pieces before it

A writer appends to the file of that name on its own machine; `growing` sends what is new.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import mirror, objects
from cluster.errors import StageFailed

SEND_EVERY_S = 5.0
LOOK_EVERY_S = 2.0
BASE = ".base"


@contextmanager
def growing(path: Path, base: bool = False) -> Iterator[Callable[[], None]]:
    """Send what is appended to the file at `path`, every few seconds and at the end; gives a function that sends now.

    With `base` the file replaces all that was sent before; without, what it holds already is not sent again.
    """
    if mirror.key_of(path) is None:
        yield lambda: None
        return
    writer, ended = _Writer(path, base), threading.Event()
    sender = threading.Thread(target=_send_until, args=(writer, ended), name=f"send {path.name}", daemon=True)
    sender.start()
    try:
        yield writer.flush
    finally:
        ended.set()
        sender.join()
        writer.flush()


def _send_until(writer: _Writer, ended: threading.Event) -> None:
    while not ended.wait(SEND_EVERY_S):
        try:
            writer.flush()
        except StageFailed:  # whoever needs what is sent to be there flushes, and is told
            continue


class _Writer:
    def __init__(self, path: Path, base: bool):
        self._path, self._folder = path, str(mirror.key_of(path))
        self._lock = threading.Lock()
        before = [one.path for one in objects.listing(self._folder)]
        self._attempt = 1 + max([0, *(int(_number(name)) for name in before)])
        self._sent = 0 if base else _size(path)
        self._pieces = 0
        if base:
            self._put(self._take(), BASE)
            objects.delete(*before)

    def flush(self) -> None:
        with self._lock:
            if fresh := self._take():
                self._put(fresh, "")

    def _take(self) -> bytes:
        if not self._path.exists():
            return b""
        with open(self._path, "rb") as handle:
            handle.seek(self._sent)
            return handle.read()

    def _put(self, data: bytes, kind: str) -> None:
        objects.put(f"{self._folder}/{self._attempt:04d}-{self._pieces:06d}{kind}", data)
        self._sent += len(data)
        self._pieces += 1


def read(path: Path) -> bytes:
    """All that the file at `path` holds, wherever it was written. FileNotFoundError if there is none."""
    if (key := mirror.key_of(path)) is None:
        return path.read_bytes()
    pieces = _that_count([one.path for one in objects.listing(key)])
    if not pieces:
        raise FileNotFoundError(2, "nothing was written yet", mirror.shown(path))
    return b"".join(objects.get(piece) or b"" for piece in pieces)


def exists(path: Path) -> bool:
    """Whether anything of the file was written."""
    return path.exists() if (key := mirror.key_of(path)) is None else bool(objects.listing(key))


def modified(path: Path) -> float:
    """When something was last appended to the file, in seconds since 1970; 0 if there is none."""
    if (key := mirror.key_of(path)) is None:
        return path.stat().st_mtime if path.exists() else 0.0
    return max([0.0, *(one.mtime.timestamp() for one in objects.listing(key))])


class Follower:
    """Reads a growing file as it grows."""

    def __init__(self, path: Path):
        self._path, self._key = path, mirror.key_of(path)
        self._inode = self._offset = 0
        self._seen: list[str] = []
        self._looked = -LOOK_EVERY_S

    def new(self) -> tuple[bool, bytes]:
        """Whether the file began anew, and what it holds beyond what was handed on."""
        return self._of_file() if self._key is None else self._of_pieces(self._key)

    def _of_file(self) -> tuple[bool, bytes]:
        try:
            with open(self._path, "rb") as handle:
                inode = os.fstat(handle.fileno()).st_ino
                anew = inode != self._inode  # cutting back replaces the file
                handle.seek(0 if anew else self._offset)
                data = handle.read()
                self._inode, self._offset = inode, handle.tell()
                return anew, data
        except FileNotFoundError:
            return False, b""

    def _of_pieces(self, key: str) -> tuple[bool, bytes]:
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return False, b""
        self._looked = time.monotonic()
        pieces = _that_count([one.path for one in objects.listing(key)])
        anew = self._seen[:1] != pieces[:1]
        fresh = pieces if anew else pieces[len(self._seen) :]
        self._seen = pieces
        return anew, b"".join(objects.get(piece) or b"" for piece in fresh)


def _that_count(pieces: list[str]) -> list[str]:
    """From the last base on."""
    bases = [at for at, piece in enumerate(pieces) if piece.endswith(BASE)]
    return pieces[bases[-1] :] if bases else pieces


def _number(piece: str) -> str:
    return piece.rsplit("/", 1)[-1].partition("-")[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
