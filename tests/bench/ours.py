"""What we do in the benchmarks: the stages of `headwater run` themselves, in one process on one warm Ray.

writes  runs/bench/arms/NAME   the run folders
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster.runs import Run
from llm.shardfile import Shards
from pipelines import documents
from pipelines.recipe import Recipe, load_recipe
from pipelines.run import Journey, run_stage
from pipelines.stage import load_stages
from tests.bench.agreement import digest, text_digest
from tests.bench.measure import FOLDER, Turn

WORK = FOLDER / "arms"
# Texts pass through `ingest` as they are.
AS_IS: dict[str, Any] = {"mask": [], "decontaminate": False}
KEEP_DOUBLES: dict[str, Any] = {"deduplicate": {"exact": False, "near": False, "passages": False}}
VOCABULARY, SAMPLE_BYTES, SEQUENCE_LENGTH = 16_384, 20_000_000, 256


def recipe(name: str, sources: list[dict[str, Any]], **ingest: Any) -> Recipe:
    """The recipe `tiny` with these sources and settings of `ingest`."""
    settings = {
        "name": name,
        "ingest": {"sources": sources, **ingest},
        "tokenizer": {"vocab_size": VOCABULARY, "sample_bytes": SAMPLE_BYTES},
        "shards": {"sequence_length": SEQUENCE_LENGTH},
        "wandb": {"enabled": False},
    }
    return load_recipe("tiny", tuple(f"{key}={yaml.safe_dump(value)}" for key, value in settings.items()))


def begin(of: Recipe, *stages: str) -> Journey:
    """A new run of that recipe, with these stages done."""
    shutil.rmtree(WORK / of.name, ignore_errors=True)
    journey = Journey(of, Run(WORK / of.name))
    for name in stages:
        _run(journey, name)
    return journey


def tokenize(journey: Journey) -> Turn:
    """The shards of a run whose documents and tokenizer are there."""
    seconds = _run(journey, "shards")
    tokens = journey.run.stage("shards").path / "tokens"
    return Turn(seconds, digest(ids for name in ("train", "held_out") for ids in _tokens(tokens / name)))


def ingest(journey: Journey) -> Turn:
    """The documents of a run: SHA-256 of the text, and address, of each one kept."""
    seconds = _run(journey, "ingest")
    rows = list(_documents(journey.run.stage("ingest").path / "documents"))
    made = {"texts": [text_digest(row["text"]) for row in rows], "urls": [row["url"] for row in rows]}
    return Turn(seconds, made)


def _run(journey: Journey, name: str) -> float:
    """Run one stage as if it had never been; the seconds that its done-marker gives."""
    (stage,) = load_stages([name])
    folder = journey.run.stage(name)
    shutil.rmtree(folder.path, ignore_errors=True)
    run_stage(journey, stage)
    done = folder.done()
    assert done is not None
    return done["seconds"]


def _tokens(folder: Path) -> Iterator[np.ndarray]:
    shards = Shards(folder)
    lengths = shards.lengths()
    return (shards.tokens(number, 0, int(length)) for number, length in enumerate(lengths))


def _documents(folder: Path) -> Iterator[dict[str, Any]]:
    for part in documents.parts(folder):
        for batch in documents.read(part, ["text", "url"]):
            yield from batch.to_pylist()
