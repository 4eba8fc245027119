"""What can be seen to be wrong with a machine or a cluster before anything is asked of it, each with its remedy.

Every node is examined by the same function, as a Ray task where there is a cluster. What it finds is judged by pure
functions, so that a finding never depends on where it was made.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests

from cluster import mirror, objects
from cluster.errors import HeadwaterError, Problem
from cluster.local import CHECKOUT

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "tokenizers", "pyarrow", "numpy", "pydantic")
PORTS = {6379: "Ray's head", 8265: "the dashboard and the Jobs API", 8000: "the service", 10001: "Ray's client"}
SHM_BYTES = 2 << 30  # Ray's object store lies there, and falls back to the disk, much slower, without
DISK_BYTES = 10 << 30
OPEN_FILES = 4096
CLOCK_S = 2.0
SEEN_S = 5.0  # in which a file written on one node has to be seen on the others
SLOW_GBIT = 1.0
SAMPLE_BYTES = 64 << 20
REACHED_S = 5.0
WANDB_SERVER = "https://api.wandb.ai"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `state` is "ok", "warning" or "failure"."""

    what: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Node:
    """What a node told of itself. Sizes in bytes; `storage` maps what the run root must do to what went wrong."""

    host: str
    versions: dict[str, str]
    shm_free: int
    disk_free: int
    open_files: int
    storage: dict[str, str] = field(default_factory=dict)
    ahead_s: float = 0.0  # of the clock of the node that asked


# Examining a node


def examine(root: Path) -> Node:
    """This node, and the run root as it is seen from here."""
    return Node(
        host=socket.gethostname(),
        versions={"python": ".".join(map(str, sys.version_info[:3])), **examine_versions()},
        shm_free=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        disk_free=shutil.disk_usage(_existing(root)).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        storage=storage_problems(root),
    )


def examine_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).split("+")[0]  # +cpu, +cu130: a build, not a version
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def storage_problems(root: Path) -> dict[str, str]:
    """What a run root must do, and what went wrong when it was tried in a folder of its own; empty if nothing did."""
    if mirror.key_of(root):
        return _object_problems(root)
    trials: dict[str, Callable[[Path], str]] = {
        "keep what was written": _keeps,
        "replace a file in one step": _replaces,
        "rename a folder": _renames,
        "append": _appends,
        "lock a file": _locks,
        "keep time": _keeps_time,
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=root) as folder:
            tried = {what: _tried(trial, Path(folder)) for what, trial in trials.items()}
    except OSError as error:
        return {"be written to": str(error)}
    return {what: problem for what, problem in tried.items() if problem}


def _object_problems(root: Path) -> dict[str, str]:
    """The same for object storage: objects are whole and replaced at once, and nothing else is asked of it."""
    folder = str(mirror.key_of(root))
    key = f"{folder}/.doctor-{os.urandom(4).hex()}"
    try:
        objects.check_access(folder)
        objects.put(key, b"old")
        before = time.time()
        objects.put(key, b"new")
        middle = (before + time.time()) / 2
        kept, skew = objects.get(key), objects.modified(key) - middle
        objects.delete(key)
    except HeadwaterError as error:
        return {"be used": "; ".join(str(one.what if isinstance(one, Problem) else one) for one in error.problems)}
    problems = {} if kept == b"new" else {"replace an object": f"it still holds {kept!r}"}
    return problems | ({"keep time": f"its clock is {skew:+.1f} s from ours"} if abs(skew) > CLOCK_S else {})


def _tried(trial: Callable[[Path], str], folder: Path) -> str:
    try:
        return trial(folder)
    except OSError as error:
        return str(error)


def _keeps(folder: Path) -> str:
    path = folder / "kept"
    with open(path, "wb") as handle:
        handle.write(b"0123456789")
        handle.flush()
        os.fsync(handle.fileno())
    return "" if path.read_bytes() == b"0123456789" else "other bytes came back"


def _replaces(folder: Path) -> str:
    (folder / "new").write_text("new")
    (folder / "old").write_text("old")
    os.replace(folder / "new", folder / "old")
    return "" if (folder / "old").read_text() == "new" else "the old file is still there"


