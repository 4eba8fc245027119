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
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.local import SERVING
from tests.commands import CHECKOUT, wait_until
from tests.nodes import Cluster, cluster, free_port, kill_all

CLIENTS = 16
TRIES = 4  # the first, and three again
AGAIN_S = 1.0
ANSWERS_BETWEEN = 32  # that the service gives between two faults
READY_WITHIN_S = 600
OUTCOMES = "a service's fault, how long until all was there again, what clients got meanwhile"
REPLICA, INGRESS = "ServeReplica:headwater:headwater", "ServeReplica:headwater:ingress"
# Serves a model folder as `headwater serve` does on a cluster, and updates the service when told.
SERVE = """
import sys, ray
from pathlib import Path
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2]}})
from ray import serve
from serve import app
from serve.options import Options
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


@dataclass
class Service:
    """The service on a cluster of two nodes, each with a proxy on the same port."""

    nodes: Cluster
    driver: psutil.Popen
    url: str

    def named(self, name: str) -> list[psutil.Process]:
        return [one for node in self.nodes.nodes for one in node.named(name)]

    def kill(self, name: str) -> None:
        """The oldest process of that name, and wait until there are as many as before."""
        before = self.named(name)
        kill_all(before[:1])
        wait_until(lambda: len(self.named(name)) >= len(before), f"another {name}", READY_WITHIN_S)

    def update(self, **options) -> None:
        self.driver.stdin.write(json.dumps({"cpus": 0.5, "slots": 4, "ingresses": 2, **options}) + "\n")
        self.driver.stdin.flush()
        assert self.driver.stdout.readline() == "updated\n"


@contextmanager
def serving(model_folder: Path, log: Path) -> Iterator[Service]:
    with cluster(workers=2, cpus=2) as nodes, open(log, "wb") as errors:
        port = free_port()
        words = [sys.executable, "-c", SERVE, f"127.0.0.1:{nodes.port}", str(CHECKOUT), str(model_folder), str(port)]
        driver = psutil.Popen(
            words, env=nodes.variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert driver.stdout.readline() == "serving\n", log.read_text()
            url = f"http://127.0.0.1:{port}"
            made = Service(nodes, driver, url)
            wait_until(lambda: len(made.named("ProxyActor")) >= 2, "two proxies", READY_WITHIN_S)
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, "the service", READY_WITHIN_S)
            yield made
        finally:
            kill_all([driver])


@pytest.fixture
def service(model_folder, tmp_path, monkeypatch) -> Iterator[Service]:
    for name, value in {"PYTHONPATH": str(CHECKOUT), **SERVING}.items():
        monkeypatch.setenv(name, value)
    with serving(model_folder, tmp_path / "driver.log") as made:
        yield made


def strike(service: Service, table: Callable, faults: dict[str, Callable[[], None]]) -> None:
    """Each fault in turn, under clients; no request is lost."""
    with Clients(service.url).asking() as clients:
        clients.more()
        for name, fault in faults.items():
            before, started = Counter(clients.outcomes), time.monotonic()
            fault()
            clients.more()
            seen = dict(clients.outcomes - before)
            table(OUTCOMES, [f"{name:16} {time.monotonic() - started:5.0f} s  {seen}"])
            assert clients.lost == {}, name
    assert clients.lost == {}


@pytest.mark.slow
def test_killed_processes_lose_nobody(service, table):
    names = {"replica": REPLICA, "ingress": INGRESS, "proxy": "ProxyActor", "controller": "ServeController"}
    strike(service, table, {what: lambda name=name: service.kill(name) for what, name in names.items()})


@pytest.mark.soak
def test_a_lost_node_an_update_and_fewer_replicas_lose_nobody(service, table):
    def node() -> None:
        service.nodes.nodes.pop().kill()
        service.nodes.start_worker(2)

    faults = {
        "rolling update": lambda: service.update(replicas=2, max_requests=500),
        "scale down": lambda: service.update(replicas=1, max_requests=500),
        "scale up": lambda: service.update(replicas=2, max_requests=500),
        "node": node,
    }
    strike(service, table, faults)
