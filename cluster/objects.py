"""Objects in S3-compatible storage: whole or not there, and never given up for a moment's silence.

Keys are BUCKET/NAME/OF/OBJECT. Credentials, region and endpoint come from the environment or the machine's role, as
with every AWS tool: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL. A call that gets no
answer, or "slow down", is tried again for HEADWATER_STORAGE_WAIT_S seconds (120); a refusal is told at once.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from cluster.errors import PreflightRefused, Problem, StageFailed

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, S3FileSystem

VARIABLES = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
WAIT_VARIABLE = "HEADWATER_STORAGE_WAIT_S"
WAIT_S = 120.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
CONNECT_S = 5.0
AT_ONCE = 8  # transfers of a folder
PIECE_BYTES = 8 << 20
COPIED_BYTES = 5 << 30  # the most that S3 copies by itself in one request
REFUSALS = {
    "NO_SUCH_BUCKET": "make the bucket, or correct --runs",
    "INVALID_ACCESS_KEY_ID": "correct AWS_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH": "correct AWS_SECRET_ACCESS_KEY",
    "EXPIRED_TOKEN": "renew the credentials",
    "ACCESS_DENIED": "allow these credentials to list, read, write and delete under the run's prefix",
    "HTTP status 4": "correct --runs or AWS_ENDPOINT_URL",
}
BUSY = ("HTTP status 408", "HTTP status 429")

T = TypeVar("T")
_hurries: list[bool] = []
log = logging.getLogger("headwater")


class Missing(StageFailed):
    """There is no such object."""


class Refused(StageFailed):
    """The storage answered, and said no: trying again would not help."""


def get(key: str) -> bytes | None:
    """The object's bytes; None if there is no such object."""

    def read() -> bytes | None:
        try:
            with _system().open_input_file(key) as handle:
                return handle.read()
        except FileNotFoundError:
            return None

    return patiently(f"read {key}", read)


def put(key: str, data: bytes) -> None:
    """Replace the object by `data`. It is there when this returns, and readers see the old or the new one."""

    def write() -> None:
        with _system().open_output_stream(key) as handle:
            handle.write(data)

    patiently(f"write {key}", write)


def upload(path: Path, key: str) -> None:
    """Replace the object by the bytes of the file at `path`. What was cut off half-way leaves no object.

    The file takes the object's time, by which `is_same` knows it.
    """

    def send() -> None:
        with open(path, "rb") as source:
            try:
                with _system().open_output_stream(key) as target:
                    while piece := source.read(PIECE_BYTES):
                        target.write(piece)
            except OSError as error:
                if error.errno is not None:  # a disk of ours that fails: closing has made an object of what was read
                    delete(key)
                raise
        info = _system().get_file_info(key)
        if info.size != (here := path.stat().st_size):
            raise OSError(f"{info.size} of {here} bytes arrived")
        _take_time(path, info)

    patiently(f"write {key}", send)


def is_same(path: Path, key: str) -> bool:
    """Whether the file at `path` is what was last fetched from the object, or sent to it, and nobody replaced it."""
    if not path.exists():
        return False
    info, here = patiently(f"look at {key}", lambda: _system().get_file_info(key)), path.stat()
    return info.size == here.st_size and info.mtime_ns == here.st_mtime_ns


def _take_time(path: Path, info: FileInfo) -> None:
    os.utime(path, ns=(info.mtime_ns, info.mtime_ns))


def download(key: str, path: Path) -> None:
    """Write the object to the file at `path`, whole or not at all. Missing if there is no such object."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")

    def fetch() -> None:
        info = _system().get_file_info(key)
        with _system().open_input_stream(key) as source, open(partial, "wb") as target:
            while piece := source.read(PIECE_BYTES):
                target.write(piece)
        _take_time(partial, info)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        patiently(f"read {key}", fetch)
        partial.replace(path)
    except FileNotFoundError:
        raise Missing(Problem(f"s3://{key} is missing", "the stage that wrote it has to run again")) from None
    finally:
        partial.unlink(missing_ok=True)


def size(key: str) -> int | None:
    """The object's bytes, counted; None if there is no such object."""
    from pyarrow.fs import FileType

    info = patiently(f"look at {key}", lambda: _system().get_file_info(key))
    return info.size if info.type == FileType.File else None


def modified(key: str) -> float:
    """When the object was written, by the storage's clock, in seconds since 1970."""
    info = patiently(f"look at {key}", lambda: _system().get_file_info(key))
    return float(info.mtime.timestamp())


def seen(key: str) -> bool:
    """Whether there is such an object, as far as one request tells."""
    from pyarrow.fs import FileType

    try:
        return bool(_system().get_file_info(key).type == FileType.File)
    except OSError:
        return False


def children(prefix: str) -> list[str]:
    """The next part of the name of every object below `prefix`, each once, in order."""
    from pyarrow.fs import FileSelector

    selector = FileSelector(prefix, recursive=False, allow_not_found=True)
    return sorted(one.base_name for one in patiently(f"list {prefix}", lambda: _system().get_file_info(selector)))


