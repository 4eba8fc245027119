"""A training worker killed by SIGKILL: how long until the next optimizer step, and what of it goes where.

detect      until the surviving rank has been ended too
restart     until the killed rank's successor runs the training function
load        until rank 0 has its model and its state
first_batch until the rows of the first step are there
step        the step itself
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil

from cluster.runs import read_json
from pipelines.records import read_lines
from tests.bench import processes
from tests.bench.agreement import same_losses
from tests.bench.measure import Figure, Turn, compare
from tests.bench.workload import L4_256, WORK, Plan, drive, prepared, recipe_settings

BAR = 1 / 0.8
SAVE_EVERY, PAST = 10, 3  # killed some steps after the second checkpoint
PARTS = ("detect", "restart", "load", "first_batch", "step")
Record = dict[str, Any]


class Arm(NamedTuple):
    """A training that can be killed, and what can be seen of it from outside.

    ranks: process ids of the newest start, by rank. loads: how often rank 0 has had model and state ready.
    steps: records of the optimizer steps so far, with `step`, `loss`, `seconds` and `data_wait_s`.
    """

    words: list[str]
    log: Path
    ranks: Callable[[], list[int]]
    loads: Callable[[], int]
    steps: Callable[[], list[Record]]


def recovery(pairs: int, dtype: str) -> Figure:
    """Ours against plain Ray Train, two workers."""
    plan = Plan(L4_256, workers=2, threads=1, steps=400, dtype=dtype, save_every=SAVE_EVERY)
    splits: dict[str, list[list[float]]] = {"our_split_s": [], "their_split_s": []}

    def agree(mine: Record, other: Record) -> Record:
        for side, made in zip(splits.values(), (mine, other), strict=True):
            side.append(made["split"])
        return same_losses(mine, other, dtype) | {side: medians(turns) for side, turns in splits.items()}

    return compare("recovery_L4-256", BAR, lambda: killed(_ours(plan)), lambda: killed(_theirs(plan)), agree, pairs)


def killed(arm: Arm) -> Turn:
    """Start it, kill rank 1 some steps after a checkpoint, and wait for the next step."""
    with processes.running(arm.words, arm.log) as process:

        def when(true: Callable[[], Any], what: str) -> float:
            return processes.when(true, f"{what} of {arm.log}", process)

        when(lambda: len(arm.steps()) >= 2 * SAVE_EVERY + PAST, "step to kill at")
        ranks, loads, before = arm.ranks(), arm.loads(), arm.steps()
        os.kill(ranks[1], signal.SIGKILL)
        marks = [
            time.time(),
            when(lambda: not psutil.pid_exists(ranks[0]) or arm.ranks()[1] != ranks[1], "end of the other rank"),
            when(lambda: arm.ranks()[1] != ranks[1], "start"),
            when(lambda: arm.loads() > loads, "loaded state"),
            when(lambda: made_again(before, arm.steps()), "next step"),
        ]
        first = made_again(before, arm.steps())[0]
    return Turn(marks[-1] - marks[0], {"losses": [one["loss"] for one in before], "split": split(marks, first)})


def medians(splits: list[list[float]]) -> dict[str, float]:
    """Of each part over several turns."""
    return {part: median(values) for part, values in zip(PARTS, zip(*splits, strict=True), strict=True)}


def split(marks: list[float], first: Record) -> list[float]:
    """Seconds of each of PARTS. marks: times of the blow and of the ends of the parts; the last two are one."""
    *parts, rest = [end - begin for begin, end in pairwise(marks)]
    step = min(rest, first["seconds"] - first["data_wait_s"])
    return [*parts, rest - step, step]


def made_again(before: list[Record], now: list[Record]) -> list[Record]:
    """Records of steps taken after the restart. What an old rank wrote late is of a later step."""
    return [one for one in now if one not in before and one["step"] <= before[-1]["step"]]


def _ours(plan: Plan) -> Arm:
    run = prepared(plan.model)
    stage = run / "pretrain"
    shutil.rmtree(stage, ignore_errors=True)
    settings = recipe_settings(plan.model, **plan.settings())
    return Arm(
        drive(plan.model, run, "pretrain", "pretrain", settings),
        WORK / "recovery-ours.log",
        lambda: [_pid(stage / "logs" / f"rank-{rank}.json") for rank in range(plan.workers)],
        lambda: (stage / "logs" / "rank-0.log").read_text().count("begins at step"),
        lambda: read_lines(stage / "metrics.jsonl"),
    )


def _pid(path: Path) -> int:
    """Of the process that wrote a rank's record."""
    return (read_json(path) or {"pid": 0})["pid"]


def _theirs(plan: Plan) -> Arm:
    folder = WORK / "ray-ddp"
    shutil.rmtree(folder, ignore_errors=True)

    def events(what: str) -> list[Record]:
        return [one for one in read_lines(folder / "events.jsonl") if one["what"] == what]

    def ranks() -> list[int]:
        newest = {one["rank"]: one["pid"] for one in events("begin")}
        return [newest[rank] for rank in range(plan.workers)]

    return Arm(
        processes.python("tests.bench.ray_ddp", {**plan.order(), "folder": folder}),
        WORK / "recovery-theirs.log",
        ranks,
        lambda: len([one for one in events("loaded") if one["rank"] == 0]),
        lambda: events("step"),
    )
