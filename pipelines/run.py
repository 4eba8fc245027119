"""The journey: which stages have to run and why, then one after another on one Ray."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

from cluster import mirror
from cluster.errors import BadInput, HeadwaterError, PreflightRefused, Problem, StageFailed, Stopped
from cluster.local import CHECKOUT, expected_node, free_places, live_places, ray_session
from cluster.preflight import Place, disk_problems, resource_problems
from cluster.progress import console, log_to
from cluster.runs import SCHEMA_VERSION, Run, StageFolder, canonical_hash, read_json, write_json
from cluster.tracking import Tracker
from llm.files import hash_file
from pipelines.recipe import Recipe
from pipelines.stage import NAMES, Outcome, Stage, StageRun, load_stages

log = logging.getLogger("headwater")


@dataclass(frozen=True)
class Step:
    """A stage in the plan: whether it runs, and why."""

    stage: Stage
    runs: bool
    why: str


@dataclass
class Journey:
    """A recipe, its run folder and what is known of the stages so far."""

    recipe: Recipe
    run: Run
    first: str = NAMES[0]
    last: str = NAMES[-1]
    verify: bool = False
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    def chosen(self) -> list[Stage]:
        """The stages between --from and --to."""
        begin, end = NAMES.index(self.first), NAMES.index(self.last)
        if begin > end:
            raise BadInput(Problem(f"--from {self.first} comes after --to {self.last}", f"order: {', '.join(NAMES)}"))
        return load_stages(NAMES[begin : end + 1])

    @property
    def whole(self) -> bool:
        """Whether it goes from the first stage to the last."""
        return (self.first, self.last) == (NAMES[0], NAMES[-1])

    def plan(self) -> list[Step]:
        """What would run, in order. A stage whose inputs are about to change runs; it may find them unchanged."""
        steps: list[Step] = []
        for stage in self.chosen():
            rerun = [step.stage.name for step in steps if step.runs and step.stage.name in stage.needs]
            if rerun:
                steps.append(Step(stage, True, f"{' and '.join(rerun)} runs"))
            else:
                steps.append(self._step(stage))
        return steps

    def _step(self, stage: Stage) -> Step:
        folder = self.run.stage(stage.name)
        key = stage.key(self.recipe, self.inputs(stage))
        done, state = folder.done(), read_json(folder.path / "state.json")
        if done and done["key"] == key:
            return self._verified(stage, done)
        if done:
            return Step(stage, True, f"changed: {', '.join(_changed(done, stage, self.recipe, self.inputs(stage)))}")
        if state and state["key"] == key:
            return Step(stage, True, "cut off before, goes on")
        return Step(stage, True, "not run yet")

    def _verified(self, stage: Stage, done: dict[str, Any]) -> Step:
        """A stage that is done, unless --verify finds other bytes behind the same names, sizes and times."""
        if self.verify and done["bytes"] != (self.bytes_of(stage) or None):
            why = "the sources' bytes changed" if done["bytes"] else "the sources' bytes were never hashed"
            return Step(stage, True, why)
        return Step(stage, False, "done")

    def bytes_of(self, stage: Stage) -> dict[str, str] | None:
        """SHA-256 of each source's bytes with --verify, else None."""
        return (stage.sources(self.recipe, True) or None) if self.verify else None

    def inputs(self, stage: Stage) -> dict[str, str]:
        """Fingerprints of what the stage reads. BadInput if an earlier stage has not finished."""
        found = dict(self._sources(stage))
        for name in stage.needs:
            done = self.run.stage(name).done()
            if done is None:
                where = mirror.shown(self.run.path)
                raise BadInput(
                    Problem(f"{stage.name} needs {name}, which has not finished in {where}", f"--from {name}")
                )
            found[name] = done["fingerprint"]
        return found

    def _sources(self, stage: Stage) -> dict[str, str]:
        if stage.name not in self.sources:
            self.sources[stage.name] = stage.sources(self.recipe, False)
        return self.sources[stage.name]


def execute(journey: Journey) -> list[dict[str, Any]]:
    """Run what the plan says; the done-markers of all chosen stages, in order."""
    run = journey.run
    run.check_schema()
    with run.locked(), stoppable():
        steps = journey.plan()
        if any(step.runs for step in steps):
            preflight(journey, [step.stage for step in steps if step.runs])
            _write_recipe(journey)
            with ray_session(journey.recipe.cluster.address, journey.recipe.cluster.object_store_mb):
                _check_cluster([step.stage for step in steps if step.runs], journey.recipe)
                for step in steps:
                    run_stage(journey, step.stage, step.why, again=step.why.startswith("the sources' bytes"))
    return [run.stage(stage.name).done() or {} for stage in journey.chosen()]


