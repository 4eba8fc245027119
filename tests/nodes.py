"""Real Ray nodes as processes of their own, started and killed as machines are, and a search for what they leave."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.commands import environment, wait_until

if TYPE_CHECKING:
    from tests.s3 import Storage

TAG = "HEADWATER_TEST_CLUSTER"  # in the environment of every process of a cluster, so that none is overlooked
STORE_BYTES = 120_000_000
READY_S = 180.0  # a busy machine takes over a minute to import Ray three times
LINK = "eth0"  # what a node calls its own end of its link
ORPHANS_S = 30.0  # in which a process notices that its node is gone
NOTHING: dict[str, object] = {"processes": [], "ports": [], "/dev/shm": set(), "temp folders": set()}
OURS = ("ray", "hw-", "headwater-")  # how temp folders begin that Ray or we make


@dataclass
class Node:
    """A `ray start --block` and all that it has started."""

    process: psutil.Popen
    log: Path
    cable: str = ""  # the host's end of the node's link, if it has a network of its own

    def family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def named(self, name: str) -> list[psutil.Process]:
        """The node's processes whose command line holds `name`, by pid."""
        return sorted((one for one in self.family() if name in title(one)), key=lambda one: one.pid)

    def kill(self) -> None:
        """The machine is gone: everything on it, at once."""
        kill_all(self.family())
        self.process.wait(30)

    def cut(self) -> None:
        """Nothing reaches the node, and nothing leaves it."""
        _ip("link", "set", self.cable, "down")

    def heal(self) -> None:
        _ip("link", "set", self.cable, "up")


