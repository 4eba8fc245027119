"""Nothing starts that cannot finish: resources and disk are compared with what will be asked of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Problem
from cluster.mirror import CACHE_VARIABLE, key_of

Resources = dict[str, float]  # by Ray's names: CPU, GPU

DISK_RESERVE = 256 << 20  # bytes left alone
SHOWN_NODES = 4


@dataclass(frozen=True)
class Piece:
    """What has to find room on one node, `count` times at once: a worker, an actor or a task.

    settings: those that decide its size. most: how many of it can be used, where that is more than `count`.
    """

    what: str
    settings: str
    cpus: float
    gpus: float = 0.0
    count: int = 1
    most: int = 0

    @property
    def claims(self) -> Resources:
        """What Ray sets aside for one: of a GPU that several share, an equal share of it for each."""
        shared = 0 < self.gpus < 1
        return {"CPU": self.cpus, "GPU": 1 / math.floor(1 / self.gpus + 1e-9) if shared else self.gpus}


@dataclass(frozen=True)
class Place:
    """A node that is alive, and what it has: all of it, or what nobody holds."""

    name: str
    resources: Resources


def resource_problems(who: str, pieces: Sequence[Piece], places: Sequence[Place]) -> list[Problem]:
    """What `who` needs at once and the nodes do not have, in sum or each piece on one node; by name."""
    return [*_odd_problems(who, pieces)] or [*_sum_problems(who, pieces, places)] or [*_unplaced(who, pieces, places)]


def _odd_problems(who: str, pieces: Sequence[Piece]) -> Iterator[Problem]:
    for piece in pieces:
        if piece.gpus > 1 and piece.gpus % 1:
            what = f"each {piece.what} of {who} claims {piece.gpus:g} GPUs, and Ray divides only a single one"
            yield Problem(what, f"set {piece.settings} to a whole number, or to a share below 1")


def _sum_problems(who: str, pieces: Sequence[Piece], places: Sequence[Place]) -> Iterator[Problem]:
    for kind in ("CPU", "GPU"):
        need = sum(piece.count * piece.claims[kind] for piece in pieces)
        there = sum(place.resources.get(kind, 0.0) for place in places)
        if need > there + 1e-9:
            what = f"{who} needs {need:g} {kind}s at once (Ray Data's share included), Ray has {there:g}"
            settings = " or ".join(dict.fromkeys(piece.settings for piece in pieces if piece.claims[kind]))
            yield Problem(what, f"lower {settings}, or use a larger cluster")


def _unplaced(who: str, pieces: Sequence[Piece], places: Sequence[Place]) -> Iterator[Problem]:
    """The first piece that finds no node, the largest placed first, each on the first node that has room for it."""
    rooms = [dict(place.resources) for place in places]
    for piece in sorted(pieces, key=lambda one: (one.claims["GPU"], one.claims["CPU"]), reverse=True):
        for number in range(piece.count):
            room = next((room for room in rooms if _holds(room, piece)), None)
            if room is None:
                yield _no_room(who, piece, number, places)
                return
            for kind, amount in piece.claims.items():
                room[kind] = room.get(kind, 0.0) - amount


def _holds(room: Resources, piece: Piece) -> bool:
    return all(room.get(kind, 0.0) >= amount - 1e-9 for kind, amount in piece.claims.items())


def _no_room(who: str, piece: Piece, placed: int, places: Sequence[Place]) -> Problem:
    remedy = f"lower {piece.settings}, or use a cluster with larger nodes"
    if any(_holds(place.resources, piece) for place in places):
        there = ", ".join(f"{place.name} {_amounts(place.resources)}" for place in places[:SHOWN_NODES])
        more = f" and {len(places) - SHOWN_NODES} more" if len(places) > SHOWN_NODES else ""
        what = f"{piece.count} of {who}'s {piece.what}s, {_amounts(piece.claims)} each on one node"
        return Problem(f"of {what}, {placed} find room beside the rest: {there}{more}", remedy)
    largest = max(places, key=lambda one: _rank(one, piece))
    lacking = {kind: need for kind, need in piece.claims.items() if need > largest.resources.get(kind, 0.0) + 1e-9}
    has = _amounts({kind: largest.resources.get(kind, 0.0) for kind in lacking})
    what = f"each {piece.what} of {who} needs {_amounts(lacking)} on one node"
    return Problem(f"{what}, the largest node ({largest.name}) has {has}", remedy)


def _rank(place: Place, piece: Piece) -> tuple[float, ...]:
    """How much of what the piece asks for is there, the scarce first."""
    return tuple(min(place.resources.get(kind, 0.0), piece.claims[kind]) for kind in ("GPU", "CPU"))


def _amounts(resources: Resources) -> str:
    told = [f"{resources[kind]:g} {kind}s" for kind in ("CPU", "GPU") if kind in resources]
    return " and ".join(one for one in told if len(resources) == 1 or not one.startswith("0 ")) or "no CPUs"


def starving_problems(who: str, worker: Piece, data_cpus: float, nodes: Sequence[Resources]) -> list[Problem]:
    """Kinds of nodes that as many of `worker` as fit and can be used would leave without `data_cpus`.

    Where the number of workers isn't fixed they take all the room there is, and Ray Data would wait for ever.
    """
    found = {(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes}
    return [
        Problem(
            f"on a node of {of_node:g} CPUs {fitting} workers of {who}.cpus_per_worker {worker.cpus:g} leave Ray Data "
            f"{of_node - fitting * worker.cpus:g}, and a reading task claims {data_cpus:g}",
            f"change {who}.cpus_per_worker so that {who}.data_cpus are left on each, or set {who}.min_workers to null",
        )
        for of_node, of_gpus in sorted(found)
        if (fitting := _fitting(worker, of_node, of_gpus)) and of_node - fitting * worker.cpus < data_cpus - 1e-9
    ]


def _fitting(worker: Piece, of_node: float, of_gpus: float) -> int:
    fit = min(int(of_node / worker.cpus + 1e-9), worker.most)
    return min(fit, int(of_gpus / worker.claims["GPU"] + 1e-9)) if worker.gpus else fit


def disk_problems(folder: Path, needed: int) -> list[Problem]:
    """Whether the disk under `folder` holds `needed` bytes more."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free >= needed + DISK_RESERVE:
        return []
    wanted = (needed + DISK_RESERVE) / 1e9
    return [
        Problem(
            f"the run needs about {wanted:.2f} GB under {existing}, {free / 1e9:.2f} GB are free",
            f"free space there, or use another disk with {CACHE_VARIABLE if key_of(folder) else '--runs'}",
        )
    ]
