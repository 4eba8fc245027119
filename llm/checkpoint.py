"""Checkpoints: an ordinary Hugging Face model beside the training state, whole or not there.

    checkpoints/step-00000120/model/                     what `from_pretrained` loads, in several files if it is large
    checkpoints/step-00000120/state-00-of-02.safetensors a rank's fp32 weights and moments, as fragments
    checkpoints/step-00000120/manifest.json              step, tokenizer fingerprint, SHA-256 of every file
    checkpoints/latest.json                              the newest one, written last

A checkpoint is filled under another name, hashed, renamed, and only then pointed to.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llm import boxes
from llm.boxes import Stretch
from llm.files import hash_file, write_json
from llm.slices import Columns
from llm.zero import MOMENTS, Fragment

log = logging.getLogger("headwater")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: every file is there with the hash that its manifest names."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken; the next one to take has this number, counted from 0."""
        return int(self.manifest["step"])

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def counters(self) -> dict[str, float]:
        """What the optimizer had counted (`zero.counters`)."""
        return self.manifest.get("optimizer", {"steps": float(self.step)})


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`. A damaged one is named in the log and the one before it is used."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return Checkpoint(path, verify(path))
        except ValueError as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", path, error)
    return None


def verify(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`. ValueError names the first file that is missing or altered."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest.json: {error}") from None
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if hash_file(path / name) != expected:
            raise ValueError(f"{name} has another SHA-256 than when it was written")
    return manifest


class OnDisk:
    """Where checkpoints are kept: here, a disk that every rank sees."""

    def name(self, step: int) -> str:
        """What the checkpoint is called."""
        return f"step-{step:08d}"

    def prepare(self, partial: Path) -> None:
        """Make `partial` on this rank's machine, unless rank 0 did."""

    def hand_over(self, partial: Path, final: Path, names: list[str]) -> None:
        """Take the files `names`, which this rank has written to `partial`."""

    def publish(self, partial: Path, final: Path) -> None:
        """Make the checkpoint one that counts. On rank 0, after everyone has handed over; the manifest is there."""
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_json(final.parent / "latest.json", {"checkpoint": final.name, "step": int(final.name[5:])})


def save(
    folder: Path,
    step: int,
    *,
    rank: int,
    world: int,
    fragments: Iterable[Fragment],
    save_model: Callable[[Path], None],
    gather: Callable[[dict[str, str]], list[dict[str, str]]],
    facts: dict[str, Any],
    store: OnDisk | None = None,
) -> None:
    """Write checkpoint `step`. Collective: every rank calls it, and none returns before its own part is kept.

    `fragments` are copies (`copies`), so training may go on meanwhile. `save_model(path)` writes the Hugging Face
    folder on rank 0; `gather` gives every rank what each one passed, once all have passed it; `facts` go into the
    manifest.
    """
    store = store or OnDisk()
    final = folder / store.name(step)
    partial = folder / f".partial-{final.name}"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    gather({})
    store.prepare(partial)
    own = _write_part(partial, rank, world, fragments, save_model)
    store.hand_over(partial, final, list(own))
    files = {name: sha256 for part in gather(own) for name, sha256 in part.items()}
    if rank == 0:
        write_json(partial / "manifest.json", {"step": step, "world": world, **facts, "files": files})
        store.publish(partial, final)


def _write_part(
    partial: Path, rank: int, world: int, fragments: Iterable[Fragment], save_model: Callable[[Path], None]
) -> dict[str, str]:
    """What a rank writes of a checkpoint: the SHA-256 of each file by name."""
    state = partial / f"state-{rank:02d}-of-{world:02d}.safetensors"
    save_state(state, fragments)
    written = [state]
    if rank == 0:
        save_model(partial / "model")
        written += sorted(path for path in (partial / "model").rglob("*") if path.is_file())
    return {path.relative_to(partial).as_posix(): hash_file(path) for path in written}


def prune(folder: Path, kept: Collection[str]) -> None:
    """Remove the checkpoints whose names are not among `kept`, and whatever a killed process left half-written."""
    for path in folder.glob("step-*"):
        if path.name not in kept:
            shutil.rmtree(path)
    for path in folder.glob(".partial-step-*"):
        shutil.rmtree(path)


