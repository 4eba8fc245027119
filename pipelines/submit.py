"""A recipe as a Ray job: checked here and against the live cluster, sent without data, runs or secrets, followed."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from cluster import mirror
from cluster.errors import BadInput, PreflightRefused, Problem, StageFailed, Stopped
from cluster.jobs import Attempt, Jobs, next_number
from cluster.local import CHECKOUT
from cluster.progress import console
from pipelines.run import Journey, resource_problems_of

ROOMS = ("cluster", "llm", "pipelines", "serve")  # what travels: the code, and the recipe as it was resolved
CODE = (".py", ".html", ".css", ".js", ".svg")
LARGEST_FILE = 1 << 20  # bytes; no file of code is near it
FAILURES = {2: BadInput, 3: PreflightRefused, 5: Stopped}


def submit(journey: Journey, jobs: Jobs, *, wait: bool) -> None:
    """Start the journey on the cluster, or attach to the attempt that is running; follow it to its end if `wait`."""
    label = stage_label(journey)
    known = jobs.attempts(journey.run.name)
    attempt = _running(known, label) or _start(journey, jobs, label, known)
    if wait:
        follow(jobs, attempt)


def stage_label(journey: Journey) -> str:
    """What of the journey an attempt covers: "all", a stage's name, or FIRST_LAST."""
    stages = [stage.name for stage in journey.chosen()]
    if journey.whole:
        return "all"
    return stages[0] if len(stages) == 1 else f"{stages[0]}_{stages[-1]}"


def _running(known: list[Attempt], label: str) -> Attempt | None:
    live = next((one for one in known if one.live), None)
    if live is None:
        return None
    if live.stage != label:
        raise PreflightRefused(
            Problem(
                f"{live.id} is working on the run",
                f"follow it with: headwater logs {live.run} --follow, or end it with: headwater stop {live.run}",
            )
        )
    console.print(f"{live.id} is running: attached (Ctrl-C leaves it running)")
    return live


def _start(journey: Journey, jobs: Jobs, label: str, known: list[Attempt]) -> Attempt:
    problems = resource_problems_of(journey.chosen(), journey.recipe, jobs.places())
    if problems:
        raise PreflightRefused(*problems)
    number = next_number(known, journey.run.jobs)
    attempt = Attempt(journey.run.name, label, number, "PENDING")
    with packed(journey) as folder:
        jobs.submit(attempt, _words(journey), folder)
    console.print(f"{attempt.id} was submitted to {jobs.address} (Ctrl-C leaves it running)")
    return attempt


def _words(journey: Journey) -> list[str]:
    chosen = journey.chosen()
    return [
        *("python", "-m", "pipelines", "run", "recipe.yaml", "--runs", mirror.shown(journey.run.path.parent)),
        *("--from", chosen[0].name, "--to", chosen[-1].name, *(["--verify"] if journey.verify else [])),
    ]


@contextmanager
def packed(journey: Journey) -> Iterator[Path]:
    """A folder with what the job needs and nothing else, for as long as the block lasts."""
    with packed_code() as folder:
        recipe = yaml.safe_dump(journey.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        yield folder


@contextmanager
def packed_code() -> Iterator[Path]:
    """A folder with our code alone, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="headwater-job-") as name:
        folder = Path(name)
        for path in code_files():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / path, folder / path)
        yield folder


def code_files() -> list[Path]:
    """What of the checkout is code, relative to it. What else lies in its folders is the user's, and stays here."""
    found = [Path(room, path) for room in ROOMS for path in _files(CHECKOUT / room) if _is_code(Path(room, path))]
    for path in found:
        if (size := (CHECKOUT / path).stat().st_size) > LARGEST_FILE:
            what = f"{path} has {size / 1e6:.1f} MB, and code is sent to the cluster with each job"
            raise BadInput(Problem(what, "keep data where every node reads it, under --runs for example"))
    return sorted(found)


def _files(room: Path) -> Iterator[Path]:
    """Relative to the room. Links are not followed: nobody knows what they lead to."""
    for folder, below, names in os.walk(room):
        below[:] = [name for name in below if not name.startswith((".", "__pycache__"))]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path.relative_to(room) for path in paths if not path.is_symlink())


def _is_code(path: Path) -> bool:
    return path.suffix in CODE or (path.suffix == ".yaml" and path.parent == Path("pipelines", "recipes"))


def follow(jobs: Jobs, attempt: Attempt) -> None:
    """Print the attempt's output as it comes and end as it ends. Ctrl-C leaves the job running."""
    try:
        ended = jobs.follow(attempt.id, _print)
    except KeyboardInterrupt:
        console.print(f"{attempt.id} goes on; headwater stop {attempt.run} ends it")
        return
    if ended.status == "SUCCEEDED":
        return
    kind = Stopped if ended.status == "STOPPED" else FAILURES.get(ended.exit_code or 0, StageFailed)
    said = (ended.message.strip().splitlines() or ["no message"])[0]
    raise kind(
        Problem(f"{ended.id} {ended.status.lower()}: {said}", "the same command makes the next attempt, which resumes")
    )


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
