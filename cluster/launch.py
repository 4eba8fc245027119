"""`python -I -S launch.py ADDRESS SCRIPT …`: what `python SCRIPT …` does, forked by cluster/forkserver.py.

Stands where Ray starts a worker: stays until the forked process has ended and then ends as it did. Where no server
answers, the script is run by a Python of its own, as if this had not been there. Started often, so it imports little.
"""

import array
import json
import os
import signal
import socket
import struct
import sys


def main(address: str, argv: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        if not _begun(server, address, argv):
            os.execv(sys.executable, [sys.executable, *argv])
        _end_as(_answer(server))


def _begun(server: socket.socket, address: str, argv: list[str]) -> bool:
    """Whether the server has forked; it takes as long as its imports do."""
    try:
        server.connect("\0" + address)
        _ask(server, argv)
        return bool(server.recv(1))
    except OSError:
        return False


def _ask(server: socket.socket, argv: list[str]) -> None:
    wanted = {"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ)}
    body = json.dumps(wanted).encode()
    fds = array.array("i", [0, 1, 2])
    server.sendmsg([struct.pack("!I", len(body))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    server.sendall(body)


def _answer(server: socket.socket) -> int:
    """The exit status, negative for a signal; a killed process's if the server went away."""
    data = server.recv(4, socket.MSG_WAITALL)
    return struct.unpack("!i", data)[0] if len(data) == 4 else -signal.SIGKILL


def _end_as(code: int) -> None:
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
