"""A run in object storage, worked on through a folder of this machine.

What lies at s3://BUCKET/PREFIX has a place at CACHE/s3/BUCKET/PREFIX, under the same names, so that everything else
deals in plain paths. CACHE is HEADWATER_CACHE, one path for all machines of a cluster; its content is each one's own.
A path that is not in the cache stands for itself: on a shared disk there is nothing to send and nothing to fetch.

    STAGE/done.json                  a file is one object, whole or not there
    STAGE/model.3f2ab9c1/…           a folder is objects under a name of its own, and
    STAGE/model.json                 a pointer to them, put last: {"folder": …, "files": {NAME: [bytes, SHA-256]}}
    STAGE/metrics.jsonl/…            a file that grows is numbered segments (`cluster.segments`)

Here, STAGE/model is a link to STAGE/model.3f2ab9c1, as the pointer is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import objects
from cluster.errors import BadInput, Problem, StageFailed
from llm.files import hash_file

CACHE_VARIABLE = "HEADWATER_CACHE"
SCHEME = "s3://"
DEEPEST = 3  # levels between a path inside a folder and that folder

_OWN_NAME = re.compile(r"(?P<name>[a-z_]+)\.(?P<tag>[0-9a-f]{8})")
# What this process has seen. A folder changes only between stages, which begin with `forget`.
_current: dict[Path, dict[str, Any]] = {}  # published folders and their pointers
_whole: set[Path] = set()  # what `here` has fetched


def cache() -> Path:
    """Where this machine keeps what it has of object storage."""
    return Path(os.environ.get(CACHE_VARIABLE) or _default_cache()).absolute() / "s3"


def _default_cache() -> Path:
    return Path(tempfile.gettempdir(), f"headwater-{os.getuid()}")


def same_everywhere() -> dict[str, str]:
    """Environment variables that every machine which works on a run must share."""
    return {CACHE_VARIABLE: str(cache().parent)}


def _make_cache() -> None:
    """Make the cache, for us alone. StageFailed if another user made it before us, where everyone may write."""
    folder = cache().parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder == _default_cache() and folder.stat().st_uid != os.getuid():
        raise StageFailed(
            Problem(f"{folder} belongs to another user", f"set {CACHE_VARIABLE} to a folder of your own")
        )


def local(url: str) -> Path:
    """The place of s3://BUCKET/PREFIX on this machine. BadInput for any other address."""
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    parts = [part for part in prefix.split("/") if part]
    if not url.startswith(SCHEME) or not bucket or any(part in (".", "..") for part in (bucket, *parts)):
        raise BadInput(Problem(f"'{url}' is no address of a folder in object storage", "write s3://BUCKET/PREFIX"))
    _make_cache()
    return cache().joinpath(bucket, *parts)


def key_of(path: Path) -> str | None:
    """BUCKET/NAME of the object that `path` stands for; None for a path that stands for itself."""
    if not path.is_relative_to(cache()):
        return None
    if ".." in path.parts:  # whoever may write to the bucket may not write to this machine
        raise StageFailed(Problem(f"'{path}' leads out of its folder", "see who else writes to the bucket"))
    return path.relative_to(cache()).as_posix()


def shown(path: Path) -> str:
    """The path as its user knows it."""
    key = key_of(path)
    return f"{SCHEME}{key}" if key else str(path)


# Files


def read(path: Path) -> bytes:
    """The file's bytes, as they are in the storage now. FileNotFoundError if there is none."""
    if (key := key_of(path)) is None:
        return path.read_bytes()
    if (data := objects.get(key)) is None:
        raise FileNotFoundError(2, "no such object", shown(path))
    return data


def exists(path: Path) -> bool:
    """Whether there is such a file."""
    return path.exists() if (key := key_of(path)) is None else objects.size(key) is not None


def seen(path: Path) -> bool:
    """Whether there is such a file, without waiting for storage that doesn't answer."""
    return path.exists() if (key := key_of(path)) is None else objects.seen(key)


def children(folder: Path) -> list[str]:
    """Names of what lies in the folder, in order; none if there is no folder."""
    if (key := key_of(folder)) is None:
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    return objects.children(key)


