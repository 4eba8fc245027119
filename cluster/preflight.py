"""Nothing starts that cannot finish: resources and disk are compared with what will be asked of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.errors import Problem
from cluster.mirror import CACHE_VARIABLE, key_of

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
