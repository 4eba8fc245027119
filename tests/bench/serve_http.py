"""The figures of the service over HTTP: ours as `headwater serve` starts it, against other services and the engine.

Every turn has a service of its own, asked a few times before anything is timed, so that no idle one takes from what is
measured. Answers are greedy, in fp32, and the same on both sides. Clients run on the same two CPUs (`clients`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any, NamedTuple

import httpx

from llm.engine import Engine
from tests.bench import clients, peer, processes
from tests.bench.agreement import same_answers
from tests.bench.clients import Answer, whole
from tests.bench.command import CPUS, Scale
from tests.bench.measure import Figure, Invalid, Turn, compare
from tests.bench.serve_engine import Request, engine_of, greedy
from tests.bench.served import L4_256, SMOLLM2, WORK, Model, loaded, prompts, text_of
from tests.commands import environment
from tests.serve.conftest import free_port

CLIENTS = 16
ROUNDS = 4  # requests of a client, one after the other
NEW_TOKENS = 64
STARTS_WITHIN_S = 300.0
ASKED, WARM_UP = 200, 8  # for their first tokens
FIRST_TOKEN_MS = {"p50": 10.0, "p99": 30.0}  # added at most
LEAST_ADDED_MS = 0.1  # below it nothing is told apart
OVERLOAD, OVERLOADED_ROUNDS = 2.0, 16
DEADLINE = 3.0  # times what a request takes at capacity
# Threads of OpenMP that sleep while they wait, as ours do: of two cores, one is then free to pass tokens on.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(CPUS)}
# Of `transformers serve`: (attention, tokens of a forward pass, what threads of OpenMP do)
SWEEP = [
    (attention, most, wait) for attention in ("sdpa", "eager") for most in (128, 512) for wait in ("PASSIVE", "ACTIVE")
]
PAGE = 32

Service = Callable[[], AbstractContextManager[str]]  # gives its address while it runs


class Load(NamedTuple):
    """What `clients` ask for: requests of each, in order. before: one of each, before anything is timed."""

    model: Model
    clients: list[list[Request]]
    before: list[Request]

    @property
    def bodies(self) -> list[list[dict[str, Any]]]:
        return [self.of(one) for one in self.clients]

    def of(self, requests: list[Request]) -> list[dict[str, Any]]:
        return [body(self.model, request) for request in requests]

    @property
    def all(self) -> list[Request]:
        return [request for one in self.clients for request in one]


# The figures


def http(scale: Scale) -> Iterator[Figure]:
    """Streaming to 16 clients, against `transformers serve --continuous-batching` at the best of `SWEEP`."""
    return (_http(model, bar, scale) for model, bar in ((L4_256, 3.0), (SMOLLM2, 1.5)))


def http_engine(scale: Scale) -> Iterator[Figure]:
    """Streaming to 16 clients, against the engine alone with the same requests."""
    return (_http_engine(model, scale) for model in (L4_256, SMOLLM2))


def first_token(scale: Scale) -> list[Figure]:
    """What Ray Serve adds to the time to the first token of one client, over uvicorn with the same API and engine."""
    number = max(4, scale.of(ASKED))
    asked = [Request(prompt, 1) for prompt in prompts(L4_256, number + WARM_UP)]
    load = Load(L4_256, [asked[WARM_UP:]], asked[:WARM_UP])
    arms = (ours(L4_256), plain(L4_256))
    added = [_added(arms if pair % 2 else arms[::-1], load, flip=not pair % 2) for pair in range(scale.pairs)]
    return [_at_most(which, limit, [one[which] for one in added], number) for which, limit in FIRST_TOKEN_MS.items()]


def goodput(scale: Scale) -> list[Figure]:
    """At twice the rate that 16 clients reach: of the requests that are let in, those answered before their deadline.

    Requests come at random (Poisson); what is refused with 429 or 503 is not let in.
    """
    load = _load(L4_256, scale, OVERLOADED_ROUNDS)
    rate, usual_s = _capacity(load)
    deadline_s = DEADLINE * usual_s
    seen = [_overloaded(load, OVERLOAD * rate, deadline_s, seed) for seed in range(scale.pairs)]
    shares = [one["in_time"] / max(1, one["let_in"]) for one in seen]
    detail = {"capacity_per_s": rate, "deadline_s": deadline_s, "turns": seen}
    return [Figure(f"goodput_{L4_256.name}", median(shares), min(shares), max(shares), 0.95, detail)]


def _http(model: Model, bar: float, scale: Scale) -> Figure:
    load = _load(model, scale)
    best, seconds = tuned(load)
    turns = (lambda: streamed(ours(model), load), lambda: streamed(best, load))
    figure = compare(f"http_{model.name}", bar, *turns, same_answers, scale.pairs)
    figure.detail |= {"sweep_seconds": seconds, "tokens": sum(one.new_tokens for one in load.all)}
    return figure


def _http_engine(model: Model, scale: Scale) -> Figure:
    load = _load(model, scale)
    engine = engine_of(model, loaded(model), load.all, slots=CLIENTS)
    turns = (lambda: streamed(ours(model), load), lambda: alone(engine, load))
    return compare(f"http_engine_{model.name}", 0.85, *turns, same_answers, scale.pairs)


def _load(model: Model, scale: Scale, rounds: int = ROUNDS) -> Load:
    new_tokens, number = max(4, scale.of(NEW_TOKENS)), max(2, scale.of(CLIENTS))
    asked = [Request(prompt, new_tokens) for prompt in prompts(model, number * (max(1, scale.of(rounds)) + 1))]
    return Load(model, [asked[client + number :: number] for client in range(number)], asked[:number])


def body(model: Model, request: Request) -> dict[str, Any]:
    """The prompt as text, which is all that `transformers serve` takes. It knows a model by its folder."""
    text = text_of(model, request.prompt)
    asked = {"model": str(model.folder), "prompt": text, "max_tokens": request.new_tokens}
    return {**asked, "temperature": 0, "stream": True}


# First tokens


def _added(arms: tuple[Service, Service], load: Load, flip: bool) -> dict[str, float]:
    """Milliseconds at the quantiles that the service adds to the plain one; `flip` if the plain one goes first."""
    first, second = (_first_tokens(arm, load) for arm in arms)
    mine, other = (second, first) if flip else (first, second)
    same_answers({"answers": [one.text for one in mine]}, {"answers": [one.text for one in other]})
    return {which: quantile(mine, which) - quantile(other, which) for which in FIRST_TOKEN_MS}


def _first_tokens(service: Service, load: Load) -> list[Answer]:
    with service() as address:
        warm(address, load)
        return [whole(answer) for answer in clients.closed_loop(address, load.bodies)[0]]


def quantile(answers: list[Answer], which: str) -> float:
    """Milliseconds to the first token."""
    waits = [(answer.first - answer.sent) * 1000 for answer in answers]
    return median(waits) if which == "p50" else quantiles(waits, n=100, method="inclusive")[98]


def _at_most(which: str, limit_ms: float, added_ms: list[float], number: int) -> Figure:
    values = [limit_ms / max(LEAST_ADDED_MS, one) for one in added_ms]
    value = limit_ms / max(LEAST_ADDED_MS, median(added_ms))
    detail = {"added_ms": added_ms, "requests_a_turn": number}
    return Figure(f"first_token_{which}_{L4_256.name}", value, min(values), max(values), 1.0, detail)


# Overload


def _capacity(load: Load) -> tuple[float, float]:
    """Requests a second that the clients get answered, each its next after its last, and the median one's seconds."""
    with ours(load.model)() as address:
        warm(address, load)
        answers = [whole(one) for client in clients.closed_loop(address, load.bodies) for one in client]
    seconds = max(one.last for one in answers) - min(one.sent for one in answers)
    return len(answers) / seconds, median(one.last - one.sent for one in answers)


