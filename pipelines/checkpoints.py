"""A training stage's checkpoints (`llm.checkpoint`), on a disk that every node sees or in object storage.

There each has a name of its own, step-00000120.3f2ab9c1: every rank sends its part, and rank 0 the manifest, last.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster import mirror, objects
from llm import checkpoint, zero
from llm.checkpoint import Checkpoint

log = logging.getLogger("headwater")


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, on this machine. A damaged one is named and the one before it used."""
    if mirror.key_of(folder) is None:
        return checkpoint.newest(folder)
    for name in sorted(_whole(mirror.names(folder)), reverse=True):
        try:
            manifest = _fetched(folder / name)
        except ValueError as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", mirror.shown(folder / name), error)
            mirror.delete(folder / name / "manifest.json")  # so that it counts no more, for pruning either
        else:
            _drop(path for path in folder.glob("step-*") if path.name != name)
            return Checkpoint(folder / name, manifest)
    return None


def store(folder: Path, attempt: str, flush: Callable[[], None]) -> checkpoint.OnDisk:
    """Where the checkpoints of `folder` are kept.

    `attempt` is a word that all ranks of this start of the workers share, and no other start has. `flush` makes what
    was recorded of the steps safe, and raises if another start has taken over.
    """
    return checkpoint.OnDisk() if mirror.key_of(folder) is None else _InObjects(attempt, flush)


def save(
    folder: Path, step: int, kept_in: checkpoint.OnDisk, engine: Any, tokenizer: Any, facts: dict[str, Any]
) -> None:
    """Write the checkpoint of the state after `step` steps. Collective."""
    weights = zero.whole_weights(engine)
    checkpoint.save(
        folder,
        step,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        fragments=zero.fragments(engine, step),
        save_model=lambda path: checkpoint.save_model(path, engine.module, weights, tokenizer),
        gather=_everyones,
        facts=facts,
        store=kept_in,
    )


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and whatever a killed process left half-written."""
    if mirror.key_of(folder) is not None:
        names = mirror.names(folder)
        kept = sorted(_whole(names))[-keep:]
        for name in {name.partition("/")[0] for name in names} - set(kept):
            mirror.delete(folder / name / "manifest.json")  # first: without it the others are nothing
            mirror.discard(folder / name)
    checkpoint.prune(folder, keep)


def export(folder: Path) -> None:
    """The newest checkpoint's model as STAGE/model."""
    found = newest(folder / "checkpoints")
    assert found is not None, "training ended without a checkpoint"
    model = mirror.new_folder(folder / "model")
    shutil.copytree(found.model, model, dirs_exist_ok=True)
    mirror.publish(model, folder / "model")


class _InObjects(checkpoint.OnDisk):
    """Sends a checkpoint's files when a rank has written its own, and keeps none here."""

    def __init__(self, attempt: str, flush: Callable[[], None]):
        self._attempt, self._flush = attempt, flush

    def name(self, step: int) -> str:
        return f"{super().name(step)}.{self._attempt}"

    def prepare(self, partial: Path) -> None:
        partial.mkdir(parents=True, exist_ok=True)

    def hand_over(self, partial: Path, final: Path, names: list[str]) -> None:
        objects.for_all(lambda name: objects.upload(partial / name, f"{mirror.key_of(final)}/{name}"), names)
        for name in names:
            (partial / name).unlink()

    def publish(self, partial: Path, final: Path) -> None:
        self._flush()
        self.hand_over(partial, final, ["manifest.json"])
        shutil.rmtree(partial)


def _everyones(mine: dict[str, str]) -> list[dict[str, str]]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _whole(names: list[str]) -> list[str]:
    """Checkpoints whose manifest is there, which is sent last."""
    parts = (name.split("/") for name in names)
    return [part[0] for part in parts if part[0].startswith("step-") and part[1:] == ["manifest.json"]]


def _fetched(path: Path) -> dict[str, Any]:
    """The checkpoint's manifest, its files on this machine. ValueError names the first that is missing or altered."""
    try:
        objects.for_all(mirror.fetch, [path / name for name in mirror.names(path)])
    except objects.Missing as error:
        raise ValueError(str(error)) from None
    try:
        return checkpoint.verify(path)
    except ValueError:
        _drop([path])  # it may be our copy that is damaged
        objects.for_all(mirror.fetch, [path / name for name in mirror.names(path)])
        return checkpoint.verify(path)


def _drop(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # another rank of this machine may be at it too
