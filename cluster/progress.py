"""What a command tells while it works: progress bars in a terminal, lines elsewhere, and logs in the run folder."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster import mirror
from cluster.segments import growing

LINE_EVERY_S = 10.0

console = Console(stderr=True)


class Report(Protocol):
    """Says how far the work is."""

    def __call__(self, done: float, note: str = "") -> None:
        """`done` units so far; `note` is a short text beside the bar."""


@contextmanager
def progress(title: str, total: float, unit: str) -> Iterator[Report]:
    """A bar titled `title` over `total` units, until the block ends."""
    with _bar(title, total, unit) if console.is_terminal else _lines(title, total, unit) as report:
        yield report


@contextmanager
def _bar(title: str, total: float, unit: str) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[note]}}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=total, note="")

        def report(done: float, note: str = "") -> None:
            bars.update(task, completed=done, note=note)

        yield report


@contextmanager
def _lines(title: str, total: float, unit: str) -> Iterator[Report]:
    last = time.monotonic()

    def report(done: float, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            console.print(f"{title}: {done:,.0f} of {total:,.0f} {unit} {note}".rstrip(), highlight=False)

    yield report


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what the project logs to `path` for as long as the block lasts."""
    mirror.make(path.parent)
    with growing(path), _logged(path):
        yield


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Show what the project warns of to whoever watches the command, for as long as the block lasts."""
    log, handler = logging.getLogger("headwater"), _Shown(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Shown(logging.Handler):
    """Shows a warning once, however often it is met; not errors, which are told when they end the command."""

    def __init__(self, level: int):
        super().__init__(level)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage()
        if record.levelno == logging.WARNING and words not in self._told:
            self._told.add(words)
            console.print(f"warning: {words}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    log = logging.getLogger("headwater")
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """Loses what a full disk can't take: the error that ends the work is the one to tell, not one of the log's."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # closing tries once more to write what is left
            super().close()


@contextmanager
def copied_output(path: Path) -> Iterator[None]:
    """Append all that this process and its children print to `path` as well, as it comes, until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with growing(path), _copied(path):
        yield


@contextmanager
def _copied(path: Path) -> Iterator[None]:
    read, write = os.pipe()
    kept = [os.dup(1), os.dup(2)]
    # The copier owns its ends and closes them when the last child is gone: a child may outlive the block.
    targets = [os.dup(1), os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)]
    copier = threading.Thread(target=_copy, args=(read, targets), daemon=True)
    copier.start()
    for number in (1, 2):
        os.dup2(write, number)
    os.close(write)
    try:
        yield
    finally:
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
        copier.join(5.0)


def _copy(source: int, targets: list[int]) -> None:
    while chunk := os.read(source, 1 << 16):
        for target in targets:
            with suppress(OSError):  # a full disk, or a terminal that has gone: the other still gets it
                os.write(target, chunk)
    for done in (source, *targets):
        os.close(done)
