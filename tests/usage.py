"""What the processes of a command hold: memory, handles, entries in /dev/shm."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

LOOKS, LOOK_S = 5, 1.0
GROWTH = 0.03  # of memory, between an early and a late look
HANDLES = 8  # which come and go with requests


class Usage(NamedTuple):
    """What all processes of a command hold: proportional set size, shared memory's among it, and open file handles;
    and entries in /dev/shm."""

    pss_mb: float
    shared_mb: float
    handles: float
    shm_entries: float


def usage(process: psutil.Popen) -> Usage:
    """The median of some looks."""
    looks = []
    for _ in range(LOOKS):
        time.sleep(LOOK_S)
        everyone = [process, *process.children(recursive=True)]
        held = [found for one in everyone if (found := _held(one.pid))]
        sums = [sum(column) for column in zip(*held, strict=True)]
        looks.append(Usage(*sums, len(os.listdir("/dev/shm"))))
    return Usage(*(median(column) for column in zip(*looks, strict=True)))


def compared(early: Usage, late: Usage) -> list[str]:
    """Lines of a table."""
    return [f"{name:12} {one:10,.0f} {two:10,.0f}" for name, one, two in zip(Usage._fields, early, late, strict=True)]


def assert_no_more(early: Usage, late: Usage) -> None:
    """But for what comes and goes."""
    assert late.pss_mb <= early.pss_mb * (1 + GROWTH), (early, late)
    assert late.shared_mb <= early.shared_mb * (1 + GROWTH) + 1, (early, late)
    assert late.handles <= early.handles + HANDLES, (early, late)
    assert late.shm_entries <= early.shm_entries, (early, late)


def _held(pid: int) -> tuple[float, float, int] | None:
    """None of a process that has just ended."""
    with suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        kilobytes = {line[0]: int(line[1]) for line in lines}
        return kilobytes["Pss:"] / 1024, kilobytes["Pss_Shmem:"] / 1024, len(os.listdir(f"/proc/{pid}/fd"))
    return None
