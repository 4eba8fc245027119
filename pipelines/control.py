"""What works on a run, what it printed, and how to end it: through the Jobs API, the run folder, or both."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import mirror, segments
from cluster.errors import BadInput, PreflightRefused, Problem, StageFailed
from cluster.jobs import Attempt, Jobs
from cluster.leaving import ask_to_save
from cluster.progress import console
from cluster.runs import Run, StageFolder, find_run, read_json
from pipelines.records import read_lines
from pipelines.stage import NAMES

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
    log = segments.Follower(path)
    _, text = log.new()
    sys.stdout.write("".join(text.decode("utf-8", errors="replace").splitlines(keepends=True)[-lines:]))
    while follow:
        _, fresh = log.new()
        sys.stdout.write(fresh.decode("utf-8", errors="replace"))
        sys.stdout.flush()
        time.sleep(POLL_S)


def log_file(run: Run, stage: str | None, rank: int | None) -> Path:
    """The log that is meant. BadInput names the ones that there are."""
    if stage is None:
        found = [name for name in mirror.children(run.jobs) if name.endswith(".log")]
        if found and rank is None:
            return max((run.jobs / name for name in found), key=segments.modified)
        stage = _latest_stage(run).name
    path = run.stage(stage).logs / ("driver.log" if rank is None else f"rank-{rank}.log")
    if not segments.exists(path):
        there = [f"{name}/{log}" for name in NAMES for log in mirror.children(run.stage(name).logs)]
        logs = ", ".join(name for name in there if name.endswith(".log"))
        raise BadInput(Problem(f"no log {mirror.shown(path)}", f"logs of the run: {logs or 'none yet'}"))
    return path


def _latest_stage(run: Run) -> StageFolder:
    begun = [folder for folder in map(run.stage, NAMES) if mirror.children(folder.logs)]
    if not begun:
        raise BadInput(Problem(f"no stage of {mirror.shown(run.path)} has begun", f"headwater run {run.name}"))
    return max(begun, key=lambda folder: segments.modified(folder.logs / "driver.log"))


# stop


def stop(name: str, root: Path, jobs: Jobs | None) -> None:
    """Ask whatever works on the run to save its state and end, and wait until it has."""
    live = [one for one in jobs.attempts(Path(name).name) if one.live] if jobs else []
    if jobs and live:
        _stop_attempts(jobs, live)
        return
    run = find_run(name, root)
    if not run.is_held():
        raise BadInput(Problem(f"nothing works on {mirror.shown(run.path)}", "see: headwater status"))
    ask_to_save(mirror.shown(run.path))
    _wait(lambda: not run.is_held(), f"{mirror.shown(run.path)} is still worked on")
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
