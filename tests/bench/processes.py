"""What a benchmark compares are often processes of their own: run to their end, followed, stopped, killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.bench.measure import Invalid
from tests.commands import environment
from tests.nodes import kill_all

LOOK_EVERY_S = 0.01  # where a moment is measured
NO_ANSWER_S = 600.0
TOLD = 2000  # characters of what a failed process printed


class Seen(NamedTuple):
    """A line of a JSON-lines file, and when it was there (seconds since 1970)."""

    record: dict[str, Any]
    at: float


def answer(words: list[str], variables: dict[str, str] | None = None) -> dict[str, Any]:
    """The last line that a command prints, as JSON. Raises Invalid if it fails. variables: its whole environment."""
    done = subprocess.run(words, env=variables or environment(), capture_output=True, text=True)
    if done.returncode:
        raise Invalid(f"{_short(words)} ended with {done.returncode}:\n{done.stderr[-TOLD:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def running(words: list[str], log: Path, variables: dict[str, str] | None = None) -> Iterator[psutil.Popen]:
    """The command in the background, its output in `log`; what still lives at the end is killed, by process id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        process = psutil.Popen(words, env=variables or environment(), stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        kill_all([*_descendants(process), process])


def stop(process: psutil.Popen, within_s: float = 60.0) -> None:
    """Ask a process to end. What still lives of it and of all that it has started is killed, by process id."""
    family = [*_descendants(process), process]
    process.terminate()
    with suppress(psutil.TimeoutExpired):
        process.wait(within_s)
    kill_all(family)


def followed(
    words: list[str], log: Path, path: Path, variables: dict[str, str] | None = None, every_s: float = LOOK_EVERY_S
) -> list[Seen]:
    """Run a command that appends to the JSON-lines file `path`: its lines. Raises Invalid if the command fails.

    Looking takes time from what is looked at, 1.4 % of a core a hundred times a second: `every_s` is how often.
    """
    with running(words, log, variables) as process:
        seen = list(lines(path, lambda: process.poll() is None, every_s))
        if process.wait():
            printed = log.read_text(errors="replace")[-TOLD:]
            raise Invalid(f"{_short(words)} ended with {process.returncode}:\n{printed}")
    return seen


def lines(path: Path, going_on: Callable[[], bool], every_s: float = LOOK_EVERY_S) -> Iterator[Seen]:
    """Each line of `path` once, as it comes, though the file may be replaced by one with some of the same lines."""
    known: set[bytes] = set()
    before = None
    while True:
        last_look = not going_on()
        if (now := _stamp(path)) != before:
            before, at = now, time.time()
            fresh = [line for line in _whole_lines(path) if line not in known]
            known.update(fresh)
            yield from (Seen(json.loads(line), at) for line in fresh)
        if last_look:
            return
        time.sleep(every_s)


def when(true: Callable[[], Any], what: str, process: psutil.Popen) -> float:
    """The time (seconds since 1970) at which something is first seen to be true. Raises Invalid if it never is."""
    deadline = time.monotonic() + NO_ANSWER_S
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Invalid(f"{what} did not come")
        time.sleep(LOOK_EVERY_S)
    return time.time()


def python(module: str, order: dict[str, Any]) -> list[str]:
    """The words that run one of our own modules with an order as JSON."""
    return [sys.executable, "-m", module, json.dumps(order, default=str)]


def torchrun(workers: int, order: dict[str, Any], *script: str, interpreter: str = sys.executable) -> list[str]:
    """The words that run a script with an order as JSON in `workers` processes of this machine."""
    start = [interpreter, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return [*start, *script, json.dumps(order, default=str)]


def _descendants(process: psutil.Popen) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size


def _whole_lines(path: Path) -> list[bytes]:
    with suppress(FileNotFoundError):
        return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return []


def _short(words: list[str]) -> str:
    return " ".join(words[1:4])