def _overloaded(load: Load, rate: float, deadline_s: float, seed: int) -> dict[str, int]:
    """How many were asked, let in, and answered in time."""
    draw = Random(seed)
    starts = list(accumulate(draw.expovariate(rate) for _ in load.all))
    bodies = [one for client in load.bodies for one in client]
    with ours(load.model, deadline_s=deadline_s)() as address:
        warm(address, load)
        answers = clients.open_loop(address, bodies, starts)
    if strange := [answer for answer in answers if answer.status not in (200, 429, 503)]:
        raise Invalid(f"status {strange[0].status} under overload: {strange[0].error}")
    let_in = [answer for answer in answers if answer.status == 200]
    in_time = [one for one in let_in if one.reason and not one.error and one.last - one.sent <= deadline_s]
    return {"asked": len(answers), "let_in": len(let_in), "in_time": len(in_time)}


# The arms


def streamed(service: Service, load: Load) -> Turn:
    """Seconds from the first request to the end of the last answer."""
    with service() as address:
        warm(address, load)
        answers = [whole(one) for client in clients.closed_loop(address, load.bodies) for one in client]
    seconds = max(one.last for one in answers) - min(one.sent for one in answers)
    return Turn(seconds, {"answers": [one.text for one in answers]})


def alone(engine: Engine, load: Load) -> Turn:
    """The same requests through the engine: each client's next is added when its last has ended."""
    left = [list(enumerate(one)) for one in load.clients]
    texts = [["" for _ in one] for one in load.clients]

    def next_of(client: int) -> None:
        if left[client]:
            number, request = left[client].pop(0)
            engine.add(request.prompt, greedy(request.new_tokens), f"{client} {number}")

    engine.drop_prefixes()
    begun = time.perf_counter()
    for client in range(len(left)):
        next_of(client)
    while engine.has_work:
        for token in engine.step():
            client, number = map(int, token.request_id.split())
            texts[client][number] += token.text
            if token.finish_reason:
                next_of(client)
    return Turn(time.perf_counter() - begun, {"answers": [text for one in texts for text in one]})


