"""File systems of a test's own, to be filled or made read-only. They need root; where that is missing, tests skip."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.nodes import kill_all

CLOSED_S = 60.0


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of that size mounted at `folder`, gone at the end."""
    folder.mkdir(parents=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a disk of a test's own needs root: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is free; the file that took it."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as handle:
        try:
            while True:
                handle.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return filler


def make_read_only(disk: Path) -> None:
    """Refused by the kernel for as long as some process has a file there open for writing: whoever has is ended."""
    kill_all([one for one in psutil.process_iter() if _has_open(one, disk)])
    deadline = time.monotonic() + CLOSED_S
    while True:
        try:
            return _mount("-o", "remount,ro", str(disk))
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _has_open(process: psutil.Process, disk: Path) -> bool:
    with suppress(psutil.Error, OSError):
        return any(os.readlink(name).startswith(f"{disk}/") for name in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def make_writable(disk: Path) -> None:
    _mount("-o", "remount,rw", str(disk))


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True, text=True)