def _renames(folder: Path) -> str:
    (folder / "partial").mkdir()
    (folder / "partial" / "file").write_text("here")
    (folder / "partial").rename(folder / "whole")
    return "" if (folder / "whole" / "file").exists() else "its file did not come along"


def _appends(folder: Path) -> str:
    path = folder / "appended"
    with open(path, "a") as first, open(path, "a") as second:
        for handle, word in ((first, "a"), (second, "b"), (first, "c")):
            handle.write(word)
            handle.flush()
    return "" if path.read_text() == "abc" else f"two writers left {path.read_text()!r} instead of 'abc'"


def _locks(folder: Path) -> str:
    with open(folder / "lock", "w") as first, open(folder / "lock", "w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "two processes can hold one lock" if _can_lock(second) else ""


def _can_lock(handle: Any) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _keeps_time(folder: Path) -> str:
    (folder / "now").write_text("")
    skew = (folder / "now").stat().st_mtime - time.time()
    return f"its clock is {skew:+.1f} s from ours" if abs(skew) > CLOCK_S else ""


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.exists())


# Judging what was found


def judge(nodes: Sequence[Node], wanted: dict[str, str]) -> list[Finding]:
    """The findings about `nodes`, the first of which is the one that asked. `wanted`: versions that were tested."""
    return [
        _versions_finding(nodes, wanted),
        _least("shared memory", nodes, "shm_free", SHM_BYTES, "enlarge /dev/shm (docker --shm-size, an emptyDir)"),
        _least(
            "disk under the run root", nodes, "disk_free", DISK_BYTES, "free space, or use --runs with another disk"
        ),
        _files_finding(nodes),
        _storage_finding(nodes),
    ]


def _versions_finding(nodes: Sequence[Node], wanted: dict[str, str]) -> Finding:
    what, ours = "versions", nodes[0].versions
    apart = [
        f"{name} is {node.versions[name]} on {node.host}, {ours[name]} here"
        for node in nodes[1:]
        for name in ours
        if node.versions[name] != ours[name]
    ]
    if apart:
        return Finding(what, "failure", "; ".join(apart), "run one image, or one environment, on every node")
    untested = [
        f"{name} {ours[name]} (tested: {wanted[name]})" for name in ours if wanted.get(name, ours[name]) != ours[name]
    ]
    if untested:
        return Finding(what, "warning", ", ".join(untested), "install what pyproject.toml pins")
    return Finding(what, "ok", ", ".join(f"{name} {ours[name]}" for name in ("python", "ray", "torch", "deepspeed")))


def _least(what: str, nodes: Sequence[Node], name: str, wanted: int, remedy: str) -> Finding:
    node = min(nodes, key=lambda one: getattr(one, name))
    found = f"{getattr(node, name) / 2**30:.1f} GiB free on {node.host}"
    if getattr(node, name) >= wanted:
        return Finding(what, "ok", found)
    return Finding(what, "warning", f"{found}, less than {wanted / 2**30:.0f}", remedy)


def _files_finding(nodes: Sequence[Node]) -> Finding:
    node = min(nodes, key=lambda one: one.open_files)
    state = "ok" if node.open_files >= OPEN_FILES else "warning"
    remedy = "" if state == "ok" else f"raise it to {OPEN_FILES} or more (ulimit -n): every Ray process holds hundreds"
    return Finding("open files", state, f"at most {node.open_files} a process on {node.host}", remedy)


def _storage_finding(nodes: Sequence[Node]) -> Finding:
    wrong = [f"it can't {what} on {node.host}: {why}" for node in nodes for what, why in node.storage.items()]
    if wrong:
        return Finding(
            "run root",
            "failure",
            "; ".join(wrong),
            "use --runs with a folder of POSIX semantics, or mend what the object storage says",
        )
    return Finding("run root", "ok", "does all that a run asks of it")