def to_keep(losses: dict[str, float | None], newest: int, best: int) -> set[str]:
    """Names of the `newest` checkpoints, and of the `best` of lowest held-out loss.

    losses: held-out loss by name, None where it wasn't measured; names sort by step.
    """
    measured = sorted((loss, name) for name, loss in losses.items() if loss is not None)
    return {*sorted(losses)[-newest:], *(name for _, name in measured[:best])}


def copies(fragments: Iterable[Fragment]) -> list[Fragment]:
    """Fragments that stay as they are when training goes on, on the CPU; without those that another rank saves."""
    own = (one for one in fragments if not one.spare)
    return [replace(one, tensors={kind: _copy(view) for kind, view in one.tensors.items()}) for one in own]


def copies_of_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that stay as they are; those that are one tensor under two names (tied ones) stay one."""
    made: dict[int, torch.Tensor] = {}
    for tensor in weights.values():
        made.setdefault(tensor.data_ptr(), _copy(tensor))
    return {name: made[tensor.data_ptr()] for name, tensor in weights.items()}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def save_state(path: Path, fragments: Iterable[Fragment]) -> None:
    """Write a rank's fragments to one safetensors file; where each is in its parameter stands in the metadata."""
    tensors, starts, columns = {}, {}, {}
    for fragment in fragments:
        starts[fragment.name] = fragment.start
        if fragment.columns:
            columns[fragment.name] = fragment.columns
        tensors.update({f"{fragment.name}/{kind}": tensor for kind, tensor in fragment.tensors.items()})
    save_file(tensors, path, metadata={"starts": json.dumps(starts), "columns": json.dumps(columns)})


def restore_state(checkpoint: Checkpoint, fragments: Iterable[Fragment]) -> None:
    """Fill this rank's fragments from a checkpoint, whatever number of ranks wrote it.

    ValueError names a gap, or the optimizers if another one wrote it.
    """
    files = [_StateFile(path) for path in sorted(checkpoint.path.glob("state-*.safetensors"))]
    for fragment in fragments:
        filled = sum(file.copy_into(fragment) for file in files)
        if filled != fragment.numel:
            raise ValueError(
                f"{checkpoint.path} holds {filled} of the {fragment.numel} values of '{fragment.name}' from "
                f"{fragment.start} on: it was written for another model"
            )


class _StateFile:
    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._starts: dict[str, int] = json.loads(self._file.metadata()["starts"])
        # Missing in checkpoints written before ranks could have some columns of a matrix.
        self._columns: dict[str, list[int]] = json.loads(self._file.metadata().get("columns", "{}"))
        self._keys = set(self._file.keys())

    def copy_into(self, fragment: Fragment) -> int:
        """Copy what this file holds of `fragment`; how many values that was."""
        if fragment.name not in self._starts:
            return 0
        self._check_optimizer(fragment)
        saved = {kind: self._file.get_slice(f"{fragment.name}/{kind}") for kind in fragment.tensors}
        mine = Stretch(fragment.start, fragment.numel, fragment.columns)
        copied = 0
        for into, out_of in boxes.overlaps(mine, self._stretch(fragment.name, saved["weight"].get_shape()[0])):
            for kind, tensor in fragment.tensors.items():
                values = boxes.view(saved[kind][out_of.begin : out_of.end], out_of)
                boxes.view(tensor[into.begin : into.end], into).copy_(values)
            copied += values.numel()
        return copied

    def _stretch(self, name: str, numel: int) -> Stretch:
        columns = self._columns.get(name)
        return Stretch(self._starts[name], numel, Columns(*columns) if columns else None)

    def _check_optimizer(self, fragment: Fragment) -> None:
        if not all(f"{fragment.name}/{kind}" in self._keys for kind in fragment.tensors):
            wrote = next(name for name, kinds in MOMENTS.items() if f"{fragment.name}/{kinds[0]}" in self._keys)
            reads = next(name for name, kinds in MOMENTS.items() if kinds[0] in fragment.tensors)
            raise ValueError(
                f"'{fragment.name}' was saved with optimizer={wrote} and can't go on with optimizer={reads}: "
                f"set optimizer={wrote}, or begin anew"
            )


def save_model(folder: Path, model, weights: dict[str, torch.Tensor], tokenizer) -> None:
    """Write a Hugging Face folder: configuration, safetensors, tokenizer with its chat template."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def save_around(folder: Path, model, weights: Path, tokenizer) -> None:
    """The same around safetensors that were written to the folder `weights` before, which becomes `folder`."""
    weights.rename(folder)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