def tuned(load: Load) -> tuple[Service, dict[str, float]]:
    """`transformers serve` at the best of `SWEEP`, and the seconds of each."""
    arms = {setting: transformers(load, *setting) for setting in SWEEP}
    seconds = {setting: streamed(arm, load).seconds for setting, arm in arms.items()}
    best = min(seconds, key=lambda setting: seconds[setting])
    return arms[best], {" ".join(map(str, setting)): took for setting, took in seconds.items()}


def warm(address: str, load: Load) -> None:
    """What nobody times, all at once."""
    for answers in clients.closed_loop(address, [[one] for one in load.of(load.before)]):
        whole(answers[0])


# The services


def ours(model: Model, **options: float) -> Service:
    """options: of serve.options.Options."""
    return lambda: _own("ray", model, options)


def plain(model: Model) -> Service:
    return lambda: _own("uvicorn", model, {})


def _own(kind: str, model: Model, options: dict[str, float]) -> AbstractContextManager[str]:
    order = {"kind": kind, "folder": model.folder, "name": str(model.folder), "port": free_port()}
    order |= {"slots": CLIENTS, "threads": CPUS, "options": options}
    words = processes.python("tests.bench.service", order)
    return _running(words, order["port"], "/readyz", environment() | SLEEPING)


def transformers(load: Load, attention: str, most: int, wait: str) -> Service:
    """Its cache holds all requests at once, twice; left alone, it takes most of the machine's memory."""
    longest = max(len(request.prompt) + request.new_tokens for request in load.all)
    blocks = 2 * len(load.clients) * -(-longest // PAGE)

    def service() -> AbstractContextManager[str]:
        port = free_port()
        words = [str(peer.python("transformers_serve").with_name("transformers")), "serve", str(load.model.folder)]
        words += ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
        words += ["--port", str(port), "--attn-implementation", attention, "--cb-block-size", str(PAGE)]
        words += ["--cb-num-blocks", str(blocks), "--cb-max-batch-tokens", str(most), "--log-level", "error"]
        variables = peer.environment() | SLEEPING | {"OMP_WAIT_POLICY": wait, "HF_HUB_OFFLINE": "1"}
        return _running(words, port, "/health", variables)

    return service


@contextmanager
def _running(words: list[str], port: int, ready: str, variables: dict[str, str]) -> Iterator[str]:
    """The address of a service while it runs; at the end it is asked to stop, and killed if it doesn't."""
    address = f"http://127.0.0.1:{port}"
    log = WORK / f"{Path(words[0]).name}.log"
    with processes.running(words, log, variables) as process:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not _answers(address + ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Invalid(f"the service did not start:\n{log.read_text(errors='replace')[-processes.TOLD :]}")
            time.sleep(0.2)
        yield f"{address}/v1"
        processes.stop(process)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
