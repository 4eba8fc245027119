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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import mirror, objects
from cluster.errors import Problem, StageFailed

SEND_EVERY_S = 5.0
LOOK_EVERY_S = 2.0
BASE = ".base"
MANY_PIECES = 200  # after which they are made one again


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
    except BaseException:
        ended.set()
        with objects.hurried(), suppress(StageFailed):  # of two errors the first is the one to tell
            writer.flush()
        raise
    else:
        ended.set()
        writer.flush()
    finally:
        sender.join()


def _send_until(writer: _Writer, ended: threading.Event) -> None:
    while not ended.wait(SEND_EVERY_S):
        try:
            writer.flush()
        except StageFailed:  # whoever needs what is sent to be there flushes, and is told
            continue


class _Writer:
    def __init__(self, path: Path, base: bool):
        self._path, self._folder, self._base = path, str(mirror.key_of(path)), base
        self._lock = threading.Lock()
        before = self._pieces_there()
        self._attempt = 1 + max([0, *map(_attempt, before)])
        self._sent = 0 if base else _size(path)
        self._pieces = 0
        if base:
            self._put(self._take(), BASE)
            objects.delete(*before)

    def flush(self) -> None:
        """Send what is new. StageFailed if another writer has begun to replace what this one writes."""
        with self._lock:
            before = self._pieces_there() if self._base else []
            if any(_attempt(piece) > self._attempt for piece in before):
                raise StageFailed(_superseded(self._path))
            if len(before) > MANY_PIECES:
                self._sent = 0
                self._put(self._take(), BASE)
                objects.delete(*before)
            elif fresh := self._take():
                self._put(fresh, "")

    def _pieces_there(self) -> list[str]:
        return [one.path for one in objects.listing(self._folder)]

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
    return _joined(pieces)


def _joined(pieces: list[str]) -> bytes:
    with ThreadPoolExecutor(objects.AT_ONCE) as pool:
        return b"".join(part or b"" for part in pool.map(objects.get, pieces))


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

    def new(self, now: bool = False) -> tuple[bool, bytes]:
        """Whether the file began anew, and what it holds beyond what was handed on.

        Object storage is looked at every few seconds, or `now`.
        """
        return self._of_file() if self._key is None else self._of_pieces(self._key, now)

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

    def _of_pieces(self, key: str, now: bool) -> tuple[bool, bytes]:
        if not now and time.monotonic() - self._looked < LOOK_EVERY_S:
            return False, b""
        self._looked = time.monotonic()
        pieces = _that_count([one.path for one in objects.listing(key)])
        anew = self._seen[:1] != pieces[:1]
        fresh = pieces if anew else pieces[len(self._seen) :]
        self._seen = pieces
        return anew, _joined(fresh)


def _that_count(pieces: list[str]) -> list[str]:
    """From the last base on."""
    bases = [at for at, piece in enumerate(pieces) if piece.endswith(BASE)]
    return pieces[bases[-1] :] if bases else pieces


def _attempt(piece: str) -> int:
    return int(piece.rsplit("/", 1)[-1].partition("-")[0])


def _superseded(path: Path) -> Problem:
    return Problem(
        f"another worker writes {mirror.shown(path)} by now: this one was given up",
        "nothing to do, the other goes on; if there is none, the same command does",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
