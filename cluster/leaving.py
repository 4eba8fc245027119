"""What a pod does before it is stopped: it asks the run to save, and waits until its own part in it has ended.

Kubernetes runs `python -m cluster.leaving WORD` in the pods of k8s/ before it stops them. WORD tells by their command
lines the processes to wait for; the run is the one that HEADWATER_RUN names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import mirror
from cluster.errors import HeadwaterError
from cluster.runs import Run, ask_to_stop, folder_at


def main(arguments: Sequence[str] | None = None) -> int:
    """0 once nothing is left to wait for, 1 if something still ran when the time was up."""
    chosen = _parser().parse_args(arguments)
    if chosen.ask and running_here(chosen.word):
        _ask(os.environ.get("HEADWATER_RUN", ""))
    return 0 if wait_until_gone(chosen.word, chosen.seconds) else 1


def _ask(run: str) -> None:
    """Whatever comes of it, what runs here is waited for."""
    try:
        for stage in ask_to_save(run):
            print(f"{stage} is asked to save and to stop", file=sys.stderr)
    except HeadwaterError as error:
        print(error, file=sys.stderr)


def ask_to_save(run: str) -> list[str]:
    """Ask the stages of the run at the path or address `run` that have begun and not finished; their names."""
    if not run:
        return []
    found = Run(folder_at(run))
    begun = [found.stage(name) for name in mirror.children(found.path) if not name.startswith(".")]
    working = [stage for stage in begun if mirror.exists(stage.path / "state.json") and stage.done() is None]
    for stage in working:
        ask_to_stop(stage.path)
    return [stage.name for stage in working]


def wait_until_gone(word: str, seconds: float) -> bool:
    """Whether every process with `word` in its command line ends within `seconds`."""
    deadline = time.monotonic() + seconds
    while running_here(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def running_here(word: str) -> bool:
    """Whether a process other than this one, and than the one that started it, has `word` in its command line."""
    own = {str(os.getpid()), str(os.getppid())}
    return any(word in _command_line(path) for path in Path("/proc").glob("[0-9]*") if path.name not in own)


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
    except OSError:  # it has just ended
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.leaving", description=__doc__)
    parser.add_argument("word", help="what the command lines of the processes to wait for contain")
    parser.add_argument("--ask", action="store_true", help="if there are any, ask the run to save first")
    parser.add_argument("--for", dest="seconds", type=float, default=100, metavar="SECONDS", help="wait at most (100)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
