"""The driver's side of forked workers: the server that forks them, and what Ray starts them by."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LAUNCH = Path(__file__).with_name("launch.py")


@dataclass
class ForkServer:
    """A running `cluster/forkserver.py`, which ends with this process at the latest."""

    address: str
    process: subprocess.Popen
    alive: int  # while it is open in this process, the server goes on

    @property
    def py_executable(self) -> str:
        """For a runtime environment: what Ray runs in the place of `python`."""
        # Isolated and without site-packages: the launcher itself is to start at once.
        return shlex.join([sys.executable, "-I", "-S", str(LAUNCH), self.address])

    def stop(self) -> None:
        os.close(self.alive)
        self.process.wait()


def start(modules: tuple[str, ...], variables: dict[str, str]) -> ForkServer:
    """A server that imports `modules` with `variables` set, as long as it takes; who asks meanwhile waits."""
    address = f"headwater-{secrets.token_hex(16)}"
    theirs, ours = os.pipe()
    # A name of Linux' own, not of the file system's: nothing is left of it, however this process ends.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0" + address)
        listening.listen(64)
        fds = (listening.fileno(), theirs)
        command = [sys.executable, "-m", "cluster.forkserver", *map(str, fds), *modules]
        # A session of its own: Ctrl-C at a terminal is the driver's alone, as it is with Ray's own workers.
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
        )
    os.close(theirs)
    return ForkServer(address, process, ours)