@dataclass
class Cluster:
    """A head and workers on this machine, with token authentication, each node with ports of its own."""

    folder: Path
    tag: str = field(default_factory=lambda: secrets.token_hex(8))
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    port: int = 0
    dashboard_port: int = 0
    nodes: list[Node] = field(default_factory=list)
    started: int = 0
    ports: list[int] = field(default_factory=list)  # of all nodes, those that are gone among them
    store_before: set[str] = field(default_factory=lambda: set(os.listdir("/dev/shm")))
    temp_before: set[str] = field(default_factory=lambda: temp_folders())
    network: Network | None = None
    storage: Storage | None = None
    redis: Redis | None = None

    @property
    def head_ip(self) -> str:
        return self.network.head_ip if self.network else "127.0.0.1"

    @property
    def address(self) -> str:
        """Of the Jobs API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def headers(self) -> dict[str, str]:
        """What a request to the dashboard has to carry."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def variables(self) -> dict[str, str]:
        """The environment of everything that may talk to the cluster. A job's `python` is the one that runs Ray, as
        it is in an image, whether or not its virtual environment was activated here."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        runs = {**self.storage.variables, "HEADWATER_CACHE": str(self.cache)} if self.storage else {}
        behind = {"RAY_REDIS_ADDRESS": self.redis.address} if self.redis else {}
        return {**environment(), **token, **runs, **behind, "PATH": path, TAG: self.tag}

    @property
    def cache(self) -> Path:
        """Where each machine keeps its copy of object storage: one path, and on each node a disk of its own."""
        return self.folder / "cache"

    def caches(self) -> list[Path]:
        """The nodes' disks as this process sees them."""
        return sorted(self.folder.glob("disk-*"))

    def start_head(self) -> Node:
        """A head without CPUs for work. Started again, it takes the ports that it had."""
        self.port = self.port or self._new_port()
        self.dashboard_port = self.dashboard_port or self._new_port()
        head = self._start(
            "--head",
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard_port}",
            "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={self._new_port()}",
            "--num-cpus=0",
            *([f"--redis-password={self.redis.password}"] if self.redis else []),
        )
        self._wait(lambda: reachable(self.dashboard_port), "the dashboard")
        return head

    def start_worker(self, cpus: int = 1) -> Node:
        place = self.network.place() if self.network else None
        return self._start(f"--address={self.head_ip}:{self.port}", f"--num-cpus={cpus}", place=place)

    def _start(self, *flags: str, place: Place | None = None) -> Node:
        self.started += 1
        log, temp = self.folder / f"node-{self.started}.log", self.folder / str(self.started)
        words = [
            *(["ip", "netns", "exec", place.namespace] if place else []),
            *(self._with_disk() if self.storage else []),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={place.ip if place else self.head_ip}", f"--object-store-memory={STORE_BYTES}"),
            *(f"--dashboard-agent-listen-port={self._new_port()}", f"--metrics-export-port={self._new_port()}"),
            f"--temp-dir={temp}",
            *flags,
        ]
        link = {"GLOO_SOCKET_IFNAME": LINK} if place else {}
        with open(log, "wb") as output:
            process = psutil.Popen(words, env=self.variables | link, stdout=output, stderr=subprocess.STDOUT)
        node = Node(process, log, place.cable if place else "")
        self.nodes.append(node)
        self._wait(lambda: "Ray runtime started" in log.read_text(errors="replace"), f"a node ({log})")
        return node

    def _new_port(self) -> int:
        self.ports.append(free_port())
        return self.ports[-1]

    def _with_disk(self) -> list[str]:
        """Runs the words that follow where the cache is a folder that no other node sees there."""
        disk = self.folder / f"disk-{self.started}"
        for folder in (disk, self.cache):
            folder.mkdir(exist_ok=True)
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh", str(disk), str(self.cache)]

    def _wait(self, ready, what: str) -> None:
        deadline = time.monotonic() + READY_S
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} was not ready after {READY_S} s")
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """All that carries the cluster's tag, jobs and workers included."""
        return [one for one in psutil.process_iter() if _carries(one, self.tag)]

    def stop(self) -> None:
        """End every node by process id. AssertionError names what did not go with them."""
        for node in self.nodes:
            node.kill()
        left: dict[str, object] = {"processes": self._left_after(ORPHANS_S)}
        kill_all(self.processes())
        left["ports"] = [port for port in self.ports if reachable(port) or reachable(port, self.head_ip)]
        shutil.rmtree(self.folder)
        left["/dev/shm"] = set(os.listdir("/dev/shm")) - self.store_before
        left["temp folders"] = temp_folders() - self.temp_before
        if left != NOTHING:  # pytest explains the assertions of test modules alone
            raise AssertionError(f"the cluster left {left}")

    def _left_after(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{one.pid} {title(one)}" for one in left]


@contextmanager
def cluster(
    workers: int = 2,
    cpus: int = 1,
    network: Network | None = None,
    storage: Storage | None = None,
    redis: Redis | None = None,
) -> Iterator[Cluster]:
    """A head and `workers` nodes of `cpus` CPUs each, gone without a trace at the end.

    With `storage` runs may lie in it, and each node has a disk of its own for what it fetches.
    """
    folder = Path(tempfile.mkdtemp(prefix="hw-", dir="/tmp"))  # sockets lie in it: the path must be short
    made = Cluster(folder, network=network, storage=storage, redis=redis)
    try:
        made.start_head()
        for _ in range(workers):
            made.start_worker(cpus)
        yield made
    finally:
        made.stop()


@dataclass
class Redis:
    """What a head can keep its tables in, so that the next head finds them."""

    port: int
    password: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    """A Redis server on loopback, ended by process id. Skips where there is none to start."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server")
    made = Redis(free_port(), secrets.token_hex(16))
    words = ["redis-server", "--bind", "127.0.0.1", "--port", str(made.port), "--dir", str(folder), "--save", ""]
    process = psutil.Popen([*words, "--requirepass", made.password], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: reachable(made.port), "Redis", 20)
        yield made
    finally:
        kill_all([process])


@dataclass
class Place:
    """Where a node of a network lives: a namespace with an address, and the host's end of its link."""

    namespace: str
    cable: str
    ip: str


@dataclass
class Network:
    """A bridge on this machine. Each node but the head has a namespace, an address and a link of its own."""

    name: str
    subnet: str
    places: list[Place] = field(default_factory=list)

    @property
    def head_ip(self) -> str:
        return f"{self.subnet}.1"

    def place(self) -> Place:
        """A namespace linked to the bridge."""
        number = len(self.places) + 2
        made = Place(f"{self.name}-{number}", f"{self.name}v{number}", f"{self.subnet}.{number}")
        self.places.append(made)
        _ip("netns", "add", made.namespace)
        _ip("link", "add", made.cable, "type", "veth", "peer", "name", LINK, "netns", made.namespace)
        _ip("link", "set", made.cable, "master", self.name, "up")
        _ip("-n", made.namespace, "addr", "add", f"{made.ip}/24", "dev", LINK)
        for link in ("lo", LINK):
            _ip("-n", made.namespace, "link", "set", link, "up")
        return made


@contextmanager
def bridge() -> Iterator[Network]:
    """A network that is gone at the end. Skips where this process may not make one."""
    made = Network(f"hw{secrets.token_hex(3)}", f"10.213.{secrets.randbelow(250) + 1}")
    try:
        _ip("link", "add", made.name, "type", "bridge")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and the command ip: {error}")
    try:
        _ip("addr", "add", f"{made.head_ip}/24", "dev", made.name)
        _ip("link", "set", made.name, "up")
        yield made
    finally:
        for place in made.places:
            with suppress(subprocess.CalledProcessError):  # it was never made
                _ip("netns", "del", place.namespace)
        _ip("link", "del", made.name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def temp_folders() -> set[str]:
    """What lies in the folder for temporary things and bears the name of something of Ray's or of ours."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(OURS)}


def kill_all(processes: list[psutil.Process]) -> None:
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _carries(process: psutil.Process, tag: str) -> bool:
    with suppress(psutil.Error):
        return process.environ().get(TAG) == tag
    return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def reachable(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex((host, port)) == 0
