"""Running the command as users do, killing parts of it, and making sure that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipelines.records import read_lines

CHECKOUT = Path(__file__).resolve().parent.parent


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", *words]


def environment() -> dict[str, str]:
    """The caller's environment without what would send the command elsewhere."""
    left_out = ("RAY_ADDRESS", "HEADWATER_RUNS", "WANDB_API_KEY")
    return {key: value for key, value in os.environ.items() if key not in left_out}


def headwater(*words: str, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    """Run `headwater WORDS` to its end."""
    return subprocess.run(
        command(*words), cwd=CHECKOUT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


@contextmanager
def started(*words: str) -> Iterator[psutil.Popen]:
    """`headwater WORDS` in the background; whatever of it still lives at the end is killed, by process id."""
    process = psutil.Popen(
        command(*words), cwd=CHECKOUT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    family: dict[int, psutil.Process] = {}
    try:
        process.family = lambda: _remember(process, family)
        yield process
    finally:
        for member in [*_remember(process, family), process]:
            with _gone_is_fine():
                member.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()


def _remember(process: psutil.Process, family: dict[int, psutil.Process]) -> list[psutil.Process]:
    with _gone_is_fine():
        family.update({child.pid: child for child in process.children(recursive=True)})
    return [member for member in family.values() if member.is_running()]


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        yield


def training_workers(process: psutil.Process) -> list[psutil.Process]:
    """The Ray Train workers that `process` has started, by pid."""
    workers = [child for child in process.children(recursive=True) if "RayTrainWorker" in _title(child)]
    return sorted(workers, key=lambda worker: worker.pid)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 300) -> Any:
    """What `condition` returns once it is true; fails with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.05)
    return found


def records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run: Path, stage: str = "pretrain") -> list[float]:
    return [record["loss"] for record in read_lines(run / stage / "metrics.jsonl")]
