"""What the service counts, in Prometheus' format. Every label has a closed set of values: no request can add one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
STATUSES = {200, 400, 401, 404, 405, 408, 413, 414, 415, 421, 422, 429, 431, 499, 500, 503, 504}
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
ENGINE = {
    "running": "requests that tokens are made for",
    "waiting": "requests that wait for a slot",
    "queued_tokens": "tokens still to read, and at most still to make, of running and waiting requests",
}
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)

logger = logging.getLogger(__name__)


class Load(Protocol):
    """How busy an engine is."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def queued_tokens(self) -> int: ...


class Metrics:
    """The metrics of one process that answers requests, in a registry of their own.

    `models` are the names that may become labels; `ingress` tells this process from others that answer at the same
    address, each scrape reaching one of them.
    """

    def __init__(self, models: Iterable[str] = (), ingress: str = ""):
        self.models = frozenset(models)
        self._registry = CollectorRegistry()
        self._ingress = ingress
        self._requests = self._make(Counter, "requests", "requests answered; 499: the client left", "path", "status")
        self._refusals = self._make(Counter, "refusals", "requests refused before they reached a model", "reason")
        self._in_flight = self._make(Gauge, "requests_in_flight", "requests being answered")
        self._seconds = self._make(Histogram, "request_seconds", "from head to end", "path", buckets=SECONDS)
        self._first = self._make(
            Histogram, "time_to_first_token_seconds", "from a request to its first token", "model", buckets=SECONDS
        )
        self._each = self._make(
            Histogram, "time_per_output_token_seconds", "between tokens, mean", "model", buckets=TOKEN_SECONDS
        )
        self._prompt = self._make(Counter, "prompt_tokens", "tokens of prompts", "model")
        self._completion = self._make(Counter, "completion_tokens", "tokens generated", "model")
        self._loads: dict[str, Callable[[], Load]] = {}
        self._registry.register(_Engines(self._loads, ingress))

    def started(self) -> None:
        """A request has come."""
        self._in_flight.labels(self._ingress).inc()

    def ended(self, path: str, status: int, seconds: float) -> None:
        """It has ended: with an answer of `status`, or 499 if its client left first. `path` is a route's pattern."""
        self._in_flight.labels(self._ingress).dec()
        label = str(status) if status in STATUSES else f"{status // 100}xx"
        self._requests.labels(path, label, self._ingress).inc()
        self._seconds.labels(path, self._ingress).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused; `reason` is a word of ours, never one of the request's."""
        self._refusals.labels(reason, self._ingress).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """An answer's first token came so long after its request."""
        self._first.labels(self.label(model), self._ingress).observe(seconds)

    def tokens(self, model: str, prompt: int, completion: int, seconds: float | None = None) -> None:
        """A request used so many tokens; `seconds` from the first token of its answer to the last."""
        model = self.label(model)
        self._prompt.labels(model, self._ingress).inc(prompt)
        self._completion.labels(model, self._ingress).inc(completion)
        if seconds is not None and completion > 1:
            self._each.labels(model, self._ingress).observe(seconds / (completion - 1))

    def watch(self, model: str, load: Callable[[], Load]) -> None:
        """Ask `load` how busy the model's engine is whenever the metrics are read."""
        self._loads[model] = load

    def label(self, model: str) -> str:
        """The model's name if it is one of ours."""
        return model if model in self.models else OTHER

    def text(self) -> bytes:
        """All of it, as `GET /metrics` answers."""
        return generate_latest(self._registry)

    def _make(self, kind: type, name: str, text: str, *labels: str, **options: object):
        return kind(f"headwater_{name}", text, (*labels, "ingress"), registry=self._registry, **options)


class _Engines(Collector):
    """Gauges that are read when they are asked for. An engine that can't say is left out."""

    def __init__(self, loads: dict[str, Callable[[], Load]], ingress: str):
        self._loads, self._ingress = loads, ingress

    def collect(self) -> Iterator[Metric]:
        loads = {model: load for model, ask in self._loads.items() if (load := _answer(ask))}
        for name, text in ENGINE.items():
            gauge = GaugeMetricFamily(f"headwater_engine_{name}", text, labels=("model", "ingress"))
            for model, load in loads.items():
                gauge.add_metric((model, self._ingress), getattr(load, name))
            yield gauge


def _answer(ask: Callable[[], Load]) -> Load | None:
    try:
        return ask()
    except Exception as error:
        logger.warning("an engine doesn't say how busy it is: %s", error)
        return None
