"""A training stage's checkpoints (`llm.checkpoint`), on a disk that every node sees or in object storage.

There each has a name of its own, step-00000120.3f2ab9c1: every rank sends its part, and rank 0 the manifest, last.

What an earlier start of the workers (`pipelines.starts`) sends after the last has begun, of a later step, counts no
more: the records were cut back to that step.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster import mirror, objects
from llm import checkpoint, parts, zero
from llm.checkpoint import Checkpoint
from pipelines import starts

PATIENCE = timedelta(minutes=30)  # how long a rank waits for another's part of a checkpoint

log = logging.getLogger("headwater")


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, on this machine. A damaged one is named and the one before it used."""
    if mirror.key_of(folder) is None:
        return checkpoint.newest(folder)
    for name in sorted(_names(folder), reverse=True):
        try:
            found = fetched(folder / name)
        except ValueError as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", mirror.shown(folder / name), error)
            mirror.delete(folder / name / "manifest.json")  # so that it counts no more, for pruning either
        else:
            return found
    return None


def fetched(path: Path) -> Checkpoint:
    """The checkpoint at `path`; on a disk as whoever chose it has found it.

    Of one in object storage this machine gets a copy, its only one. ValueError names the first file that is missing or
    altered.
    """
    if mirror.key_of(path) is None:
        return Checkpoint(path, json.loads((path / "manifest.json").read_text()))
    manifest = _fetched(path)
    _drop(other for other in path.parent.glob("step-*") if other != path)
    return Checkpoint(path, manifest)


def store(folder: Path, attempt: str, flush: Callable[[], None]) -> checkpoint.OnDisk:
    """Where the checkpoints of `folder` are kept.

    `attempt` is a word that all ranks of this start of the workers share, and no other start has. `flush` makes what
    was recorded of the steps safe, and raises if another start has taken over.
    """
    return checkpoint.OnDisk() if mirror.key_of(folder) is None else _InObjects(attempt, flush)