def run_stage(journey: Journey, stage: Stage, why: str = "not run yet", again: bool = False) -> None:
    """Run one stage unless its key says that it is done (or `again`), and record what it was made of."""
    folder = journey.run.stage(stage.name)
    inputs = journey.inputs(stage)
    key = stage.key(journey.recipe, inputs)
    folder.begin(key)
    if again:
        folder.forget_done()
    if (done := folder.done()) and done["key"] == key:
        _write_lineage(journey.run)
        return
    console.print(f"[bold]{stage.name}[/bold] ({why})", highlight=False)
    started = time.time()
    with log_to(folder.logs / "driver.log"):
        outcome = _tracked(journey, stage, folder)
    done = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage.name,
        "stage_version": stage.version,
        "key": key,
        "fingerprint": stage.fingerprint(folder),
        "inputs": inputs,
        "bytes": journey.bytes_of(stage),
        "settings": stage.identity(journey.recipe),
        "code": code_version(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 2),
        "read": outcome.read,
        "wrote": outcome.wrote,
        "figure": outcome.figure,
        "metrics": outcome.metrics,
    }
    folder.finish(done)
    _write_lineage(journey.run)
    console.print(f"  {outcome.wrote}; {outcome.figure} ({done['seconds']:.0f} s)", highlight=False)


def _tracked(journey: Journey, stage: Stage, folder: StageFolder) -> Outcome:
    """The stage's work, with W&B beside it."""
    settings = journey.recipe.wandb
    tracker = Tracker(
        journey.run, folder, settings.project if settings.enabled else None, journey.recipe.model_dump(mode="json")
    )
    try:
        outcome = stage.run(StageRun(journey.recipe, journey.run, folder, log, tracker.log))
    except BaseException as error:
        tracker.finish({}, exit_code=1)
        raise _explained(stage, error) from error
    tracker.tables(outcome.tables)
    tracker.finish(outcome.metrics)
    return outcome


def _explained(stage: Stage, error: BaseException) -> BaseException:
    """The error as the user should see it."""
    if isinstance(error, KeyboardInterrupt):
        return Stopped(f"{stage.name}: stopped; what was finished is kept, the same command goes on")
    if isinstance(error, (HeadwaterError, SystemExit)):
        return error
    cause = getattr(error, "cause", None)  # Ray wraps what a task raised
    if isinstance(cause, HeadwaterError):
        return cause
    if "No space left on device" in str(error):
        return StageFailed(
            Problem(f"{stage.name}: the disk is full", "free space where the run lies; the same command goes on")
        )
    log.error("%s failed", stage.name, exc_info=error)
    return StageFailed(
        Problem(f"{stage.name}: {_last_line(error)}", "the whole traceback is in logs/driver.log of the stage")
    )


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if isinstance(getattr(error, "cause", None), Exception) else f"{type(error).__name__}: {lines[0]}"


def preflight(journey: Journey, stages: list[Stage]) -> None:
    """Refuse, before anything starts and all at once, what cannot finish."""
    problems = [problem for stage in stages for problem in stage.check(journey.recipe)]
    if problems:
        raise BadInput(*problems)
    local = expected_node(journey.recipe.cluster.address)
    if local is not None:
        problems += resource_problems_of(stages, journey.recipe, [local])
    problems += disk_problems(journey.run.path, sum(stage.demand(journey.recipe).disk_bytes for stage in stages))
    if problems:
        raise PreflightRefused(*problems)


def resource_problems_of(stages: list[Stage], recipe: Recipe, places: Sequence[Place]) -> list[Problem]:
    """What the stages need at once, each by itself, and these nodes lack, by name."""
    pieces = [(stage.name, stage.demand(recipe).pieces) for stage in stages]
    return [problem for name, needed in pieces for problem in resource_problems(name, needed, places)]


def _check_cluster(stages: list[Stage], recipe: Recipe) -> None:
    problems = resource_problems_of(stages, recipe, live_places())
    if problems:
        raise PreflightRefused(*problems)
    for problem in resource_problems_of(stages, recipe, free_places()):
        console.print(f"others hold a part of the cluster, which has to be waited for: {problem.what}")


def _changed(done: dict[str, Any], stage: Stage, recipe: Recipe, inputs: dict[str, str]) -> list[str]:
    """Names of what differs from when the stage was done."""
    pairs = [(done["settings"], stage.identity(recipe)), (done["inputs"], inputs)]
    names = [name for before, now in pairs for name in {**before, **now} if before.get(name) != now.get(name)]
    return names or [f"stage version {done['stage_version']} to {stage.version}"]


def _write_recipe(journey: Journey) -> None:
    text = yaml.safe_dump(journey.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path = journey.run.path / "recipe.yaml"
    mirror.make(path.parent)
    path.write_text(text, encoding="utf-8")
    mirror.send(path)
    _write_lineage(journey.run)


def _write_lineage(run: Run) -> None:
    """What every artefact was made of, gathered from the done-markers."""
    kept = ("key", "fingerprint", "inputs", "settings", "stage_version", "code", "finished")
    done = {name: run.stage(name).done() for name in NAMES}
    stages = {name: {key: marker[key] for key in kept} for name, marker in done.items() if marker}
    write_json(run.lineage, {"schema_version": SCHEMA_VERSION, "run": run.name, "stages": stages})


def code_version() -> str:
    """The checkout's commit; a hash of the source where only the files travelled, as in a Ray job."""
    try:
        git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
        found = subprocess.run(git, capture_output=True, text=True, timeout=5)
        if found.returncode == 0:
            return found.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    sources = (path for room in ("cluster", "llm", "pipelines", "serve") for path in (CHECKOUT / room).rglob("*.py"))
    return "source-" + canonical_hash({str(path.relative_to(CHECKOUT)): hash_file(path) for path in sources})[:12]


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("stopped; what was finished is kept, the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
