"""Who works on a run in object storage, where nothing can be locked.

Each command puts a claim of its own and renews it, then looks whose claims are there besides. A listing shows every
write that ended before it, so of two commands at least one sees the other; whoever sees a claim renewed gives up.
A claim that isn't renewed for LEASE_S, watched by the clock of the watcher, belongs to nobody.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import mirror, objects
from cluster.errors import PreflightRefused, Problem, StageFailed
from cluster.progress import console

LEASE_S = 30.0
RENEW_S = 5.0
LOOK_S = 1.0
LATE_S = 2.0

log = logging.getLogger("headwater")
# Set when another command has taken the run: nothing of it may be touched any more.
lost = threading.Event()


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Hold a run in object storage for this process alone. PreflightRefused if another holds it.

    Waits up to LEASE_S for the claim of a process that was killed; on the same machine it sees that at once.
    """
    if (key := mirror.key_of(run)) is None:
        yield
        return
    folder = f"{key}/.claims"
    mine, ended = f"{folder}/{uuid.uuid4().hex}", threading.Event()
    objects.put(mine, _claim(0))
    renewing = threading.Thread(target=_renew_until, args=(mine, ended), name="claim", daemon=True)
    renewing.start()
    try:
        _outlast_others(folder, mine, run)
        yield
    finally:
        ended.set()
        renewing.join()
        with objects.hurried(), suppress(StageFailed):  # a claim that stays is nobody's after LEASE_S
            objects.delete(mine)


def is_claimed(run: Path) -> bool:
    """Whether a claim on the run was renewed within LEASE_S, by this machine's clock."""
    now = datetime.now(UTC).timestamp()
    claims = objects.listing(f"{mirror.key_of(run)}/.claims")
    return any(now - one.mtime.timestamp() < LEASE_S for one in claims)


def _outlast_others(folder: str, mine: str, run: Path) -> None:
    found = _others(folder, mine)
    ended = {key for key in found if _ended_here(key)}
    silent = {key: renewed for key, renewed in found.items() if key not in ended}
    if silent:
        console.print(f"{_who(next(iter(silent)))} held the run: waiting {LEASE_S:.0f} s for a sign of it")
    deadline = time.monotonic() + LEASE_S
    while silent and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        asked = time.monotonic()
        now = _others(folder, mine)
        for key in silent:
            if now.get(key, silent[key]) != silent[key]:
                raise PreflightRefused(_held(key, run))
        silent = {key: renewed for key, renewed in silent.items() if key in now}
        if time.monotonic() - asked > LATE_S:  # storage that didn't answer us didn't answer its holder either
            deadline = time.monotonic() + LEASE_S
    objects.delete(*ended, *silent)
    for key in set(silent) & set(_others(folder, mine)):  # renewed in this moment
        raise PreflightRefused(_held(key, run))


def _others(folder: str, mine: str) -> dict[str, Any]:
    """When each other claim was renewed, by the storage's clock."""
    return {one.path: one.mtime_ns for one in objects.listing(folder) if one.path != mine}


def _held(key: str, run: Path) -> Problem:
    return Problem(
        f"another command ({_who(key)}) is working on {mirror.shown(run)}",
        "wait for it, or use name= for a second run",
    )


def _renew_until(mine: str, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(RENEW_S):
        beat += 1
        try:
            if objects.size(mine) is None:
                log.error("the claim on the run was taken away: this command was silent for too long, and stops")
                lost.set()
                os.kill(os.getpid(), signal.SIGTERM)
                return
            objects.put(mine, _claim(beat))
        except StageFailed:
            continue  # while the storage is silent nobody takes it, and the work itself will notice


def _claim(beat: int) -> bytes:
    return json.dumps({**_self(), "beat": f"{beat:09d}"}).encode()


def _self() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}


def _boot() -> str:
    """Tells this machine, and within it this set of process ids, from any other."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{namespace}"
    except OSError:
        return uuid.uuid4().hex


def _ended_here(key: str) -> bool:
    """Whether the claim is of a process of this machine that is no more."""
    claim = json.loads(objects.get(key) or b"{}")
    return claim.get("boot") == _boot() and not Path(f"/proc/{claim['pid']}").exists()


def _who(key: str) -> str:
    claim = json.loads(objects.get(key) or b"{}")
    return f"process {claim.get('pid', '?')} on {claim.get('host', '?')}"
