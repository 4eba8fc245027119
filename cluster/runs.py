"""The run folder: where stages leave their artefacts, whole or not at all.

runs/NAME/recipe.yaml      the resolved recipe
runs/NAME/lineage.json     what each artefact was made of
runs/NAME/STAGE/           artefacts, metrics.jsonl, logs/, state.json while it runs, done.json written last
runs/NAME/jobs/            what each attempt as a Ray job printed
runs/NAME/.previous/       stages whose settings changed, kept under their key and taken back if it returns

runs/ is a folder that every node sees, or s3://BUCKET/PREFIX, worked on through each node's copy (`cluster.mirror`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster import claims, mirror, objects
from cluster.errors import BadInput, PreflightRefused, Problem, StageFailed
from llm import files

SCHEMA_VERSION = 1
LOCK_TRIES = 5
STOP_LOOKED_FOR_EVERY_S = 2.0  # in object storage, where to look is a request

_stop_looked_for: dict[Path, tuple[float, bool]] = {}


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
        """Its presence asks a running stage to save its state and end (`ask_to_stop`, `stop_is_asked`)."""
        return self.path / "stop"

    def done(self) -> dict[str, Any] | None:
        """What the stage's done-marker says, or None if the stage has not finished."""
        return read_json(self.path / "done.json")

    def begin(self, key: str) -> None:
        """Make the folder ready for work under `key`: continue what that key began, put anything else aside."""
        mirror.forget()
        state = read_json(self.path / "state.json")
        if is_there(self.path) and (state or {}).get("key") != key:
            self._put_aside((state or {}).get("key", "unknown"))
        self._take_back(key)
        self.logs.mkdir(parents=True, exist_ok=True)
        begun = {"key": key, "tag": uuid.uuid4().hex[:8], **(read_json(self.path / "state.json") or {})}
        write_json(self.path / "state.json", begun)
        remove(self.stop_request)
        for partial in self.path.glob(".partial-*"):
            remove(partial)
        mirror.sweep(self.path, begun["tag"])

    def forget_done(self) -> None:
        """Take the done-marker away, and what was kept to go on with: the stage has to run again."""
        remove(self.path / "done.json")
        remove(self.work)
        write_json(self.path / "state.json", {**read_json(self.path / "state.json"), "tag": uuid.uuid4().hex[:8]})

    @property
    def work(self) -> Path:
        """What the stage's steps leave to one another, and to the same command after a kill; gone when it is done."""
        return self.path / "steps"

    def has(self, name: str) -> bool:
        """Whether the artefact is there, whole."""
        return mirror.is_published(self.path / name)

    @contextmanager
    def artefact(self, name: str) -> Iterator[Path]:
        """A folder to fill, which becomes STAGE/`name` when the block ends and leaves no trace if it fails.

        Tasks on other nodes fill it too; what they write they hand to `mirror.send`.
        """
        partial = mirror.new_folder(self.path / name)
        try:
            yield partial
            mirror.publish(partial, self.path / name)
        except BaseException:
            with objects.hurried(), suppress(StageFailed):
                mirror.discard(partial)
            raise

    def kept_folder(self, name: str) -> Path:
        """A folder to fill, part by part and over several attempts, until `publish` makes it STAGE/`name`."""
        return mirror.kept_folder(self.path / name, read_json(self.path / "state.json")["tag"])

    def publish(self, name: str, facts: dict[str, list[Any]]) -> None:
        """Make the kept folder of that name STAGE/`name`. `facts`: bytes and SHA-256 of each file in it.

        A command that is killed after this and before its done-marker finds it done.
        """
        folder = self.kept_folder(name)
        absent = [file for file in facts if not (folder / file).is_file()]
        if mirror.key_of(folder) is None and absent:
            if any(_facts(self.path / name / file) != known for file, known in facts.items()):
                raise StageFailed(Problem(f"{folder / absent[0]} is gone", f"remove {self.path}; run the stage again"))
            return remove(folder)
        mirror.publish(folder, self.path / name, facts)

    def finish(self, done: dict[str, Any]) -> None:
        """Write the done-marker, last of all."""
        write_json(self.path / "done.json", done)
        remove(self.work)

    def _put_aside(self, key: str) -> None:
        aside = self._previous(key)
        if mirror.key_of(self.path):
            mirror.move(self.path, aside)
            shutil.rmtree(self.path, ignore_errors=True)
            return
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(aside)

    def _take_back(self, key: str) -> None:
        aside = self._previous(key)
        if not is_there(aside) or is_there(self.path):
            return
        if mirror.key_of(self.path):
            mirror.move(aside, self.path)
        else:
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
            if {name for name in mirror.children(self.path) if not name.startswith(".")} - {"jobs", "recipe.yaml"}:
                what = f"{mirror.shown(self.path)} exists and is not a run folder (no lineage.json)"
                raise BadInput(Problem(what, "use name= or --runs"))
            return
        version = lineage.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BadInput(
                Problem(
                    f"{mirror.shown(self.path)} has schema version {version}, this is version {SCHEMA_VERSION}",
                    "use the version of headwater that made it, or start a new run with name=",
                )
            )

    def check_access(self) -> None:
        """PreflightRefused if the run is to lie in object storage that can't be used."""
        if key := mirror.key_of(self.path):
            objects.check_access(key)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process alone. The lock falls with the process, however that ends."""
        with _lock_file(self.path) as handle:
            if not _taken(handle):
                raise PreflightRefused(
                    Problem(f"another command is working on {self.path}", "wait for it, or use name= for a second run")
                )
            with claims.claimed(self.path):
                yield

    def is_held(self) -> bool:
        """Whether some process is working on the run."""
        if mirror.key_of(self.path):
            return claims.is_claimed(self.path)
        if not (self.path / ".lock").exists():
            return False
        with open(self.path / ".lock") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False


def _facts(path: Path) -> list[Any] | None:
    return [path.stat().st_size, files.hash_file(path)] if path.is_file() else None


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
        setting = mirror.CACHE_VARIABLE if mirror.key_of(folder) else "--runs"
        raise BadInput(Problem(f"cannot write to {folder}: {error}", f"use {setting} with a folder you own")) from None


def runs_root(flag: str | None) -> Path:
    """The folder that holds all runs: `--runs`, HEADWATER_RUNS, or runs/ where the command is given."""
    return folder_at(flag or os.environ.get("HEADWATER_RUNS") or "runs")


def folder_at(name: str) -> Path:
    """The folder at a path or an address."""
    return mirror.local(name) if "://" in name else Path(name).expanduser().absolute()


def find_run(name_or_path: str, root: Path) -> Run:
    """The run called that, or the run folder at that path or address."""
    named = [] if "://" in name_or_path else [root / name_or_path]
    for candidate in (*named, folder_at(name_or_path)):
        if mirror.exists(candidate / "lineage.json"):
            run = Run(candidate)
            run.check_schema()
            return run
    raise BadInput(Problem(f"no run '{name_or_path}' under {mirror.shown(root)}", _known_runs(root)))


def _known_runs(root: Path) -> str:
    names = [name for name in mirror.children(root) if mirror.exists(root / name / "lineage.json")]
    return f"runs there: {', '.join(names)}" if names else "make one with: headwater run tiny"


def canonical_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    body = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(body.encode()).hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by relative name."""
    return mirror.hashes(folder)


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None if there is no such file. A damaged file is BadInput."""
    try:
        return json.loads(mirror.read(path).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        what = f"{mirror.shown(path)} is damaged or unreadable: {error}"
        raise BadInput(Problem(what, "restore it or remove it")) from None


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` in one step: readers see the old file or the new one."""
    mirror.make(path.parent)
    files.write_json(path, value)
    mirror.send(path)


def is_there(folder: Path) -> bool:
    """Whether the folder is there; in object storage, whether anything is in it."""
    return bool(mirror.names(folder)) if mirror.key_of(folder) else folder.exists()


def ask_to_stop(folder: Path) -> None:
    """Ask the stage at work in `folder` to save its state and end."""
    mirror.make(folder)
    (folder / "stop").touch()
    mirror.send(folder / "stop")


def stop_is_asked(folder: Path) -> bool:
    """Whether the stage at work in `folder` is to save its state and end."""
    request = folder / "stop"
    if mirror.key_of(request) is None:
        return request.exists()
    looked, found = _stop_looked_for.get(request, (-STOP_LOOKED_FOR_EVERY_S, False))
    if time.monotonic() - looked >= STOP_LOOKED_FOR_EVERY_S:
        found = mirror.seen(request)
        _stop_looked_for[request] = (time.monotonic(), found)
    return found


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    mirror.delete(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
