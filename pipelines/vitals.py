"""How a run is at this moment, from what lies in its folder. Nothing is written.

reads  STAGE/state.json, done.json          what has begun, what is done
       STAGE/metrics.jsonl, held_out.jsonl, samples.jsonl, events.jsonl       as they grow, a JSON object a line
       STAGE/checkpoints/step-NNNNNNNN/manifest.json, steps/STEP/NNNNN.json, logs/driver.log
       recipe.yaml                          how many steps a stage is to take
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cluster import mirror, segments
from cluster.errors import StageFailed
from cluster.runs import Run, StageFolder
from pipelines.stage import NAMES

RECENT_STEPS = 50  # over which pace and parts of a step are averaged
LOG_LINES = 4
RECORDS = ("held_out", "samples", "events")


class StageState(NamedTuple):
    """A stage of the run. state: done, running, cut off, or not begun."""

    name: str
    state: str
    figure: str = ""  # what a finished stage has to say
    seconds: float = 0.0  # that it took


class CheckpointAge(NamedTuple):
    step: int
    written: float  # seconds since 1970


@dataclass
class Curves:
    """Records of steps, as a column of numbers for each of their keys; NaN where a record has no such number."""

    columns: dict[str, array[float]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    def add(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._filled(self.columns.setdefault(key, array("d"))).append(value)
        self.count += 1
        self.last = record

    def __getitem__(self, key: str) -> array[float]:
        """The whole column."""
        return self._filled(self.columns.get(key, array("d")))

    def recent(self, key: str) -> float:
        """The mean of the last steps that have such a number, NaN if none has."""
        values = [value for value in self[key][-RECENT_STEPS:] if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    def _filled(self, column: array[float]) -> array[float]:
        """The column, with a gap for each record so far that had no such number."""
        if missing := self.count - len(column):
            column.extend([math.nan] * missing)
        return column


@dataclass
class Vitals:
    """What is known of a run: its stages, and more of the one that is looked at (`stage`, None before the first).

    step: how many steps that has taken, of `steps`. parts: of a stage that works in partitions, how many are done, by
    what is done to them. modified: when its metrics last grew, in seconds since 1970.
    """

    run: str
    state: str  # running, done, cut off, or not begun
    stages: list[StageState]
    stage: StageState | None = None
    steps: int | None = None
    metrics: Curves = field(default_factory=Curves)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[CheckpointAge] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    modified: float = 0.0

    @property
    def step(self) -> int:
        return int(self.metrics.last.get("step", -1)) + 1

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the last steps; None for a stage that takes no steps, or isn't at work."""
        if self.steps is None or not self.stage or self.stage.state != "running" or not self.metrics.count:
            return None
        pace = self.metrics.recent("seconds")
        return max(0, self.steps - self.step) * pace if math.isfinite(pace) else None

    @property
    def counts(self) -> Counter[str]:
        """How often each event has happened."""
        return Counter(str(event.get("event")) for event in self.events)


class Watcher:
    """Looks at a run again and again; of what has grown only the growth is read."""

    def __init__(self, run: Run, stage: str | None = None):
        self._run, self._asked = run, stage
        self._stage: _Follower | None = None

    def look(self) -> Vitals:
        """How the run is now. StageFailed if its storage doesn't answer."""
        held = self._run.is_held()
        states = stage_states(self._run, held)
        stage = next((one for one in states if one.name == self._asked), None) or _latest(self._run, states)
        found = Vitals(mirror.shown(self._run.path), _state_of(held, states), states, stage)
        if stage:
            self._look_closer(self._run.stage(stage.name), found)
        return found

    def _look_closer(self, folder: StageFolder, found: Vitals) -> None:
        found.modified = segments.modified(folder.path / "metrics.jsonl")
        # Without metrics nothing is kept: the stage may have been put aside, and be at work under other settings.
        if self._stage is None or self._stage.folder != folder or not found.modified:
            self._stage = _Follower(folder)
        try:
            self._stage.look(found)
        except StageFailed:
            self._stage = None  # what was read when it broke off is unknown
            raise
        found.steps = _steps(self._run, folder.name)
        found.checkpoints = checkpoint_ages(folder.path / "checkpoints")
        if found.stage and found.stage.state != "done":
            found.parts = _parts(folder)


def stage_states(run: Run, held: bool) -> list[StageState]:
    """Every stage of the journey, in order; `held`: whether something works on the run.

    Of those begun and not done only the last to have said something is running.
    """
    done = {name: marker for name in NAMES if (marker := run.stage(name).done())}
    begun = [name for name in NAMES if name not in done and mirror.exists(run.stage(name).path / "state.json")]
    states = dict.fromkeys(begun, "cut off")
    if begun and held:
        states[max(begun, key=lambda name: segments.modified(run.stage(name).logs / "driver.log"))] = "running"
    return [
        _done(name, done[name]) if name in done else StageState(name, states.get(name, "not begun")) for name in NAMES
    ]


