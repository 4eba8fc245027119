"""Names the rank that a collective waits for, and ends the process, when training stands still too long.

Every rank says in the process group's store, once a second and from a thread of its own, where its training is. When
a rank hasn't moved for the deadline it reads what all said, twice: a rank that said nothing new between is stopped or
gone; otherwise the one that is furthest back is what the others wait for.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

EVERY_S = 1.0
SILENT = 4  # times that a rank says nothing new, when it is taken to be stopped or gone
ANSWER_S = 4 * SILENT * EVERY_S  # how long the store may take
PHASES = ("start", "data", "experience", "forward", "backward", "optimizer", "metrics", "evaluation", "save")
# What may take long by itself has so many times the deadline.
LONG, PATIENCE = ("experience", "evaluation", "save"), 6
TOLD = {
    "start": "starting",
    "data": "waiting for the rows",
    "experience": "writing answers",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
    "metrics": "gathering the loss",
    "evaluation": "in the evaluation",
    "save": "in the save",
}


class Sign(NamedTuple):
    """What a rank says of itself. said: how often, so far; step, part, phase: where its training is.

    part: which forward and backward pass of the step, from 0 on.
    """

    rank: int
    host: str
    pid: int
    said: int
    step: int
    part: int
    phase: str


class Watchdog:
    """A rank's place in training, told to the others. `at` says that it has moved."""

    def __init__(self, store: Any, rank: int, world: int, deadline_s: float, late: Callable[[str], None]):
        """store: of the process group, read by a connection of its own. late: what to do with the words for it."""
        self._store, self._rank, self._world = store.clone(), rank, world
        # A store whose process is stopped never answers, so it is asked by a thread that may hang.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="watchdog-store")
        self._deadline_s, self._late = deadline_s, late
        self._place: tuple[int, int, str] = (0, 0, PHASES[0])
        self._moved, self._said = time.monotonic(), 0
        self._ended = threading.Event()
        self._say()  # at once: a rank that is stopped in its first second has been there
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, step: int, phase: str, part: int = 0) -> None:
        """This rank is now in `phase` of `step`, in the forward and backward pass `part` of it."""
        self._place, self._moved = (step, part, phase), time.monotonic()

    def end(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            (*_, phase), moved = self._place, self._moved
            still = time.monotonic() - moved
            late = still > self._deadline_s * (PATIENCE if phase in LONG else 1)
            words = self._asked(self._words if late else self._say)
            if late and words and moved == self._moved and not self._ended.is_set():
                if self._rank == 0:
                    self._asked(partial(self._say_on, 2 * SILENT))  # the others still ask its store
                self._late(f"no step for {still:.0f} s: {words}")

    def _asked(self, question: Callable[[], str | None]) -> str | None:
        try:
            return self._asking.submit(question).result(timeout=ANSWER_S)
        except Exception as error:
            return f"rank 0, which holds the group's store, doesn't answer ({error or type(error).__name__})"

    def _say(self) -> None:
        self._said += 1
        sign = Sign(self._rank, socket.gethostname(), os.getpid(), self._said, *self._place)
        self._store.set(_key(self._rank), json.dumps(sign))

    def _say_on(self, times: int) -> None:
        for _ in range(times):
            time.sleep(EVERY_S)
            self._say()

    def _words(self) -> str:
        before = self._signs()
        self._say_on(SILENT)
        return missing(before, self._signs(), self._world)

    def _signs(self) -> dict[int, Sign]:
        """What every rank said last; of a rank that never said a word, nothing."""
        there = [rank for rank in range(self._world) if self._store.check([_key(rank)])]
        return {rank: Sign(*json.loads(self._store.get(_key(rank)))) for rank in there}


def missing(before: dict[int, Sign], after: dict[int, Sign], world: int) -> str:
    """Which rank the others wait for, in words, from what all said at two times."""
    if never := sorted(set(range(world)) - set(after)):
        return f"rank {never[0]} never began"
    if silent := [sign for rank, sign in sorted(after.items()) if rank in before and sign.said == before[rank].said]:
        return f"{_who(silent[0])} gives no sign of life, {_where(silent[0])}"
    last = min(after.values(), key=_place)
    if _place(last) < max(map(_place, after.values())):
        return f"{_who(last)} didn't arrive, it is still {_where(last)}"
    return f"all ranks are {_where(last)}: what they wait for is the network between them, or storage"


def _place(sign: Sign) -> tuple[int, bool, int, int]:
    phase = PHASES.index(sign.phase)
    return sign.step, phase > PHASES.index("optimizer"), sign.part, phase


def _who(sign: Sign) -> str:
    return f"rank {sign.rank} (process {sign.pid} on {sign.host})"


def _where(sign: Sign) -> str:
    return f"{TOLD[sign.phase]} of step {sign.step}" + (f", micro-batch {sign.part}" if sign.part else "")


def _key(rank: int) -> str:
    return f"headwater/watchdog/{rank}"
