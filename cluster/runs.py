"""The run folder: where stages leave their artefacts, whole or not at all.

runs/NAME/recipe.yaml      the resolved recipe
runs/NAME/lineage.json     what each artefact was made of
runs/NAME/STAGE/           artefacts, metrics.jsonl, logs/, state.json while it runs, done.json written last
runs/NAME/jobs/            what each attempt as a Ray job printed
runs/NAME/.previous/       stages whose settings changed, kept under their key and taken back if it returns
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.errors import BadInput, PreflightRefused, Problem
from llm.files import hash_file, write_json

SCHEMA_VERSION = 1
LOCK_TRIES = 5


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder inside a run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def stop_request(self) -> Path:
        """Its presence asks a running stage to save its state and end."""
        return self.path / "stop"

    def done(self) -> dict[str, Any] | None:
        """What the stage's done-marker says, or None if the stage has not finished."""
        return read_json(self.path / "done.json")

    def begin(self, key: str) -> None:
        """Make the folder ready for work under `key`: continue what that key began, put anything else aside."""
        state = read_json(self.path / "state.json")
        if self.path.exists() and (state or {}).get("key") != key:
            self._put_aside((state or {}).get("key", "unknown"))
        self._take_back(key)
        self.logs.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "state.json", {"key": key})
        self.stop_request.unlink(missing_ok=True)
        for partial in self.path.glob(".partial-*"):
            remove(partial)

    def forget_done(self) -> None:
        """Take the done-marker away: the stage has to run again."""
        (self.path / "done.json").unlink(missing_ok=True)

    @contextmanager
    def artefact(self, name: str) -> Iterator[Path]:
        """A folder to fill, which becomes STAGE/`name` when the block ends and leaves no trace if it fails."""
        partial = self.path / f".partial-{name}"
        remove(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            remove(self.path / name)
            partial.rename(self.path / name)
        finally:
            remove(partial)

    def finish(self, done: dict[str, Any]) -> None:
        """Write the done-marker, last of all."""
        write_json(self.path / "done.json", done)

    def _put_aside(self, key: str) -> None:
        aside = self._previous(key)
        remove(aside)
        aside.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(aside)

    def _take_back(self, key: str) -> None:
        aside = self._previous(key)
        if aside.exists() and not self.path.exists():
            aside.rename(self.path)

    def _previous(self, key: str) -> Path:
        return self.path.parent / ".previous" / f"{self.name}-{key[:12]}"


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)

    @property
    def lineage(self) -> Path:
        return self.path / "lineage.json"

    @property
    def jobs(self) -> Path:
        """Where the output of Ray jobs that worked on the run is kept, a file an attempt."""
        return self.path / "jobs"

    def check_schema(self) -> None:
        """Refuse a folder that another version of the layout wrote, or that is no run at all."""
        lineage = read_json(self.lineage)
        if lineage is None:
            if self.path.is_dir() and any(child.name not in (".lock", "jobs") for child in self.path.iterdir()):
                raise BadInput(
                    Problem(f"{self.path} exists and is not a run folder (no lineage.json)", "use name= or --runs")
                )
            return
        version = lineage.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BadInput(
                Problem(
                    f"{self.path} is a run folder of schema version {version}, this is version {SCHEMA_VERSION}",
                    "use the version of headwater that made it, or start a new run with name=",
                )
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process alone. The lock falls with the process, however that ends."""
        with _lock_file(self.path) as handle:
            if not _taken(handle):
                raise PreflightRefused(
                    Problem(f"another command is working on {self.path}", "wait for it, or use name= for a second run")
                )
            yield

    def is_held(self) -> bool:
        """Whether some process is working on the run."""
        if not (self.path / ".lock").exists():
            return False
        with open(self.path / ".lock") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False


def _taken(handle: IO[str]) -> bool:
    """Whether the lock is ours now. `is_held` has it for a moment when it looks, which is no reason to be refused."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.1)
    return False


def _lock_file(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "w")
    except OSError as error:
        raise BadInput(Problem(f"cannot write to {folder}: {error}", "use --runs with a folder you own")) from None


def runs_root(flag: str | None) -> Path:
    """The folder that holds all runs: `--runs`, HEADWATER_RUNS, or runs/ where the command is given."""
    chosen = flag or os.environ.get("HEADWATER_RUNS") or "runs"
    refuse_object_store(chosen)
    return Path(chosen).expanduser().absolute()


def refuse_object_store(root: str) -> None:
    """BadInput for an address such as s3://BUCKET, which would otherwise become a folder called "s3:"."""
    if "://" in root:
        raise BadInput(Problem(f"runs can't lie in object storage yet, got '{root}'", "use a folder every node sees"))


def find_run(name_or_path: str, root: Path) -> Run:
    """The run called that, or the run folder at that path."""
    for candidate in (root / name_or_path, Path(name_or_path).expanduser().absolute()):
        if (candidate / "lineage.json").is_file():
            run = Run(candidate)
            run.check_schema()
            return run
    raise BadInput(Problem(f"no run '{name_or_path}' under {root}", _known_runs(root)))


def _known_runs(root: Path) -> str:
    names = sorted(path.parent.name for path in root.glob("*/lineage.json"))
    return f"runs there: {', '.join(names)}" if names else "make one with: headwater run tiny"


def canonical_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    body = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(body.encode()).hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None if there is no such file. A damaged file is BadInput."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise BadInput(Problem(f"{path} is damaged or unreadable: {error}", "restore it or remove it")) from None


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
