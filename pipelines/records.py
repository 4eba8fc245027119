"""The files that follow a training stage's steps, a JSON object a line.

Metrics, the ledger, held-out losses, samples of text, and events. All but the events are cut back to the checkpoint
that a stage goes on from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster import segments
from llm.guard import Window, with_window

EVENTS = "events.jsonl"  # what happened beside steps: restarts, batches left out, that it gave up, slow ranks
NAMES = ("metrics.jsonl", "ledger.jsonl", "held_out.jsonl", "samples.jsonl", EVENTS)


@contextmanager
def followed(folder: Path, step: int) -> Iterator[Callable[[], None]]:
    """Make the files ready for steps from `step` on. Gives a function after which all that was appended is safe.

    It raises StageFailed where another worker has taken over: what this one does no longer counts.
    """
    for name in NAMES:
        cut_back(folder / name, sys.maxsize if name == EVENTS else step)
    with ExitStack() as files:
        sends = [files.enter_context(segments.growing(folder / name, base=True)) for name in NAMES]

        def flush() -> None:
            for send in sends:
                send()

        yield flush


def events(folder: Path) -> list[dict[str, Any]]:
    """What happened beside the steps of the training in `folder`, oldest first."""
    return read_lines(folder / EVENTS)


def left_out(folder: Path) -> list[dict[str, Any]]:
    """The events by which batches were left out, oldest first."""
    return [event for event in events(folder) if event["event"] == "skipped"]


def windows(events: list[dict[str, Any]]) -> list[Window]:
    """The batches that those events left out."""
    found: list[Window] = []
    for event in events:
        found = with_window(found, *event["batches"])
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON line, in one write, so that a killed process leaves at most one broken line at the end."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, up to the first broken line; none if there is no file."""
    records: list[dict[str, Any]] = []
    try:
        text = segments.read(path).decode("utf-8")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def cut_back(path: Path, step: int) -> None:
    """Drop the records of `step` and later: they will be made again."""
    if not segments.exists(path):
        path.unlink(missing_ok=True)  # what this machine has of a run in object storage that knows no such file
        return
    kept = [json.dumps(record) + "\n" for record in read_lines(path) if record["step"] < step]
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


class Tail:
    """Follows a JSON-lines file of steps; a step that is made again after a restart is not handed out twice."""

    def __init__(self, path: Path, after: int):
        self._file = segments.Follower(path)
        self._last = after
        self._rest = b""

    def new(self, now: bool = False) -> list[dict[str, Any]]:
        """The records of steps not seen before; object storage is looked at every few seconds, or `now`."""
        anew, data = self._file.new(now)
        whole, _, self._rest = ((b"" if anew else self._rest) + data).rpartition(b"\n")
        fresh = [record for record in map(json.loads, whole.splitlines()) if record["step"] > self._last]
        self._last = max([self._last, *(record["step"] for record in fresh)])
        return fresh
