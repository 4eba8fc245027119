"""Ray's Jobs API: submit an attempt at a run, find it again, follow it, stop it.

An attempt's submission id is RUN-STAGE-NUMBER. The run folder, not the job, is what resumes: an attempt that died is
followed by the next one, which goes on where the run folder says.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import requests

from cluster import mirror, objects
from cluster.errors import BadInput, PreflightRefused, Problem, StageFailed
from cluster.preflight import Place

LIVE = ("PENDING", "RUNNING")
STOP_WAIT_S = 600  # Ray's own 3 s would kill the driver before the state is saved
LOST_FOR_S = 60.0
ATTEMPT_VARIABLE = "HEADWATER_ATTEMPT"
CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

_ID = re.compile(r"(?P<run>.+)-(?P<stage>[a-z]+(?:_[a-z]+)?)-(?P<number>\d+)")


@dataclass(frozen=True)
class Attempt:
    """A job that works, or worked, on a run."""

    run: str
    stage: str  # "all", a stage's name, or FIRST_LAST
    number: int  # from 1
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    exit_code: int | None = None
    message: str = ""
    started_ms: int = 0
    ended_ms: int = 0
    node: str | None = None  # of its driver
    lost: bool = False  # with its driver's node, and its output there

    def given_up(self) -> Attempt:
        """The attempt as its run has to see it, now that its driver's node is gone.

        Where a head finds in Redis what the one before it knew, Ray (2.60) goes on calling such a job RUNNING until
        somebody submits another.
        """
        message = "the node of its driver is gone" if self.live else self.message
        return replace(self, status="FAILED" if self.live else self.status, message=message, lost=True)

    @property
    def id(self) -> str:
        return f"{self.run}-{self.stage}-{self.number}"

    @property
    def live(self) -> bool:
        return self.status in LIVE

    @classmethod
    def of(cls, job: Any) -> Attempt | None:
        """The attempt that a job of Ray's list is; None for somebody else's job."""
        match = _ID.fullmatch(job.submission_id or "")
        if match is None:
            return None
        return cls(
            match["run"],
            match["stage"],
            int(match["number"]),
            str(getattr(job.status, "value", job.status)),
            job.driver_exit_code,
            job.message or "",
            job.start_time or 0,
            job.end_time or 0,
            job.driver_node_id,
        )


def cluster_address(flag: str | None) -> str:
    """Where the Jobs API is: `--cluster`, RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    chosen = flag or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), None)
    if chosen is None:
        raise BadInput(
            Problem("no cluster named", "give --cluster http://HEAD:8265, or set RAY_API_SERVER_ADDRESS to it")
        )
    if not chosen.startswith(("http://", "https://")):
        raise BadInput(
            Problem(f"'{chosen}' is not the address of a Jobs API", "write http://HEAD:8265, the dashboard's address")
        )
    return chosen.rstrip("/")


class Jobs:
    """The attempts on one cluster."""

    def __init__(self, address: str):
        from ray.job_submission import JobSubmissionClient

        self.address = address
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with _refused(address):
            self._client = JobSubmissionClient(address)

    def places(self) -> list[Place]:
        """The nodes that are alive, each with all that it has."""
        return [Place(node["node_ip"], node["resources_total"] or {}) for node in self._live_nodes()]

    def _live_nodes(self) -> list[dict[str, Any]]:
        answer = self._client._do_request("GET", "/api/v0/nodes?detail=true&limit=10000")
        answer.raise_for_status()
        return [node for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """What is known of a run's attempts, or of everybody's, oldest first."""
        found = [attempt for job in self._client.list_jobs() if (attempt := Attempt.of(job))]
        chosen = [one for one in found if run in (None, one.run)]
        if any(one.node for one in chosen):
            nodes = {node["node_id"] for node in self._live_nodes()}
            chosen = [one if one.node in (None, *nodes) else one.given_up() for one in chosen]
        return sorted(chosen, key=lambda one: (one.started_ms, one.number))

    def find(self, attempt_id: str) -> Attempt | None:
        return next((one for one in self.attempts() if one.id == attempt_id), None)

    def submit(self, attempt: Attempt, words: list[str], folder: Path) -> None:
        """Start `words` as the attempt's job, in a copy of `folder` on the cluster."""
        variables = {ATTEMPT_VARIABLE: attempt.id, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
        self._client.submit_job(
            entrypoint=shlex.join(words),
            submission_id=attempt.id,
            runtime_env={"working_dir": str(folder), "env_vars": variables},
            metadata={"run": attempt.run, "stage": attempt.stage},
        )

    def stop(self, attempt_id: str) -> None:
        """Ask the attempt to save its state and end; it has STOP_WAIT_S seconds."""
        self._client.stop_job(attempt_id)

    def follow(self, attempt_id: str, write: Callable[[str], None]) -> Attempt:
        """Hand on the attempt's output as it comes, until it has ended. StageFailed if the cluster is lost."""
        output, lost_since = _Unseen(write), None
        while True:
            try:
                attempt = self.find(attempt_id)
                if attempt is None:
                    raise StageFailed(_forgotten(attempt_id))
                if not attempt.lost:
                    asyncio.run(self._tail(attempt_id, output))
                if not attempt.live:
                    return attempt
                lost_since = None
            except (OSError, RuntimeError, aiohttp.ClientError, requests.RequestException) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_FOR_S:
                    raise StageFailed(_lost(self.address, error)) from error
            time.sleep(1.0)

    async def _tail(self, attempt_id: str, output: _Unseen) -> None:
        output.restart()
        async for text in self._client.tail_job_logs(attempt_id):
            output.take(text)


class _Unseen:
    """Hands on what is new of a text that is told from its beginning again after each interruption."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._seen = self._at = 0  # characters

    def restart(self) -> None:
        self._at = 0

    def take(self, text: str) -> None:
        fresh = text[max(0, self._seen - self._at) :]
        self._at += len(text)
        if fresh:
            self._seen = self._at
            self._write(fresh)


def next_number(known: list[Attempt], logs: Path) -> int:
    """The number of a run's next attempt: one more than the cluster and the run's own folder of logs remember."""
    kept = (_ID.fullmatch(name.removesuffix(".log")) for name in _kept(logs))
    return 1 + max([0, *(one.number for one in known), *(int(match["number"]) for match in kept if match)])


def _kept(logs: Path) -> list[str]:
    """Names in the folder; none where it lies in storage that only the cluster may use."""
    with objects.hurried():
        try:
            return mirror.children(logs)
        except StageFailed:
            return []


@contextmanager
def _refused(address: str) -> Iterator[None]:
    """Failures to reach the Jobs API as something that the user can act on."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except ConnectionError as error:
        raise PreflightRefused(
            Problem(
                f"no Ray cluster answers at {address}: {error}", "check --cluster; forward the port if it is inside"
            )
        ) from None
    except AuthenticationError:
        raise PreflightRefused(
            Problem(
                f"{address} refused the token",
                "put the cluster's token into RAY_AUTH_TOKEN and set RAY_AUTH_MODE=token",
            )
        ) from None


def _forgotten(attempt_id: str) -> Problem:
    return Problem(
        f"the cluster no longer knows {attempt_id}: its head was started anew",
        "the same command makes the next attempt, which resumes",
    )


def _lost(address: str, error: Exception) -> Problem:
    return Problem(
        f"no answer from {address} for {LOST_FOR_S:.0f} s: {error}",
        "when it is back, the same command attaches to the attempt or makes the next one, which resumes",
    )