def make(folder: Path) -> None:
    """Make the folder on this machine, where each has its own; on a shared disk it is there or that isn't shared."""
    if key_of(folder) is not None:
        folder.mkdir(parents=True, exist_ok=True)


def send(path: Path) -> None:
    """Make the file at `path`, or every file of that folder, an object as well."""
    if key_of(path) is None:
        return
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    objects.for_all(lambda file: objects.upload(file, str(key_of(file))), files)


def fetch(path: Path) -> Path:
    """The file at `path`, fetched if it isn't here as it is there."""
    if (key := key_of(path)) is not None:
        with _alone(path):
            if not objects.is_same(path, key):
                objects.download(key, path)
    return path


def delete(path: Path) -> None:
    """Take away the object or all objects below `path`; what is here stays."""
    if (key := key_of(path)) is not None:
        objects.delete(key, *(one.path for one in objects.listing(key)))


def names(folder: Path) -> list[str]:
    """Names of the files below `folder`, relative to it, in order."""
    if (key := key_of(folder)) is None:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [one.path[len(key) + 1 :] for one in objects.listing(key)]


def found(folder: Path) -> list[tuple[Path, int, int]]:
    """The objects below `folder`, or the one at it: place, bytes, time of change in nanoseconds."""
    key = str(key_of(folder))
    listed = objects.listing(key) or objects.described(key)
    return [(cache() / one.path, one.size, one.mtime_ns) for one in listed]


def move(source: Path, target: Path) -> None:
    """Move all objects below `source`. Its markers come last and go first: without them the others are nothing."""
    if (key := key_of(source)) is None or (new := key_of(target)) is None:
        return
    found = [one.path for one in objects.listing(key)]
    markers = [path for path in found if path in (f"{key}/state.json", f"{key}/done.json")]
    others = [path for path in found if path not in markers]
    for some in (others, markers):
        objects.for_all(lambda path: objects.copy(path, new + path[len(key) :]), some)
    for some in (markers, others):
        objects.delete(*some)


# Folders: whole or not there


def new_folder(path: Path) -> Path:
    """A folder to fill, from anywhere; `publish` then makes it the folder at `path`."""
    if key_of(path) is None:
        folder = path.with_name(f".partial-{path.name}")
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    return folder


def kept_folder(path: Path, tag: str) -> Path:
    """Like `new_folder`, but the same one, with what is in it, for the same `tag` (8 hex digits)."""
    folder = path.with_name(f".kept-{path.name}" if key_of(path) is None else f"{path.name}.{tag}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(folder: Path, path: Path, facts: dict[str, list[Any]] | None = None) -> None:
    """Make what `new_folder` gave the content of `path`, all at once; what was there before goes.

    `facts`: bytes and SHA-256 of the files that tasks have sent, which needn't be fetched here to be hashed then.
    """
    _drop_unfinished(folder)
    if key_of(path) is not None:
        return _publish_objects(folder, path, facts or {})
    if path.exists():
        shutil.rmtree(path)
    folder.rename(path)


def _drop_unfinished(folder: Path) -> None:
    """Files of tasks that were killed, and whose work was then done by others."""
    for path in [*folder.rglob(".partial-*"), *folder.rglob("*.partial")]:
        path.unlink(missing_ok=True)  # it may just have been finished


def _publish_objects(folder: Path, path: Path, facts: dict[str, list[Any]]) -> None:
    key, before = str(key_of(folder)), _pointer(path)
    sent = gather(folder, set(facts))
    files = {name: facts.get(name) or _facts(folder / name) for name in {*_here(folder), *facts}}
    objects.for_all(lambda name: objects.upload(folder / name, f"{key}/{name}"), set(files) - sent)
    objects.put(f"{key_of(path)}.json", json.dumps({"folder": folder.name, "files": files}).encode())
    forget()
    _link(path, folder.name)
    if before and before["folder"] != folder.name:
        discard(path.with_name(before["folder"]))


def gather(folder: Path, known: set[str] | frozenset[str] = frozenset()) -> set[str]:
    """Fetch what tasks on other machines have sent to a new folder, but what is `known`; the names of all of it."""
    if key_of(folder) is None:
        return set()
    sent = set(names(folder))
    objects.for_all(lambda name: _download(folder / name), sent - known - set(_here(folder)))
    return sent


def is_published(path: Path) -> bool:
    """Whether the folder at `path` is there, whole."""
    return path.exists() if key_of(path) is None else _pointer(path) is not None


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """For a task that fills a new folder by itself: it is there in the block, and its files are sent at the end."""
    make(folder)
    yield
    send(folder)


def discard(folder: Path) -> None:
    """Take a folder away that isn't published, here and there."""
    delete(folder)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, tag: str) -> None:
    """Take away the folders in `parent` that killed commands began and didn't publish, but those kept for `tag`."""
    if key_of(parent) is None:
        return
    for name in children(parent):
        match = _OWN_NAME.fullmatch(name)
        if match and match["tag"] != tag and (_pointer(parent / match["name"]) or {}).get("folder") != name:
            discard(parent / name)


