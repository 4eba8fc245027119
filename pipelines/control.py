"""What works on a run, what it printed, and how to end it: through the Jobs API, the run folder, or both."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import BadInput, PreflightRefused, Problem, StageFailed
from cluster.jobs import Attempt, Jobs
from cluster.leaving import ask_to_save
from cluster.progress import console
from cluster.runs import Run, StageFolder, find_run, read_json
from pipelines.stage import NAMES
from pipelines.training import read_lines

POLL_S = 0.5
STOP_WAIT_S = 600.0


# status


def show_status(run: Run | None, attempts: list[Attempt], as_json: bool) -> None:
    """The attempts that the cluster knows, and how far each stage of the run is."""
    stages = stage_states(run) if run else []
    if as_json:
        json.dump({"attempts": [_told(one) for one in attempts], "stages": stages}, sys.stdout, indent=1)
        print()
        return
    if attempts:
        Console().print(_attempts_table(attempts))
    if stages:
        Console().print(_stages_table(run, stages))
    if not attempts and not stages:
        print("no attempts and no run", file=sys.stderr)


def stage_states(run: Run) -> list[dict[str, Any]]:
    """For each stage that was begun: done, running or cut off, and the last step that it recorded."""
    held = run.is_held()
    found = []
    for folder in map(run.stage, NAMES):
        if read_json(folder.path / "state.json") is None:
            continue
        state = "done" if folder.done() else "running" if held else "cut off"
        records = read_lines(folder.path / "metrics.jsonl")
        found.append({"stage": folder.name, "state": state, "step": records[-1]["step"] + 1 if records else None})
    return found


def _told(attempt: Attempt) -> dict[str, Any]:
    return {"id": attempt.id, **vars(attempt)}


def _attempts_table(attempts: list[Attempt]) -> Table:
    table = Table("attempt", "status", "exit code", "started (UTC)", "seconds", "message")
    table.columns[0].no_wrap = True
    for one in attempts:
        started = datetime.fromtimestamp(one.started_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        seconds = ((one.ended_ms or time.time() * 1000) - one.started_ms) / 1000
        code = "" if one.exit_code is None else str(one.exit_code)
        said = "" if one.live else (one.message.strip().splitlines() or [""])[0]
        table.add_row(one.id, one.status, code, started, f"{seconds:,.0f}", said)
    return table


def _stages_table(run: Run | None, stages: list[dict[str, Any]]) -> Table:
    table = Table("stage", "state", "steps", title=str(run.path) if run else None)
    for one in stages:
        table.add_row(one["stage"], one["state"], "" if one["step"] is None else str(one["step"]))
    return table


# logs


def show_logs(run: Run, stage: str | None, rank: int | None, lines: int, follow: bool) -> None:
    """The end of a run's log: of a stage's driver or rank, else of the last attempt. Goes on with `follow`."""
    path = log_file(run, stage, rank)
    text = path.read_text(encoding="utf-8", errors="replace")
    sys.stdout.write("".join(text.splitlines(keepends=True)[-lines:]))
    if follow:
        for fresh in _growth(path, len(text.encode())):
            sys.stdout.write(fresh)
            sys.stdout.flush()


def log_file(run: Run, stage: str | None, rank: int | None) -> Path:
    """The log that is meant. BadInput names the ones that there are."""
    if stage is None:
        found = sorted(run.jobs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        if found and rank is None:
            return found[-1]
        stage = _latest_stage(run).name
    path = run.stage(stage).logs / ("driver.log" if rank is None else f"rank-{rank}.log")
    if not path.is_file():
        there = ", ".join(sorted(f"{log.parent.parent.name}/{log.name}" for log in run.path.glob("*/logs/*.log")))
        raise BadInput(Problem(f"no log {path}", f"logs of the run: {there or 'none yet'}"))
    return path


def _latest_stage(run: Run) -> StageFolder:
    begun = [folder for folder in map(run.stage, NAMES) if folder.logs.is_dir()]
    if not begun:
        raise BadInput(Problem(f"no stage of {run.path} has begun", f"headwater run {run.name}"))
    return max(begun, key=lambda folder: folder.logs.stat().st_mtime)


def _growth(path: Path, at: int) -> Iterator[str]:
    """What is appended to the file from byte `at` on, until the command is stopped."""
    with open(path, "rb") as handle:
        handle.seek(at)
        while True:
            if fresh := handle.read():
                yield fresh.decode("utf-8", errors="replace")
            else:
                time.sleep(POLL_S)


# stop


def stop(name: str, root: Path, jobs: Jobs | None) -> None:
    """Ask whatever works on the run to save its state and end, and wait until it has."""
    live = [one for one in jobs.attempts(Path(name).name) if one.live] if jobs else []
    if jobs and live:
        _stop_attempts(jobs, live)
        return
    run = find_run(name, root)
    if not run.is_held():
        raise BadInput(Problem(f"nothing works on {run.path}", "see: headwater status"))
    ask_to_save(str(run.path))
    _wait(lambda: not run.is_held(), f"{run.path} is still worked on")
    console.print(f"{name}: stopped, state saved; the same command goes on")


def _stop_attempts(jobs: Jobs, live: list[Attempt]) -> None:
    for one in live:
        jobs.stop(one.id)
    for one in live:
        _wait(lambda name=one.id: not _is_live(jobs, name), f"{one.id} has not ended")
        console.print(f"{one.id}: stopped, state saved; the same command goes on")


def _is_live(jobs: Jobs, attempt_id: str) -> bool:
    found = jobs.find(attempt_id)
    return found is not None and found.live


def _wait(over: Any, what: str) -> None:
    deadline = time.monotonic() + STOP_WAIT_S
    while not over():
        if time.monotonic() > deadline:
            raise StageFailed(Problem(f"{what} after {STOP_WAIT_S:.0f} s", "look at: headwater logs"))
        time.sleep(POLL_S)


def jobs_if_named(address: str | None) -> Jobs | None:
    """The cluster's jobs if one was named by flag or environment, else None: the run folder alone is asked."""
    from cluster.jobs import cluster_address

    try:
        return Jobs(cluster_address(address))
    except (BadInput, PreflightRefused):
        if address:
            raise
        return None