class Saver:
    """Saves a training stage's checkpoints beside its training, one at a time.

    Training waits for a copy of its state alone, and for that no sooner than it changes the state again. The copy is
    of this rank's share of the optimizer's state (12 bytes a parameter over all ranks), and on rank 0 of the weights
    in the compute precision; where ranks hold parts of them, and they fill more than one file, those are written
    before training goes on.
    """

    def __init__(self, job_folder: Path, kept_in: checkpoint.OnDisk, tokenizer: Any, keep: tuple[int, int]):
        """keep: how many of the newest checkpoints, and of those with the lowest held-out loss. Collective."""
        self._folder, self._kept_in, self._tokenizer, self._keep = job_folder, kept_in, tokenizer, keep
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._copied: Future[Any] | None = None
        self._saved: Future[None] | None = None
        self.held_up_s = 0.0  # how long training has waited for saves

    def begin(self, engine: Any, step: int, facts: dict[str, Any]) -> None:
        """Have the state after `step` steps saved. Collective. Raises what the save before failed of."""
        with self._holding_up():
            self.settle()
            in_files = zero.is_parted(engine) and self._in_files(engine, step)
            whole = not in_files and (dist.get_rank() == 0 or zero.is_parted(engine))
            weights = zero.whole_weights(engine) if whole else {}
            copy_state = _state(engine)
            facts = {**facts, "optimizer": zero.counters(engine)}
            self._copied = self._threads.submit(_copies, copy_state, weights if dist.get_rank() == 0 else {})
            self._saved = self._threads.submit(self._save, self._copied, engine.module, step, facts, in_files or None)

    def _in_files(self, engine: Any, step: int) -> Path | None:
        """Write the weights of a model larger than one file, of which ranks hold parts, now, and say where; else None.

        Rank 0 then holds a file's weights at a time. Training waits: no rank has room for all of them. Collective.
        """
        sizes = zero.weight_bytes(engine)
        if sum(sizes.values()) <= parts.FILE_BYTES:
            return None
        folder = self._folder / f".partial-{checkpoint.OnDisk().name(step)}-weights"  # goes with `prune` if left
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        with zero.all_shared(engine):
            parts.write_weights(folder, sizes, partial(zero.gathered, engine), parts.FILE_BYTES)
        return folder

    def before_change(self) -> None:
        """To be called before the state changes: wait until it is copied. Raises what a save failed of."""
        if self._saved and self._saved.done():
            self._saved.result()
        if copied := self._copied:
            with self._holding_up():
                copied.result()

    def settle(self) -> None:
        """Wait until the last checkpoint that was begun is whole. Raises what it failed of."""
        if self._saved:
            self._saved.result()
        self._copied = self._saved = None

    def _save(self, copied: Future[Any], model: Any, step: int, facts: dict[str, Any], in_files: Path | None) -> None:
        fragments, weights = copied.result()
        if in_files:
            save_model = partial(checkpoint.save_around, model=model, weights=in_files, tokenizer=self._tokenizer)
        else:
            save_model = partial(checkpoint.save_model, model=model, weights=weights, tokenizer=self._tokenizer)
        checkpoint.save(
            self._folder,
            step,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            fragments=fragments,
            save_model=save_model,
            gather=self._everyones,
            facts=facts,
            store=self._kept_in,
        )
        self._copied = None  # so that the copies go
        log.info("checkpoint of step %d is whole", step)
        if dist.get_rank() == 0:
            prune(self._folder, *self._keep)

    def _everyones(self, mine: dict[str, str]) -> list[dict[str, str]]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=self._group)
        return found

    @contextmanager
    def _holding_up(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.held_up_s += time.monotonic() - begun


def _state(engine: Any) -> Callable[[], list[zero.Fragment]]:
    """What copies this rank's share of the optimizer's state; of one that lies on a disk the copy is made now."""
    if zero.is_on_disk(engine):
        made = checkpoint.copies(zero.fragments(engine))
        return lambda: made
    views = list(zero.fragments(engine))
    return lambda: checkpoint.copies(views)


def _copies(copy_state: Callable[[], list[zero.Fragment]], weights: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    return copy_state(), checkpoint.copies_of_weights(weights)


def before(folder: Path, left_out: list[dict[str, Any]]) -> int:
    """The step to go back to where batches are to be left out; the newest checkpoint goes if that was tried last."""
    found = newest(folder)
    step = found.step if found else 0
    older = [name for name in _names(folder) if found and name != found.path.name]
    if not (found and older and left_out and left_out[-1]["back_to"] == step):
        return step
    mirror.discard(found.path)
    return before(folder, [])


def set_aside_damaged(folder: Path, whole: Checkpoint | None) -> None:
    """Rename checkpoints newer than the newest whole one, so that they count no more, for pruning either.

    On a disk; in object storage `newest` has seen to it.
    """
    if mirror.key_of(folder) is None:
        for path in folder.glob("step-*"):
            if whole is None or path.name > whole.path.name:
                path.rename(path.with_name(f"damaged-{uuid.uuid4().hex[:8]}-{path.name}"))


def prune(folder: Path, newest: int, best: int) -> None:
    """Remove all checkpoints but the newest and those of the lowest held-out loss, and what was left half-written."""
    kept = checkpoint.to_keep(_losses(folder, _names(folder)), newest, best)
    if mirror.key_of(folder) is not None:
        for name in {name.partition("/")[0] for name in mirror.names(folder)} - kept - {starts.BEGUN}:
            mirror.delete(folder / name / "manifest.json")  # first: without it the others are nothing
            mirror.discard(folder / name)
    checkpoint.prune(folder, kept)


def _names(folder: Path) -> list[str]:
    """The checkpoints that count, damaged ones too."""
    if mirror.key_of(folder) is None:
        return [path.name for path in folder.glob("step-*")]
    last = starts.begun(folder)
    return [name for name in _whole(mirror.names(folder)) if last is None or _counts(name, last)]


def _counts(name: str, last: starts.Begun) -> bool:
    step, _, attempt = name.removeprefix("step-").partition(".")
    return attempt == last.attempt or int(step) <= last.step


def _losses(folder: Path, names: list[str]) -> dict[str, float | None]:
    """The held-out loss in each checkpoint's manifest; of one that can't be read, none."""
    found: dict[str, float | None] = {}
    for name in names:
        try:
            found[name] = json.loads(mirror.read(folder / name / "manifest.json")).get("held_out_loss")
        except (OSError, ValueError):
            found[name] = None
    return found


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