def tested_versions() -> dict[str, str]:
    """What pyproject.toml pins, by package; nothing where it did not travel."""
    path = CHECKOUT / "pyproject.toml"
    if not path.exists():
        return {}
    pins = tomllib.loads(path.read_text())["project"]["dependencies"]
    return {name.split("[")[0]: version for name, version in (re.split("==|~=", pin) for pin in pins)}


# What belongs to this machine alone


def local_findings() -> list[Finding]:
    """Ports, the token, and W&B, as they are here."""
    return [_ports(), *driver_findings()]


def driver_findings() -> list[Finding]:
    """The token and W&B, as a driver on this machine meets them."""
    return [_token(), _wandb()]


def _ports() -> Finding:
    taken = [f"{port} ({whose})" for port, whose in PORTS.items() if _taken(port)]
    if taken:
        return Finding(
            "ports", "warning", f"taken: {', '.join(taken)}", "a service here needs --port; Ray may be running"
        )
    return Finding("ports", "ok", f"free: {', '.join(map(str, PORTS))}")


def _taken(port: int) -> bool:
    with socket.socket() as caller:
        caller.settimeout(0.5)
        return caller.connect_ex(("127.0.0.1", port)) == 0


def _token() -> Finding:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return Finding(
            "token", "failure", "RAY_AUTH_MODE=disabled", "unset it: whoever reaches the Jobs API runs code"
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("token", "ok", "in RAY_AUTH_TOKEN")
    if not path.exists():
        return Finding(
            "token", "warning", "none", "a cluster needs one: put it into RAY_AUTH_TOKEN; a local Ray makes its own"
        )
    if path.stat().st_mode & 0o077:
        return Finding("token", "warning", f"others can read {path}", f"chmod 600 {path}")
    return Finding("token", "ok", f"in {path}")


def _wandb() -> Finding:
    """Whether runs can be sent, as a run decides it: with a key, unless the user says that they stay here."""
    what, key, mode = "W&B", os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_MODE", "online")
    if not key or mode != "online":
        why = "no key" if not key else f"WANDB_MODE={mode}"
        return Finding(what, "ok", f"{why}: runs are kept in the run folder (wandb sync sends them later)")
    if not re.fullmatch(r"[\w-]{40,}", key):
        remedy = "copy it again from your W&B settings, or unset WANDB_API_KEY"
        return Finding(what, "warning", f"WANDB_API_KEY has {len(key)} characters and is no key", remedy)
    server = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_SERVER))
    port = server.port or (443 if server.scheme == "https" else 80)
    if not getproxies().get(server.scheme) and (why := _unreachable(server.hostname or "", port)):
        remedy = "let its port out (k8s/base/network.yaml does for 443), or set WANDB_MODE=offline and sync later"
        return Finding(what, "warning", f"a key is set, and {server.hostname}:{port} is not reached: {why}", remedy)
    return Finding(what, "ok", f"a key is set: runs are sent to {server.hostname}")


def _unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=REACHED_S).close()
    except OSError as error:
        return str(error)
    return ""


# A cluster


def jobs_api_finding(address: str) -> Finding:
    """Whether the Jobs API at `address` answers who has no token: it runs code for whoever it answers."""
    what = "Jobs API"
    try:
        answer = requests.get(f"{address}/api/jobs/", timeout=REACHED_S, allow_redirects=False)
    except requests.RequestException as error:
        return Finding(what, "failure", f"{address} does not answer: {error}", "check the address and the head's log")
    if answer.status_code in (401, 403):
        return Finding(what, "ok", f"{address} asks for a token")
    remedy = "start every node with RAY_AUTH_MODE=token and a token (on Kubernetes authOptions.mode: token)"
    return Finding(what, "failure", f"{address} answers {answer.status_code} without a token: it runs code", remedy)


def cluster_findings(root: Path) -> tuple[list[Node], list[Finding]]:
    """Every node of the cluster that Ray is joined to, and what only several of them can show."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [_asked(node["NodeID"], root) for node in alive]
    findings = [_clocks(nodes)]
    if len(nodes) > 1:
        with _written(root) as (path, said):
            findings.append(_shared([_on(node["NodeID"])(_sees).remote(path, said) for node in alive], nodes))
        findings.append(_bandwidth([node["NodeID"] for node in alive], nodes))
    return nodes, findings


def _on(node_id: str) -> Callable[[Callable], Any]:
    """A decorator that makes a Ray task of a function, on that node, whatever its CPUs are doing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))


