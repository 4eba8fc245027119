"""Parts of a running service killed under clients that try again: none of them is left without an answer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from cluster.local import SERVING
from tests.commands import CHECKOUT, wait_until
from tests.nodes import Cluster, cluster, free_port, kill_all, title
from tests.serve.conftest import wait_until_ready

CLIENTS = 16
TRIES = 4  # the first, and three again
AGAIN_S = 1.0
ANSWERS_BETWEEN = 32  # that the service gives between two faults
READY_WITHIN_S = 600
OUTCOMES = "a service's fault, how long until all was there again, what clients got meanwhile"
REPLICA, INGRESS = "ServeReplica:headwater:headwater", "ServeReplica:headwater:ingress"
PROXY, CONTROLLER = "ProxyActor", "ServeController"
# Serves a model folder as `headwater serve` does on a cluster, and updates the service when told.
SERVE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2]}})
from ray import serve
from serve import app
from serve.options import Options
from pathlib import Path
folder, port = Path(sys.argv[3]), int(sys.argv[4])
app.start({"tiny": folder}, port=port, options=Options(replicas=2, ingresses=2, cpus=0.5, slots=4))
print("serving", flush=True)
for line in sys.stdin:
    options = Options.model_validate_json(line)
    serve.run(app.build({"tiny": folder}, options, hosts=app.LOOPBACK_HOSTS), name=app.NAME, route_prefix="/")
    print("updated", flush=True)
"""


@dataclass
class Clients:
    """Threads that ask without end, every other one for a stream, and count what became of it."""

    url: str
    outcomes: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self) -> Iterator[Clients]:
        threads = [threading.Thread(target=self._ask_on, args=[number]) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def more(self, answers: int = ANSWERS_BETWEEN) -> None:
        """Wait until the service has given so many more."""
        enough = self.outcomes["answer"] + answers
        wait_until(lambda: self.outcomes["answer"] >= enough, f"{answers} answers, {self.outcomes}", READY_WITHIN_S)

    @property
    def lost(self) -> dict[str, int]:
        return {what: count for what, count in self.outcomes.items() if what not in ("answer", "error event")}

    def _ask_on(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=READY_WITHIN_S) as http:
            while not self._stop.is_set():
                self.outcomes[self._asked(http, streams=number % 2 == 0)] += 1

    def _asked(self, http: httpx.Client, streams: bool) -> str:
        last = "nothing"
        for attempt in range(TRIES):
            if attempt:
                time.sleep(AGAIN_S)
            try:
                last = _stream(http) if streams else _whole(http)
            except httpx.TransportError as error:
                last = type(error).__name__
            else:
                if last != "503":
                    return last
        return f"lost: {last}"


def _body(**more) -> dict:
    return {"model": "tiny", "prompt": "The cat", "max_tokens": 32, "temperature": 1, **more}


def _whole(http: httpx.Client) -> str:
    answer = http.post("/v1/completions", json=_body())
    return "answer" if answer.status_code == 200 else str(answer.status_code)


def _stream(http: httpx.Client) -> str:
    with http.stream("POST", "/v1/completions", json=_body(stream=True)) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return "answer"
            if line.startswith("data: ") and "error" in json.loads(line.removeprefix("data: ")):
                return "error event"
    return "a stream without an end"


def kill_one(name: str, processes: Callable[[], list[psutil.Process]]) -> None:
    """The oldest process of that name, and wait until there are as many as before."""

    def named() -> list[psutil.Process]:
        return sorted((one for one in processes() if name in title(one)), key=lambda one: one.pid)

    before = named()
    assert before, f"no {name} to kill"
    kill_all(before[:1])
    wait_until(lambda: len(named()) >= len(before), f"another {name}", READY_WITHIN_S)


@dataclass
class Service:
    """The service on a cluster, each of whose nodes has a proxy on the same port."""

    nodes: Cluster
    driver: psutil.Popen
    url: str

    def processes(self) -> list[psutil.Process]:
        return [one for node in self.nodes.nodes for one in node.family()]

    def update(self, **options) -> None:
        self.driver.stdin.write(json.dumps({"cpus": 0.5, "slots": 4, "ingresses": 2, **options}) + "\n")
        self.driver.stdin.flush()
        assert self.driver.stdout.readline() == "updated\n"


@pytest.fixture
def on_nodes(model_folder, tmp_path, monkeypatch) -> Iterator[Service]:
    for name, value in {"PYTHONPATH": str(CHECKOUT), **SERVING}.items():
        monkeypatch.setenv(name, value)
    log, port = tmp_path / "driver.log", free_port()
    with cluster(workers=2, cpus=2) as nodes, open(log, "wb") as errors:
        words = [sys.executable, "-c", SERVE, f"127.0.0.1:{nodes.port}", str(CHECKOUT), str(model_folder), str(port)]
        driver = psutil.Popen(
            words, env=nodes.variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert driver.stdout.readline() == "serving\n", log.read_text()
            made = Service(nodes, driver, f"http://127.0.0.1:{port}")
            proxies = lambda: [one for one in made.processes() if PROXY in title(one)]  # noqa: E731
            wait_until(lambda: len(proxies()) >= 2, "two proxies", READY_WITHIN_S)
            wait_until_ready(made.url)
            yield made
        finally:
            kill_all([driver])


def strike(url: str, table: Callable, faults: dict[str, Callable[[], None]]) -> None:
    """Each fault in turn, under clients; no request is lost."""
    with Clients(url).asking() as clients:
        clients.more()
        for name, fault in faults.items():
            before, started = Counter(clients.outcomes), time.monotonic()
            fault()
            clients.more()
            seconds, seen = time.monotonic() - started, dict(clients.outcomes - before)
            table(OUTCOMES, [f"{name:16} {seconds:5.0f} s  {seen}"])
            assert clients.lost == {}, name
    assert clients.lost == {}


@pytest.mark.slow
def test_killed_processes_lose_nobody(service, table):
    def killed(name: str) -> Callable[[], None]:
        return lambda: kill_one(name, lambda: psutil.Process().children(recursive=True))

    faults = {"replica": killed(REPLICA), "ingress": killed(INGRESS), "controller": killed(CONTROLLER)}
    strike(service.removesuffix("/v1"), table, faults)


@pytest.mark.soak
def test_a_lost_proxy_a_lost_node_an_update_and_fewer_replicas_lose_nobody(on_nodes, table):
    """A proxy alone on its node is missed by all who know but that node: here another one answers on the same port."""

    def node() -> None:
        on_nodes.nodes.nodes.pop().kill()
        on_nodes.nodes.start_worker(2)

    faults = {
        "proxy": lambda: kill_one(PROXY, on_nodes.processes),
        "rolling update": lambda: on_nodes.update(replicas=2, max_requests=500),
        "scale down": lambda: on_nodes.update(replicas=1, max_requests=500),
        "scale up": lambda: on_nodes.update(replicas=2, max_requests=500),
        "node": node,
    }
    strike(on_nodes.url, table, faults)
