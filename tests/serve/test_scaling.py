from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from llm.sampling import SamplingParams
from pipelines.plots import braille
from serve import app
from serve.engines import Engines
from serve.options import Options
from serve.scaling import FIRST_TOKEN_S, QUEUED_TOKENS, Policy, decide

TARGETS = {"target_tokens": 100, "target_wait_s": 2.0}


@pytest.mark.parametrize(
    ("replicas", "tokens", "wait", "waiting", "wanted"),
    [
        (0, 0, 0, 0, 0),  # none, and nobody asks
        (0, 0, 0, 1, 1),  # one is woken
        (1, 0, 0, 0, 0),  # the last one may go
        (1, 0, 0, 3, 1),  # not while requests wait for it
        (1, 1, 0, 0, 1),
        (1, 100, 0, 0, 1),
        (1, 101, 0, 0, 2),
        (1, 950, 0, 0, 10),
        (1, 1, 2.1, 0, 2),  # few tokens, but first ones come late
        (3, 1, 2.1, 0, 4),
        (3, 1, 1.5, 0, 3),  # not so calm that fewer would do
        (3, 1, 0.9, 0, 1),
        (3, 0, 1.5, 0, 0),  # late once, but all is done
        (2, 950, 2.1, 0, 10),
    ],
)
def test_replicas_follow_tokens_and_waits(replicas, tokens, wait, waiting, wanted):
    decided = decide(replicas, queued_tokens=tokens, first_token_s=wait, waiting_requests=waiting, **TARGETS)
    assert decided == wanted


def points(*values: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(timestamp=number, value=value) for number, value in enumerate(values)]


def test_the_policy_takes_the_newest_figures_of_all_replicas():
    raw = {QUEUED_TOKENS: {"a": points(900, 150), "b": points(150)}, FIRST_TOKEN_S: {"a": points(9, 0.1), "b": []}}
    context = SimpleNamespace(current_num_replicas=2, raw_metrics=raw, total_queued_requests=0)
    assert Policy(**TARGETS)(context) == (3, {})
    new = SimpleNamespace(current_num_replicas=1, raw_metrics=None, total_queued_requests=None)
    assert Policy(**TARGETS)(new) == (0, {})


def test_ray_serve_takes_the_policy_with_its_targets():
    policy = AutoscalingPolicy(policy_function=Policy, policy_kwargs=TARGETS)
    config = AutoscalingConfig(min_replicas=0, max_replicas=2, policy=policy)
    carried = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert carried.target_tokens == 100
    assert carried(SimpleNamespace(current_num_replicas=0, raw_metrics={}, total_queued_requests=1))[0] == 1


def test_options_say_how_many_replicas_there_may_be():
    assert (Options().most, Options().scales) == (1, False)
    assert (Options(replicas=0).most, Options(replicas=0).scales) == (1, True)
    assert (Options(replicas=2, max_replicas=2).most, Options(replicas=2, max_replicas=2).scales) == (2, False)
    assert Options(replicas=1, max_replicas=4).scales
    with pytest.raises(ValueError, match=r"max_replicas \(1\) is below replicas \(2\)"):
        Options(replicas=2, max_replicas=1)


ANSWER = 100  # tokens
MANY = 12  # clients, each with an answer at a time
SCALING = Options(
    replicas=0,
    max_replicas=2,
    cpus=0.4,
    slots=4,
    target_tokens=5 * ANSWER,
    target_wait_s=60,
    upscale_delay_s=1,
    downscale_delay_s=3,
)
SETTLES_WITHIN_S = 300


class Watched:
    """The replicas of the application `scaling`, several times a second."""

    def __init__(self, engines: Engines):
        self.engines, self.started = engines, time.monotonic()
        self.rows: list[dict[str, float]] = []
        self.clients = 0

    async def watch(self) -> None:
        while True:
            status = await asyncio.to_thread(ray_serve.status)
            states = status.applications["scaling"].deployments["scaled"].replica_states
            self.rows.append(
                {
                    "seconds": round(time.monotonic() - self.started, 2),
                    "clients": self.clients,
                    "replicas": states.get("RUNNING", 0),
                    "queued_tokens": self.engines.load().queued_tokens,
                }
            )
            await asyncio.sleep(0.25)

    async def until(self, replicas: int) -> None:
        deadline = time.monotonic() + SETTLES_WITHIN_S
        while not self.rows or self.rows[-1]["replicas"] != replicas:
            assert time.monotonic() < deadline, f"not {replicas} replicas: {self.rows[-1:]}"
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def asking(self, clients: int):
        """Clients that ask one after another for as long as the block lasts; all that they have asked is answered."""
        self.clients, stop = clients, asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                assert await answered(self.engines) == ANSWER

        tasks = [asyncio.create_task(ask()) for _ in range(clients)]
        yield
        stop.set()
        await asyncio.gather(*tasks)
        self.clients = 0


async def answered(engines: Engines) -> int:
    params = SamplingParams(max_new_tokens=ANSWER, min_new_tokens=ANSWER)
    return len([token async for _, token in engines.tokens([([60, 61], params)])])


@pytest.mark.slow
def test_replicas_come_and_go_with_the_load(service, model_folder, tmp_path, table):
    handle = ray_serve.run(app.engines("scaled", str(model_folder), SCALING), name="scaling", route_prefix=None)

    async def main() -> list[dict[str, float]]:
        watched = Watched(Engines(handle, SCALING))
        watching = asyncio.create_task(watched.watch())
        async with watched.asking(1):
            await watched.until(1)
        async with watched.asking(MANY):
            await watched.until(2)
        async with watched.asking(1):
            await watched.until(1)
        await watched.until(0)
        assert await answered(watched.engines) == ANSWER, "a request for none wakes one"
        await watched.until(1)
        watching.cancel()
        return watched.rows

    rows = asyncio.run(main())
    ray_serve.delete("scaling")
    (tmp_path / "replicas.json").write_text(json.dumps(rows))
    table("replicas over time", shown(rows))
    seen = [row["replicas"] for row in rows]
    steps = [count for number, count in enumerate(seen) if not number or seen[number - 1] != count]
    assert steps[steps.index(1) :] == [1, 2, 1, 0, 1]


def shown(rows: list[dict[str, float]]) -> list[str]:
    def plot(name: str, lines: int) -> list[str]:
        return [
            f"{name}, at most {max(row[name] for row in rows):g}",
            *braille([row[name] for row in rows], 60, lines),
        ]

    changes = [after for before, after in pairwise(rows) if before["replicas"] != after["replicas"]]
    times = ", ".join(f"{row['replicas']} from {row['seconds']:.0f} s" for row in changes)
    return [*plot("clients", 2), *plot("queued_tokens", 3), *plot("replicas", 3), times]
