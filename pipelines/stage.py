"""What a stage is: one file of this folder, one verb, one Ray job, between files that other tools read."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import Problem
from cluster.preflight import Piece
from cluster.runs import Run, StageFolder, canonical_hash, hash_folder
from llm.files import hash_file
from pipelines.recipe import Recipe

# The journey in order, each stage the module of its name.
NAMES = ("ingest", "tokenizer", "shards", "pretrain", "sft", "rank", "reward", "rlhf", "evaluate")


def load_stages(names: Iterable[str] = NAMES) -> list[Stage]:
    """The stages of these names, imported only now: `--help` needs none, and those of data no torch."""
    return [importlib.import_module(f"pipelines.{name}").STAGE for name in names]


@dataclass(frozen=True)
class Demand:
    """What a stage needs at once, checked before it starts. The first of its pieces is what does the stage's work."""

    pieces: tuple[Piece, ...] = ()
    disk_bytes: int = 0

    @property
    def cpus(self) -> float:
        return sum(piece.count * piece.cpus for piece in self.pieces)

    @property
    def gpus(self) -> float:
        return sum(piece.count * piece.gpus for piece in self.pieces)


@dataclass(frozen=True)
class Outcome:
    """What a finished stage has to say: two cells of the table, the figure that matters, and numbers for programs.

    tables: rows for the dashboards, by the table's name.
    """

    read: str
    wrote: str
    figure: str
    metrics: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRun:
    """A stage at work: its recipe, the run that it belongs to, its own folder."""

    recipe: Recipe
    run: Run
    folder: StageFolder
    log: logging.Logger
    record: Callable[[dict[str, Any]], None]  # hands a step's numbers to the dashboards

    def input(self, stage: str) -> Path:
        """Folder of an earlier stage's artefacts."""
        return self.run.stage(stage).path


def content_of(files: Iterable[Path], verify: bool) -> str:
    """What tells files of a user from others: their names, sizes and times, or with `verify` their bytes."""
    return canonical_hash([(path.name, hash_file(path) if verify else _stamp(path)) for path in sorted(files)])


def _stamp(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _no_sources(recipe: Recipe, verify: bool) -> dict[str, str]:
    return {}


def _no_problems(recipe: Recipe) -> list[Problem]:
    return []


@dataclass(frozen=True)
class Stage:
    """How the driver sees a stage.

    identity: the settings that the result depends on, as JSON values.
    needs: the stages whose artefacts it reads.
    artefacts: the folders that it leaves, whose content is its fingerprint.
    sources: fingerprints of what it reads from outside the run; `verify` hashes bytes.
    check: problems that can be seen before anything starts.
    demand: what it needs at once.
    """

    name: str
    version: int
    needs: tuple[str, ...]
    artefacts: tuple[str, ...]
    identity: Callable[[Recipe], dict[str, Any]]
    run: Callable[[StageRun], Outcome]
    demand: Callable[[Recipe], Demand]
    check: Callable[[Recipe], list[Problem]] = _no_problems
    sources: Callable[[Recipe, bool], dict[str, str]] = _no_sources

    def key(self, recipe: Recipe, inputs: dict[str, str]) -> str:
        """The name of the result: settings, version and what goes in. `inputs` maps names to fingerprints."""
        return canonical_hash(
            {"stage": self.name, "version": self.version, "settings": self.identity(recipe), "inputs": inputs}
        )

    def fingerprint(self, folder: StageFolder) -> str:
        """Content hash of the stage's artefacts."""
        return canonical_hash({name: hash_folder(folder.path / name) for name in self.artefacts})