def listing(prefix: str) -> list[FileInfo]:
    """Every object below `prefix`, by name. Names alone tell what is there: folders don't exist."""
    from pyarrow.fs import FileSelector, FileType

    selector = FileSelector(prefix, recursive=True, allow_not_found=True)
    found = patiently(f"list {prefix}", lambda: _system().get_file_info(selector))
    return sorted((one for one in found if one.type == FileType.File), key=lambda one: one.path)


def described(key: str) -> list[FileInfo]:
    """The object itself, if there is one."""
    from pyarrow.fs import FileType

    found = patiently(f"look at {key}", lambda: _system().get_file_info(key))
    return [found] if found.type == FileType.File else []


def delete(*keys: str) -> None:
    """Take the objects away; one that isn't there is no error."""

    def take(key: str) -> None:
        with suppress(FileNotFoundError):
            patiently(f"delete {key}", lambda: _system().delete_file(key))

    for_all(take, keys)


def copy(source: str, target: str) -> None:
    """Copy an object within the storage; through this machine if it is larger than S3 copies by itself."""

    def through() -> None:
        with _system().open_input_stream(source) as here, _system().open_output_stream(target) as there:
            while piece := here.read(PIECE_BYTES):
                there.write(piece)

    large = (size(source) or 0) > COPIED_BYTES
    patiently(f"copy {source}", through if large else lambda: _system().copy_file(source, target))


def for_all(work: Callable[[T], object], items: Iterable[T]) -> None:
    """Do `work` for each item, some at a time. An error is raised at once: what has not begun is left."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="objects")
    try:
        for done in as_completed([pool.submit(work, item) for item in items]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def check_access(prefix: str) -> None:
    """PreflightRefused unless objects can be written, listed, read and deleted below `prefix`."""
    folder = f"{prefix}/.access-{random.getrandbits(64):016x}"
    key = f"{folder}/probe"
    try:
        put(key, b"ok")
        if get(key) != b"ok" or [one.path for one in listing(folder)] != [key]:
            raise Refused(Problem(f"s3://{prefix} does not give back what was written to it", "use another storage"))
        delete(key)
    except StageFailed as error:
        raise PreflightRefused(*error.problems) from None


def patiently(what: str, call: Callable[[], T]) -> T:
    """`call()`, tried again while the storage doesn't answer. Refused if it says no, StageFailed at the deadline.

    FileNotFoundError and errors of this machine's own disk are the caller's.
    """
    wait = 0.0 if _hurries else float(os.environ.get(WAIT_VARIABLE) or WAIT_S)
    begun, pause, silent = time.monotonic(), FIRST_PAUSE_S, False
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno is not None:
                raise
            _raise_refusal(what, error)
            if time.monotonic() - begun + pause > wait:
                raise StageFailed(_silence(what, wait, error)) from error
            if not silent:
                log.warning("object storage could not %s: %s; trying again for %.0f s", what, _short(error), wait)
            silent = True
        time.sleep(pause * random.uniform(0.75, 1.25))  # or everyone comes back at once
        pause = min(2 * pause, LONGEST_PAUSE_S)


@contextmanager
def hurried() -> Iterator[None]:
    """Nothing in the block waits for storage that doesn't answer: what is under way is failing or can do without."""
    _hurries.append(True)
    try:
        yield
    finally:
        _hurries.pop()


def _raise_refusal(what: str, error: OSError) -> None:
    said = _short(error)
    if any(busy in said for busy in BUSY):
        return
    for name, remedy in REFUSALS.items():
        if name in said:
            raise Refused(Problem(f"object storage refused to {what}: {_short(error)}", remedy)) from error


def _silence(what: str, wait: float, error: OSError) -> Problem:
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    return Problem(
        f"object storage ({where}) could not {what} for {wait:.0f} s: {_short(error)}",
        f"see that it is up and reachable (AWS_ENDPOINT_URL; {WAIT_VARIABLE} waits longer); the same command goes on",
    )


def _short(error: OSError) -> str:
    """The storage's words without pyarrow's and without the request's number."""
    _, _, said = str(error).partition("AWS Error ")
    return (said or str(error)).split(" (Request ID")[0]


def _system() -> S3FileSystem:
    return _connected(*(os.environ.get(name, "") for name in VARIABLES))


@lru_cache(maxsize=1)
def _connected(*values: str) -> S3FileSystem:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    given = dict(zip(VARIABLES, values, strict=True))
    endpoint = urlsplit(given["AWS_ENDPOINT_URL_S3"] or given["AWS_ENDPOINT_URL"])
    return S3FileSystem(
        region=given["AWS_REGION"] or given["AWS_DEFAULT_REGION"] or None,
        **({"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc} if endpoint.netloc else {}),
        connect_timeout=CONNECT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),  # `patiently` does it, and says so
        background_writes=False,
        allow_delayed_open=True,  # a small object is one request
    )
