"""Why a training group failed: which rank was first, what it said or what killed it, how much memory it had taken.

Each rank keeps a record beside its log, so that what is known of it outlives its process and its node.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import mirror, segments
from cluster.errors import Problem, StageFailed
from cluster.runs import remove, write_json

REMEDY = "the same command goes on from the last checkpoint"
FIRST_REMEDIES = {
    "No space left": "free disk space where the run lies",
    "Read-only file system": "make the file system that the run lies on writable again",
}
TRACEBACK_LINES = 24
LOG_LINES = 5
# What a signal that the process could not survive leaves in the record of faults, and the signal's name.
FAULTS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating-point exception": "SIGFPE",
    "Floating point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}


@dataclass(frozen=True)
class Record:
    """What a rank has told of itself. `failed` is the time of its error, in seconds since 1970."""

    rank: int
    world: int = 0
    pid: int = 0
    host: str = ""
    failed: float = 0.0
    peak_rss_mb: int = 0
    late: str = ""  # what it said when training stood still


@contextmanager
def recorded(logs: Path, rank: int, world: int) -> Iterator[None]:
    """Keep the rank's record in `logs` while the block runs; an error leaves its time there and goes on."""
    known = Record(rank, world, os.getpid(), socket.gethostname())
    write_json(_record(logs, rank), asdict(known))
    with open(_faults(logs, rank), "w") as faults:
        faulthandler.enable(faults)
        try:
            yield
        except BaseException:
            with suppress(OSError, StageFailed):  # a full disk must not hide what it is that failed
                failed = replace(known, failed=time.time(), peak_rss_mb=peak_rss_mb())
                write_json(_record(logs, rank), asdict(failed))
            raise
        finally:
            faulthandler.disable()


def tell_late(logs: Path, rank: int, world: int, words: str) -> None:
    """Leave in the rank's record that training stood still, and for whom it waited. Then the rank ends itself."""
    known = Record(rank, world, os.getpid(), socket.gethostname(), time.time(), peak_rss_mb(), words)
    with suppress(OSError, StageFailed):
        write_json(_record(logs, rank), asdict(known))


def forget(logs: Path) -> None:
    """Take away what an earlier attempt's ranks told: of one that dies before it begins, it would be untrue."""
    names = {*mirror.children(logs), *(path.name for path in logs.glob("*"))}  # there, and left on this machine
    for name in names:
        if re.fullmatch(r"rank-\d+\.(json|faults)", name):
            remove(logs / name)


def peak_rss_mb() -> int:
    """The most memory that this process has held so far, in MB (resident set size)."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes // (1024 * 1024 if sys.platform == "darwin" else 1024)


def explained(error: Exception, folder: Path) -> Problem:
    """What to tell of a TrainingFailedError of `folder`'s group."""
    if failures := getattr(error, "worker_failures", None):
        return of_ranks(failures, folder)
    cause = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return Problem(f"training failed outside its workers: {cause[0]}", _remedy(str(error)))


def of_ranks(failures: dict[int, Exception], folder: Path) -> Problem:
    """What to tell of the ranks of `folder`'s group that `failures` names: the first that failed, in its own words.

    A rank that dies takes the others with it, whose errors then say that a connection closed. So one that Ray found
    dead was the first; where none was, the earliest to raise is.
    """
    records = {rank: _read(folder / "logs", rank) for rank in failures}
    late = sorted((record.failed, record.late, _who(record)) for record in records.values() if record.late)
    if late:
        _, words, who = late[0]
        return Problem(f"{who} gave up, {words}", f"look at that rank's machine, or raise deadline_s; {REMEDY}")
    dead = sorted(rank for rank, failure in failures.items() if hasattr(failure, "health_check_failure"))
    if dead:
        return _of_death(dead[0], records[dead[0]], failures[dead[0]], folder)
    first = min(failures, key=lambda rank: (records[rank].failed, rank))
    return _of_error(records[first], str(failures[first]), folder / "logs")


def _of_error(record: Record, said: str, logs: Path) -> Problem:
    lines = said.strip().splitlines()
    shown = lines if len(lines) <= TRACEBACK_LINES else ["…", *lines[-TRACEBACK_LINES:]]
    what = [
        f"{_who(record)} failed first: {lines[-1]}",
        *(f"    {line}" for line in shown),
        f"    memory: {record.peak_rss_mb:,} MB at most",
        *_last_lines(logs, record.rank),
    ]
    return Problem("\n".join(what), _remedy(said))


def _of_death(rank: int, record: Record, failure: Exception, folder: Path) -> Problem:
    logs = folder / "logs"
    what = [
        f"{_who(record)} died first: {_signal(logs, record)}",
        f"    Ray: {_short(failure)}",
        *_memory(folder),
        *_last_lines(logs, rank),
    ]
    return Problem("\n".join(what), f"if memory ran out, lower micro_batch or add workers; {REMEDY}")


def _remedy(said: str) -> str:
    for words, first in FIRST_REMEDIES.items():
        if words in said:
            return f"{first}; {REMEDY}"
    return REMEDY


def _who(record: Record) -> str:
    if not record.pid:
        return f"rank {record.rank} (which had not begun)"
    return f"rank {record.rank} of {record.world} (process {record.pid} on {record.host})"


def _signal(logs: Path, record: Record) -> str:
    """The signal's name. One that leaves no trace cannot be caught, or took the whole node."""
    path = _faults(logs, record.rank)
    text = path.read_text(errors="replace") if path.exists() else ""
    for words, name in FAULTS.items():
        if words in text:
            return f"{name}; see {path}"
    if mirror.key_of(path) and not path.exists():
        return f"see {path} on {record.host}, if that is still there"
    return "no trace of a fault, as SIGKILL leaves none (out of memory, kill -9, or its node is gone)"


def _memory(folder: Path) -> list[str]:
    for line in reversed(_lines(folder / "metrics.jsonl")):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # the line was being written
        if "peak_rss_mb" in record:  # which an earlier version did not write
            return [f"    memory: {record['peak_rss_mb']:,.0f} MB at most in any rank by step {record['step']}"]
    return []


def _last_lines(logs: Path, rank: int) -> list[str]:
    path = logs / f"rank-{rank}.log"
    lines = _lines(path)[-LOG_LINES:]
    return [f"    the last lines of {mirror.shown(path)}:", *(f"        {line}" for line in lines)] if lines else []


def _lines(path: Path) -> list[str]:
    """Of a file that grew; none if there is no such file."""
    try:
        return segments.read(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _short(failure: Exception) -> str:
    """Ray's words, without the lines that say what can be the cause of anything."""
    text = " ".join(str(getattr(failure, "health_check_failure", failure)).split())
    return re.split(r" Some common causes| There are some potential root causes", text)[0]


def _read(logs: Path, rank: int) -> Record:
    try:
        return Record(**json.loads(mirror.read(_record(logs, rank))))
    except (OSError, ValueError):
        return Record(rank)  # it failed before it could tell


def _record(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.json"


def _faults(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.faults"
