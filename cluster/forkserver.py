"""Workers forked from a process that has imported what they need, so that their start costs no imports.

`python -m cluster.forkserver LISTENING_FD ALIVE_FD MODULE…` imports the modules and then, for each connection of
`cluster/launch.py`, forks a child that runs the script asked for as `python SCRIPT …` would. It ends when the other
end of ALIVE_FD is closed: with the driver, whatever ends that. Its children end with it.

What may be forked is narrow: a process without a second thread (a lock held by a thread that isn't copied is held
for ever), and without Ray, whose ids are drawn from a state that children would share.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_REQUEST_BYTES = 4 * 2**20
STANDARD_FDS = 3  # input, output and errors travel with a request
BEGUN = b"+"  # said to a launcher when its process is there; without it, nothing has happened
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """One process to be: what `python *argv` would find, but for its imports."""

    argv: list[str]
    folder: str
    environment: dict[str, str]
    fds: list[int]


def main(arguments: list[str]) -> None:
    listening, alive = (int(number) for number in arguments[:2])
    del sys.path[0]  # the folder of whoever started this, where any module could be shadowed
    for module in arguments[2:]:
        importlib.import_module(module)
    _refuse_company()
    serve(socket.socket(fileno=listening), alive)


def _refuse_company() -> None:
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1 or "ray" in sys.modules:
        sys.exit(f"can't fork safely: {threads} threads, Ray {'' if 'ray' in sys.modules else 'not '}imported")


def serve(listening: socket.socket, alive: int) -> None:
    """Fork for whoever connects and is the same user, until `alive` is closed at its other end."""
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ, lambda: _accept(listening, selector))
        selector.register(alive, selectors.EVENT_READ, sys.exit)
        while True:
            for key, _ in selector.select():
                if selector.get_map().get(key.fd) is key:  # not taken off by one before it
                    key.data()


def _accept(listening: socket.socket, selector: selectors.BaseSelector) -> None:
    connection, _ = listening.accept()
    request = _receive(connection) if _same_user(connection) else None
    if request is None:
        connection.close()
        return
    pid = os.fork()
    if pid == 0:
        _become(request, selector, connection)
    for fd in request.fds:
        os.close(fd)
    with contextlib.suppress(OSError):
        connection.sendall(BEGUN)
    _Child(pid, connection, selector)


def _same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()


def _receive(connection: socket.socket) -> Request | None:
    """The request of a client that says all of it at once; None of one that goes away, or says something else."""
    connection.settimeout(10)
    try:
        head, fds = _receive_fds(connection)
        (size,) = struct.unpack("!I", head)
        body = b""
        while len(body) < min(size, MAX_REQUEST_BYTES) and (part := connection.recv(size - len(body))):
            body += part
        return Request(**json.loads(body), fds=fds)
    except (OSError, ValueError, TypeError, struct.error):
        return None
    finally:
        connection.settimeout(None)


def _receive_fds(connection: socket.socket) -> tuple[bytes, list[int]]:
    numbers = array.array("i")
    room = socket.CMSG_LEN(STANDARD_FDS * numbers.itemsize)
    head, ancillary, _, _ = connection.recvmsg(struct.calcsize("!I"), room)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    if len(numbers) != STANDARD_FDS:
        raise ValueError(f"{len(numbers)} descriptors came with the request, not {STANDARD_FDS}")
    return head, list(numbers)


class _Child:
    """A forked process and the connection of its launcher: each hears of the other's end."""

    def __init__(self, pid: int, launcher: socket.socket, selector: selectors.BaseSelector):
        self.pid, self.launcher, self.selector = pid, launcher, selector
        self.ended = os.pidfd_open(pid)
        selector.register(self.ended, selectors.EVENT_READ, self._tell)
        selector.register(launcher, selectors.EVENT_READ, self._kill)

    def _tell(self) -> None:
        """The child has ended: its launcher ends the same way."""
        _, status = os.waitpid(self.pid, 0)
        self.selector.unregister(self.ended)
        os.close(self.ended)
        if self.launcher.fileno() >= 0:
            self.selector.unregister(self.launcher)
            with self.launcher, contextlib.suppress(OSError):  # which may be going at this moment
                self.launcher.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))

    def _kill(self) -> None:
        """The launcher, which never says another word, is gone: so is what it stands for."""
        self.selector.unregister(self.launcher)
        self.launcher.close()
        os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own


def _become(request: Request, selector: selectors.BaseSelector, connection: socket.socket) -> NoReturn:
    """In the child: be what was asked for, and end as Python would."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for key in list(selector.get_map().values()):
            os.close(key.fd)
        connection.close()
        _take_over(request)
        code = _run(request.argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take_over(request: Request) -> None:
    for target, fd in enumerate(request.fds):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv[:] = request.argv
    sys.path.insert(0, os.path.dirname(request.argv[0]))
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _run(argv: list[str]) -> int:
    """The exit status of the script, run as `python SCRIPT` runs it."""
    import traceback

    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return _status(end.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _status(code: Any) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main(sys.argv[1:])
