"""The check that a cluster of the tests leaves nothing can fail: what is planted is found, by name."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import nodes
from tests.nodes import TAG, Cluster


@pytest.fixture
def made(monkeypatch) -> Cluster:
    """A cluster with no node, whose folder lies where those of others do."""
    monkeypatch.setattr(nodes, "ORPHANS_S", 0.0)
    return Cluster(Path(tempfile.mkdtemp(prefix="hw-")))


@contextmanager
def planted(kind: str, made: Cluster) -> Iterator[str]:
    """Something that a cluster might leave, and how it is named."""
    name = f"hw-planted-{secrets.token_hex(4)}"
    if kind == "processes":
        sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={TAG: made.tag})
        with sleeper:
            yield str(sleeper.pid)
            assert not psutil.pid_exists(sleeper.pid) or sleeper.poll() is not None, "it is ended all the same"
    elif kind == "ports":
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            made.ports.append(listener.getsockname()[1])
            yield str(made.ports[-1])
    else:
        path = Path("/dev/shm" if kind == "/dev/shm" else tempfile.gettempdir(), name)
        path.mkdir()
        try:
            yield name
        finally:
            path.rmdir()


@pytest.mark.parametrize("kind", nodes.NOTHING)
def test_what_a_cluster_leaves_is_found(made, kind):
    with planted(kind, made) as name:
        with pytest.raises(AssertionError) as error:
            made.stop()
    assert name in str(error.value)
    assert not made.folder.exists()


def test_a_cluster_that_leaves_nothing_ends_without_a_word(made):
    made.stop()
    assert not made.folder.exists()