def _asked(node_id: str, root: Path) -> Node:
    """The node's own report, with its clock against ours: half of the way there and back is allowed for."""
    import ray

    report = ray.get(_on(node_id)(examine).remote(root), timeout=120)
    sent = time.time()
    theirs = ray.get(_on(node_id)(_now).remote(), timeout=60)
    return Node(**{**vars(report), "ahead_s": theirs - (sent + time.time()) / 2})


def _now() -> float:
    return time.time()


def _clocks(nodes: Sequence[Node]) -> Finding:
    furthest = max(nodes, key=lambda one: abs(one.ahead_s))
    found = f"at most {abs(furthest.ahead_s):.2f} s apart ({furthest.host})"
    if abs(furthest.ahead_s) <= CLOCK_S:
        return Finding("clocks", "ok", found)
    return Finding("clocks", "failure", found, "run a time service (chrony, systemd-timesyncd) on every node")


@contextmanager
def _written(root: Path) -> Iterator[tuple[Path, str]]:
    """A file under the root, locked by us."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", prefix=".doctor-", dir=root) as handle:
        handle.write(said := os.urandom(16).hex())
        handle.flush()
        os.fsync(handle.fileno())
        fcntl.flock(handle, fcntl.LOCK_EX)
        mirror.send(Path(handle.name))
        try:
            yield Path(handle.name), said
        finally:
            mirror.delete(Path(handle.name))


def _sees(path: Path, said: str) -> str:
    """What is wrong with the file as another node sees it."""
    deadline = time.monotonic() + SEEN_S
    while not (mirror.exists(path) and mirror.read(path) == said.encode()):
        if time.monotonic() > deadline:
            return f"a file written elsewhere is not seen after {SEEN_S:.0f} s"
        time.sleep(0.1)
    if mirror.key_of(path):
        return ""  # claims stand for locks there
    with open(path) as handle:
        return "a lock held elsewhere is not heeded" if _can_lock(handle) else ""


def _shared(asked: list[Any], nodes: Sequence[Node]) -> Finding:
    import ray

    told = zip(nodes, ray.get(asked, timeout=120), strict=True)
    wrong = [f"{node.host}: {problem}" for node, problem in told if problem]
    if wrong:
        return Finding(
            "shared run root",
            "failure",
            "; ".join(wrong),
            "use --runs with a file system that every node mounts, or with s3://BUCKET/PREFIX",
        )
    return Finding("shared run root", "ok", f"{len(nodes)} nodes see what one of them wrote")


def _bandwidth(node_ids: Sequence[str], nodes: Sequence[Node]) -> Finding:
    """From each node to the next, and from the last to the first."""
    rates = []
    for at in range(len(node_ids)):
        to = (at + 1) % len(node_ids)
        rates.append((_rate(node_ids[at], node_ids[to]), f"{nodes[at].host} to {nodes[to].host}"))
    slowest, where = min(rates)
    found = f"{slowest:.1f} Gbit/s at least ({where})"
    if slowest >= SLOW_GBIT:
        return Finding("bandwidth", "ok", found)
    return Finding(
        "bandwidth", "warning", found, "gradients pass there at every step: use a faster network or fewer nodes"
    )


def _rate(source: str, target: str) -> float:
    """Gbit/s of an object fetched from `source` by `target`; the second one, since the first opens connections."""
    import ray

    for _ in range(2):
        made = _on(source)(_noise).remote()
        ray.wait([made], timeout=60, fetch_local=False)
        seconds = ray.get(_on(target)(_fetched).remote([made]), timeout=120)
    return SAMPLE_BYTES * 8 / 1e9 / seconds


def _noise() -> bytes:
    return os.urandom(SAMPLE_BYTES)


def _fetched(made: list[Any]) -> float:
    import ray

    begun = time.monotonic()
    ray.get(made[0])
    return time.monotonic() - begun
