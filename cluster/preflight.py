"""Nothing starts that cannot finish: resources and disk are compared with what will be asked of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.errors import Problem
from cluster.mirror import CACHE_VARIABLE, key_of

Resources = dict[str, float]  # by Ray's names: CPU, GPU

DISK_RESERVE = 256 << 20  # bytes left alone


def resource_problems(who: str, cpus: float, gpus: float, available: dict[str, float]) -> list[Problem]:
    """What `who` asks for and the machine or cluster does not have."""
    wanted = {"CPU": (cpus, f"{who}.workers or {who}.cpus_per_worker"), "GPU": (gpus, f"{who}.gpus_per_worker")}
    return [
        Problem(
            f"{who} needs {need:g} {kind}s at once (Ray Data's share included), Ray has {available.get(kind, 0):g}",
            f"lower {settings}, or use a larger cluster",
        )
        for kind, (need, settings) in wanted.items()
        if need > available.get(kind, 0) + 1e-9
    ]


def starving_problems(who: str, cpus: float, gpus: float, data_cpus: float, nodes: list[Resources]) -> list[Problem]:
    """Kinds of nodes that workers of `cpus` and `gpus` each, as many as fit, would leave without `data_cpus`.

    Where the number of workers isn't fixed they take all the room there is, and Ray Data would wait for ever.
    """
    found = {(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes}
    return [
        Problem(
            f"on a node of {of_node:g} CPUs {fitting} workers of {who}.cpus_per_worker {cpus:g} leave Ray Data "
            f"{of_node - fitting * cpus:g}, and a reading task claims {data_cpus:g}",
            f"change {who}.cpus_per_worker so that {who}.data_cpus are left on each, or set {who}.min_workers to null",
        )
        for of_node, of_gpus in sorted(found)
        if (fitting := _fitting(of_node, cpus, of_gpus, gpus)) and of_node - fitting * cpus < data_cpus - 1e-9
    ]


def _fitting(of_node: float, cpus: float, of_gpus: float, gpus: float) -> int:
    by_cpus = int(of_node / cpus + 1e-9)
    return min(by_cpus, int(of_gpus / gpus + 1e-9)) if gpus else by_cpus


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
