"""Starts of a training stage's workers: which is the last, and which rows are left for it.

    STAGE/checkpoints/begun.json    a word that no other start has, and where this one goes on

Imports no torch, which takes seconds: Ray Train deals the rows out in a process that it starts with the workers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ray.data

from cluster.runs import read_json, write_json
from llm import guard
from pipelines import records
from pipelines.schema import TrainingSettings
from pipelines.stream import RowStream

BEGUN = "begun.json"


class Begun(NamedTuple):
    """A start of the workers: a word that no other start has, and where it goes on."""

    attempt: str
    step: int = 0
    checkpoint: str | None = None  # its name; None where there is none yet


def begin(checkpoints: Path, begun: Begun) -> None:
    """Make this start of the workers the one whose checkpoints count. On rank 0."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(checkpoints / BEGUN, begun._asdict())


def begun(checkpoints: Path) -> Begun | None:
    """The last start of the workers; None if there was none."""
    found = read_json(checkpoints / BEGUN)
    return Begun(**found) if found else None


def dataset(stream: RowStream, settings: TrainingSettings, folder: Path, workers: int) -> ray.data.Dataset:
    """What is left of the stream of the stage in `folder`, dealt out among so many workers."""
    settings = settings.among(workers)
    return rest(stream.among(settings), settings, folder).dataset(settings.data_cpus)


def rest(stream: RowStream, settings: TrainingSettings, folder: Path) -> RowStream:
    """The stream from the batch on that the next step takes, to the last step's."""
    last_start, windows = begun(folder / "checkpoints"), records.windows(records.left_out(folder))
    assert last_start is not None, "rank 0 says where it goes on before it asks for its rows"
    first, last = (guard.batch_of(step, windows) for step in (last_start.step, settings.steps - 1))
    return replace(stream, first_step=first, last_step=last + 1)
