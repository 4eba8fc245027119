"""A real S3 server for tests, SeaweedFS, and a network in front of it that can be bad."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.fs

from tests.nodes import free_port, kill_all, reachable

KEY, SECRET, BUCKET = "headwater", "not-a-real-secret", "bucket"
WEED = Path(sys.executable).parent / "weed"
READY_S = 60.0
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Server:
    """`weed server` with one bucket, and the proxy by which everyone reaches it."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: psutil.Popen | None = None

    def start(self) -> None:
        """Start it, or start it again with all that it held."""
        config = self.folder / "s3.json"
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        config.write_text(json.dumps({"identities": [identity]}))
        ports = {name: free_port() for name in PORTS}
        words = [
            *(str(WEED), "-logtostderr=false", f"-logdir={self.folder}", "server", f"-dir={self.folder}", "-s3"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={self.port}", f"-s3.config={config}"),
            *("-s3.autoCreateBucket=false", "-volume.max=50", "-master.volumeSizeLimitMB=64"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}={port}" for name, port in ports.items())),
        ]
        with open(self.folder / "weed.log", "ab") as log:
            self.process = psutil.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + READY_S
        system = filesystem(self.port, allow_bucket_creation=True)
        while True:
            try:
                system.create_dir(BUCKET)
                with system.open_output_stream(f"{BUCKET}/.ready") as handle:
                    handle.write(b"1")
                return system.delete_file(f"{BUCKET}/.ready")
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def kill(self) -> None:
        """The server is gone, at once."""
        if self.process:
            kill_all([self.process, *self.process.children(recursive=True)])
        self.process = None


PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
    "s3.port.grpc",
)


class Proxy:
    """A TCP proxy in front of a server.

    `bytes_per_s` slows what goes to the server; `cut_after` ends that many connections amid their first megabyte;
    `slow_down` answers that many requests with 503 SlowDown; `open` False ends connections, new ones at once.
    """

    def __init__(self, target: int, host: str):
        self._target, self.host = target, host
        self.port = free_port()
        self.bytes_per_s = self.cut_after = self.slow_down = 0
        self.cut = self.told = 0  # how often it did
        self._open = True
        self._ends: set[socket.socket] = set()
        self._listener = self._listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _listen(self) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(64)
        return listener

    @property
    def open(self) -> bool:
        return self._open

    @open.setter
    def open(self, value: bool) -> None:
        self._open = value
        if not value:
            self._end_all()

    def close(self) -> None:
        self.open = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        self._listener.close()

    def _end_all(self) -> None:
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket()
        try:
            if not self._open:
                return
            server.connect(("127.0.0.1", self._target))
            self._ends |= {client, server}
            threading.Thread(target=self._answers, args=(server, client), daemon=True).start()
            self._requests(client, server)
        except OSError:
            pass
        finally:
            for end in (client, server):
                self._ends.discard(end)
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        while data := client.recv(1 << 15):
            if self.slow_down and data.split(b" ", 1)[0] in (b"PUT", b"POST", b"GET", b"HEAD", b"DELETE"):
                self.slow_down -= 1
                self.told += 1
                body = b"" if data.startswith(b"HEAD") else SLOW_DOWN
                head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                return client.sendall(head.encode() + body)
            passed += len(data)
            if self.cut_after and passed > 1 << 19:
                self.cut_after -= 1
                self.cut += 1
                return None
            if self.bytes_per_s:
                time.sleep(len(data) / self.bytes_per_s)
            server.sendall(data)
        return None

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


@dataclass
class Storage:
    """The server, the proxy before it, and how a command finds them."""

    server: Server
    proxy: Proxy

    @property
    def variables(self) -> dict[str, str]:
        """The environment of whoever uses it."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.proxy.host}:{self.proxy.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            # a caller's own must not win
            "AWS_ENDPOINT_URL_S3": "",
            "AWS_SESSION_TOKEN": "",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects, without the bucket's."""
        selector = pyarrow.fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        found = filesystem(self.server.port).get_file_info(selector)
        return sorted(one.path[len(BUCKET) + 1 :] for one in found if one.is_file)


def filesystem(port: int, **options) -> pyarrow.fs.S3FileSystem:
    """Straight to the server, past the proxy."""
    return pyarrow.fs.S3FileSystem(
        access_key=KEY,
        secret_key=SECRET,
        region="us-east-1",
        scheme="http",
        endpoint_override=f"127.0.0.1:{port}",
        **options,
    )


@contextmanager
def storage(folder: Path, host: str = "127.0.0.1") -> Iterator[Storage]:
    """An empty bucket on a server that is gone at the end, reached at the address `host` of this machine."""
    folder.mkdir(parents=True)
    server = Server(folder)
    proxy = Proxy(server.port, host)
    try:
        server.start()
        yield Storage(server, proxy)
    finally:
        proxy.close()
        server.kill()
        assert not reachable(server.port)
        assert not reachable(proxy.port, host)