def here(path: Path) -> Path:
    """`path`, which is a published folder or lies in one, with its content on this machine.

    Of a folder all files are fetched, of a path inside one the files under it. What is fetched is compared with the
    SHA-256 that its pointer gives; StageFailed names a file that differs.
    """
    if key_of(path) is None or path in _whole:
        return path
    folder, pointer = _published(path)
    inside = path.relative_to(folder).as_posix()
    wanted = {name: facts for name, facts in pointer["files"].items() if _within(name, inside)}
    own = folder.with_name(pointer["folder"])
    with _alone(own):
        absent = [name for name in wanted if not _has_size(own / name, wanted[name][0])]
        objects.for_all(lambda name: _fetch_checked(own / name, wanted[name]), absent)
        _link(folder, own.name)
    _whole.add(path)
    return path


def files(path: Path) -> list[str]:
    """Names of the files in a published folder, in order."""
    return names(path) if key_of(path) is None else sorted(_published(path)[1]["files"])


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file of the published folder at `path`, by name; in object storage as its pointer has them."""
    if key_of(path) is None:
        return {name: hash_file(path / name) for name in names(path)}
    return {name: facts[1] for name, facts in sorted(_published(path)[1]["files"].items())}


def forget() -> None:
    """Look at every pointer anew: a stage has begun, whose folders may change."""
    _current.clear()
    _whole.clear()


def _published(path: Path) -> tuple[Path, dict[str, Any]]:
    """The published folder that is `path` or holds it, and its pointer. StageFailed if there is none."""
    candidates = [path, *path.parents[:DEEPEST]]
    for folder in [one for one in candidates if one in _current] or candidates:
        if pointer := _current.get(folder) or _pointer(folder):
            _current[folder] = pointer
            return folder, pointer
    raise StageFailed(Problem(f"{shown(path)} is missing", "the stage that writes it has to run again"))


def _pointer(folder: Path) -> dict[str, Any] | None:
    data = objects.get(f"{key_of(folder)}.json")
    found = json.loads(data) if data else None
    return found if isinstance(found, dict) and {"folder", "files"} <= set(found) else None


def _within(name: str, inside: str) -> bool:
    return inside in (".", name) or name.startswith(f"{inside}/")


def _fetch_checked(file: Path, facts: list[Any]) -> None:
    _download(file)
    if _facts(file) != facts:
        file.unlink()
        raise StageFailed(
            Problem(f"{shown(file)} is not what was written there", "the stage that wrote it has to run again")
        )


def _download(file: Path) -> None:
    """What storage says is in a folder; a name that is a path of its own stands for no object."""
    if (key := key_of(file)) is None:
        raise StageFailed(Problem(f"'{file}' leads out of its folder", "see who else writes to the bucket"))
    objects.download(key, file)


def _has_size(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size


def _facts(file: Path) -> list[Any]:
    return [file.stat().st_size, hash_file(file)]


def _here(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _link(path: Path, target: str) -> None:
    if path.is_symlink() and os.readlink(path) == target:
        return
    partial = path.with_name(f".link-{os.getpid()}-{path.name}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time fetches the same thing."""
    _make_cache()
    locks = cache().parent / "locks"
    locks.mkdir(exist_ok=True)
    with open(locks / hashlib.sha256(str(path).encode()).hexdigest(), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
