"""Memory of a process and all that it started, as PSS: pages that several share are counted once in all."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

EVERY_S = 1.0
IDLE_S = 15.0  # until Ray has started all that it starts by itself
IDLE_RAY = (
    "import sys; from cluster.local import ray_session\n"
    "with ray_session(None, int(sys.argv[1])): print('ready', flush=True); sys.stdin.read()"
)


class Failed(Exception):
    """The command under measurement ended with an error."""


def peak(command: list[str], log: Path) -> int:
    """The most bytes that the command and its descendants held at once. Raises Failed if it fails."""
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        most = 0
        while process.poll() is None:
            most = max(most, held(process.pid))
            threading.Event().wait(EVERY_S)
    if process.returncode:
        raise Failed(f"{' '.join(command)} ended with {process.returncode}, see {log}")
    return most


def idle_ray(object_store_mb: int) -> int:
    """Bytes held by a process that has started Ray as we start it, and by Ray, with nothing to do."""
    with _idle(object_store_mb) as process:
        threading.Event().wait(IDLE_S)
        return held(process.pid)


def held(pid: int) -> int:
    """Bytes of PSS of a process and its descendants now; those that end meanwhile count nothing."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    return sum(_pss(process) for process in family)


@contextmanager
def _idle(object_store_mb: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", IDLE_RAY, str(object_store_mb)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise Failed("Ray didn't start")
        yield process
    finally:
        process.communicate()  # closes its input, at which it ends


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0