def checkpoint_ages(folder: Path) -> list[CheckpointAge]:
    """The checkpoints that are whole, oldest first, with the time that their manifest was written."""
    if mirror.key_of(folder) is None:
        manifests = [(path, _modified(path)) for path in folder.glob("step-*/manifest.json")]
    else:
        found = mirror.found(folder) if mirror.children(folder) else []
        manifests = [(path, mtime_ns / 1e9) for path, _, mtime_ns in found if path.name == "manifest.json"]
    steps = ((re.match(r"step-(\d+)", path.parent.name), written) for path, written in manifests)
    return sorted(CheckpointAge(int(match[1]), written) for match, written in steps if match and written)


# What grows


class _Records:
    """The records of a JSON-lines file, as it grows. A line that isn't whole JSON is passed over."""

    def __init__(self, path: Path):
        self._file = segments.Follower(path)
        self._rest = b""

    def new(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Whether the file began anew, as after a restart, and the records not handed out since, one by one."""
        anew, data = self._file.new()
        whole, _, self._rest = ((b"" if anew else self._rest) + data).rpartition(b"\n")
        return anew, (record for line in whole.splitlines() for record in _parsed(line))


class _Follower:
    """What a stage's growing files hold so far."""

    def __init__(self, folder: StageFolder):
        self.folder = folder
        self._curves, self._metrics = Curves(), _Records(folder.path / "metrics.jsonl")
        self._files = {name: _Records(folder.path / f"{name}.jsonl") for name in RECORDS}
        self._kept: dict[str, list[dict[str, Any]]] = {name: [] for name in RECORDS}
        self._log, self._lines = segments.Follower(folder.logs / "driver.log"), [""]

    def look(self, found: Vitals) -> None:
        anew, fresh = self._metrics.new()
        if anew:
            self._curves = Curves()
        for record in fresh:
            self._curves.add(record)
        found.metrics = self._curves
        for name, file in self._files.items():
            anew, fresh = file.new()
            self._kept[name] = [*([] if anew else self._kept[name]), *fresh]
        found.held_out, found.samples, found.events = (self._kept[name] for name in RECORDS)
        found.log = self._last_lines()

    def _last_lines(self) -> list[str]:
        _, data = self._log.new()
        said = self._lines[-1] + data.decode("utf-8", errors="replace")
        self._lines = [*self._lines[:-1], *said.split("\n")][-LOG_LINES - 1 :]
        return [line for line in self._lines if line]


def _parsed(line: bytes) -> Iterator[dict[str, Any]]:
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            yield record


# What is there or not


def _done(name: str, marker: dict[str, Any]) -> StageState:
    return StageState(name, "done", str(marker.get("figure", "")), float(marker.get("seconds", 0.0)))


def _state_of(held: bool, stages: list[StageState]) -> str:
    states = {stage.state for stage in stages}
    return "running" if held else next((state for state in ("cut off", "done") if state in states), "not begun")


def _latest(run: Run, stages: list[StageState]) -> StageState | None:
    """The stage at work; else one that was cut off, the last that was trained, the last that is done."""
    for state in ("running", "cut off"):
        if found := [stage for stage in stages if stage.state == state]:
            return found[-1]
    done = [stage for stage in stages if stage.state == "done"]
    trained = (stage for stage in reversed(done) if segments.exists(run.stage(stage.name).path / "metrics.jsonl"))
    return next(trained, done[-1] if done else None)


def _steps(run: Run, stage: str) -> int | None:
    """How many steps the recipe has the stage take; None for a stage that takes none."""
    try:
        recipe = yaml.safe_load(mirror.read(run.path / "recipe.yaml"))
        return int(recipe[stage]["steps"])
    except (FileNotFoundError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None


def _parts(folder: StageFolder) -> dict[str, int]:
    """Of a stage that works in partitions, how many are done, by the name of what is done to them."""
    steps = {name: _names(folder.work / name) for name in _names(folder.work)}
    counts = {name: sum(re.fullmatch(r"\d+\.json", one) is not None for one in names) for name, names in steps.items()}
    return {name: count for name, count in counts.items() if count}


def _names(folder: Path) -> list[str]:
    try:
        return mirror.children(folder)
    except FileNotFoundError:  # it has just been taken away
        return []


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it has just been pruned
        return 0.0
