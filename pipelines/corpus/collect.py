"""Where raw text comes from: a source resolved to files with stable addresses, and a crawler for Python's own docs.

    a folder or file        file:REL                           names are relative to the folder
    s3://BUCKET/PREFIX      s3://BUCKET/PREFIX/REL             objects below it, or the one there
    package:NAME/FOLDER     package:NAME/FOLDER/REL            files inside an installed package
    stdlib:                 stdlib:REL                         the source of Python's standard library
    pydoc:                  http://pydoc.localhost/PAGE        pages of the `pydoc` server, kept in a WARC file

Names that begin with a dot, and `__pycache__`, are never taken. Links to folders are not followed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import http.client
import importlib.metadata
import importlib.util
import os
import platform
import re
import select
import subprocess
import sys
import sysconfig
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urldefrag, urljoin

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed
from cluster.progress import Report
from cluster.runs import canonical_hash
from llm.files import hash_file
from pipelines.corpus.web import read_block_list
from pipelines.schema import Source

PACKAGE, STDLIB, PYDOC = "package:", "stdlib:", "pydoc:"

# Folders of the standard library that are tests, programs, bundled wheels, or tables rather than code to learn from.
TESTS = {"test", "tests", "idle_test"}
PROGRAMS = {"idlelib", "lib2to3", "turtledemo"}
NOT_LIBRARY = TESTS | PROGRAMS | {"site-packages", "dist-packages", "_bundled", "pydoc_data", "encodings"}

# The crawl begins at the list of topics, so that prose comes before the pages of modules.
PYDOC_START = "/topics.html"
PYDOC_ADDRESS = "http://pydoc.localhost"
# Lists of links: followed, not kept.
PYDOC_LISTS = frozenset({"/topics.html", "/keywords.html", "/index.html"})
# pydoc imports what it shows: these open a browser or a window, print, or start a program when imported.
PYDOC_AVOIDS = re.compile(r"/(?:topic\?key=)?(?:antigravity|this|idlelib|test|lib2to3|turtle|turtledemo|.*__main__)\b")
# Where a representation says where an object lay in memory; pydoc drops most of these itself (pydoc.stripid).
MEMORY_ADDRESS = re.compile(rb"(?: |&nbsp;)(?:at|handle)(?: |&nbsp;)(?:0x[0-9a-f]{6,16}|[0-9a-f]{12})\b")
PYDOC_MAX_PAGES = 1_000
SERVER_START_S = 30.0
REQUEST_TIMEOUT_S = 30.0
CRAWL_DEADLINE_S = 600.0


@dataclass(frozen=True)
class SourceFile:
    """One file of a source; `url` is its address, the same wherever the source lies.

    size: in bytes; 0 where it can't be told. changed: when, in nanoseconds; 0 for what came with a package.
    """

    path: Path
    url: str
    size: int
    changed: int = 0


def is_crawled(source: Source) -> bool:
    """Whether the source's files must be fetched before they can be read."""
    return source.path.startswith(PYDOC)


def pages_wanted(source: Source) -> int:
    """Pages that a crawl of `source` takes at most."""
    return source.max_files or PYDOC_MAX_PAGES


def resolve(source: Source) -> list[SourceFile]:
    """The files of a source that isn't crawled, in order of name. BadInput if there are none or they can't be listed.

    Where `max_files` cuts, the files kept are spread evenly over that order.
    """
    found = _in_storage(source) if source.path.startswith(mirror.SCHEME) else _on_disk(source)
    return _spread(sorted(found, key=lambda file: file.url), source.max_files)


def fingerprint(source: Source, verify: bool = False) -> str:
    """Names the content of a source without its place: SHA-256, as hex.

    A user's files count by name, size and time of change; `verify` hashes their bytes instead. What an installed
    package or Python itself brings counts by its version, names and sizes.
    """
    if is_crawled(source):
        return canonical_hash([_python(), pages_wanted(source)])
    files = [_identify(source, file, verify) for file in resolve(source)]
    return canonical_hash([_version(source), files, *_block_list(source)])


def crawl_pydoc(warc: Path, max_pages: int, report: Report) -> int:
    """Crawl this Python's `pydoc` server over loopback into the WARC file `warc`; returns the number of pages kept.

    Breadth first from the list of topics, links in the order of the page, so the same pages come in the same order
    each time. The file appears under its name when it is complete.
    """
    partial = warc.with_name(f".partial-{warc.name}")
    warc.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as out, _pydoc_server() as port:
            kept = _crawl(port, out, max_pages, report)
        partial.replace(warc)
    finally:
        partial.unlink(missing_ok=True)
    return kept


# Sources in object storage


def _in_storage(source: Source) -> list[SourceFile]:
    """The objects below an address, or the one at it. Their paths are where `mirror.fetch` puts them."""
    base = mirror.local(source.path)
    whole = [
        SourceFile(path, mirror.shown(path), size, changed)
        for path, size, changed in mirror.found(base)
        for inside in [Path(path.name) if path == base else path.relative_to(base)]
        if _named(inside) and _included(source, inside)
    ]
    if not whole:
        raise BadInput(_nothing_found(source, mirror.shown(base)))
    return whole


def _named(path: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in path.parts)


# Sources on disk


def _on_disk(source: Source) -> list[SourceFile]:
    base, prefix = _locate(source)
    found = [_describe(base, path, prefix) for path in _list(source, base) if _included(source, path)]
    if not found:
        raise BadInput(_nothing_found(source, base))
    return found


def _locate(source: Source) -> tuple[Path, str]:
    """Where the source's files lie, and what their addresses begin with."""
    if source.path.startswith(PACKAGE):
        return _package_folder(source), source.path.rstrip("/") + "/"
    if source.path == STDLIB:
        return Path(sysconfig.get_path("stdlib")), STDLIB
    if re.match(r"[a-z][a-z0-9+.-]+:", source.path):
        known = f"{PACKAGE}NAME/FOLDER, {STDLIB}, {PYDOC}"
        problem = Problem(
            f"source '{source.name}': don't know how to read '{source.path}'", f"give a folder, a file, or {known}"
        )
        raise BadInput(problem)
    return Path(source.path).expanduser().absolute(), "file:"


def _package_folder(source: Source) -> Path:
    name, _, inside = source.path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        problem = Problem(
            f"source '{source.name}': the package '{name}' of '{source.path}' is not installed", f"pip install {name}"
        )
        raise BadInput(problem)
    return Path(spec.submodule_search_locations[0]) / inside


def _list(source: Source, base: Path) -> list[Path]:
    """Paths of all files, relative to `base` (its parent, if it is a file)."""
    if base.is_file():
        return [Path(base.name)]
    if not base.is_dir():
        raise BadInput(Problem(f"source '{source.name}': no folder or file {base}", "check the path"))
    return list(_list_stdlib(base) if source.path == STDLIB else _list_folder(source, base))


def _list_folder(source: Source, base: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        problem = Problem(
            f"source '{source.name}': cannot list {error.filename}: {error.strerror}", "grant access, or move it away"
        )
        raise BadInput(problem)

    for folder, subfolders, names in os.walk(base, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            path = Path(folder, name)
            # A link that leads nowhere, or to itself, is listed: reading it then says what is wrong.
            if not name.startswith(".") and (path.is_symlink() or path.is_file()):
                yield path.relative_to(base)


def _list_stdlib(base: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(base):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in NOT_LIBRARY]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name).relative_to(base)


def _included(source: Source, path: Path) -> bool:
    """A pattern with no slash is about the name in any folder; one with slashes, about the end of the path."""
    return not source.include or any(PurePosixPath(path.as_posix()).match(pattern) for pattern in source.include)


def _describe(base: Path, path: Path, prefix: str) -> SourceFile:
    whole = base if base.is_file() else base / path
    name = path.as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadInput(Problem(f"the file name {os.fsencode(whole)!r} is not UTF-8", "rename the file")) from None
    try:
        about = whole.stat()
    except OSError:
        return SourceFile(whole, prefix + name, 0)
    return SourceFile(whole, prefix + name, about.st_size, about.st_mtime_ns)


def _nothing_found(source: Source, base: Path | str) -> Problem:
    if source.include:
        patterns = ", ".join(source.include)
        return Problem(f"source '{source.name}': no file under {base} matches {patterns}", "check `include`")
    return Problem(f"source '{source.name}': {base} holds no files", "put text files there, or name another folder")


def _spread(files: list[SourceFile], limit: int | None) -> list[SourceFile]:
    if limit is None or limit >= len(files):
        return files
    return [files[index * len(files) // limit] for index in range(limit)]


# Fingerprints


def _version(source: Source) -> str:
    if source.path == STDLIB:
        return _python()
    if source.path.startswith(PACKAGE):
        return _distribution_version(source.path.removeprefix(PACKAGE).partition("/")[0])
    return ""


def _distribution_version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        owners = importlib.metadata.packages_distributions().get(package, [])
        return " ".join(f"{owner} {importlib.metadata.version(owner)}" for owner in sorted(set(owners)))


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _identify(source: Source, file: SourceFile, verify: bool) -> list[str | int]:
    """What one file adds to the fingerprint. The times of installed files say when they were installed, so they
    don't count."""
    if verify:
        return [file.url, hash_file(mirror.fetch(file.path))]
    if source.path.startswith((PACKAGE, STDLIB)):
        return [file.url, file.size]
    return [file.url, file.size, file.changed]


def _block_list(source: Source) -> list[str]:
    """What names the block list's content, if there is one. BadInput if it can't be read."""
    if source.block_list is None:
        return []
    path = Path(source.block_list).expanduser()
    read_block_list(path)
    return [hash_file(path)]


# The crawl


@contextmanager
def _pydoc_server() -> Iterator[int]:
    """Run `pydoc` on loopback while the block lasts; gives its port.

    Without site-packages (-S, -s), and with an environment that holds nothing: the page of `os` shows it. Started in
    the standard library's folder, since pydoc puts the working folder on its path.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", "-S", "-s", "-m", "pydoc", "-n", "127.0.0.1", "-p", "0"],
        stdin=subprocess.PIPE,  # it ends when this closes, so it can't outlive us
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=sysconfig.get_path("stdlib"),
        env={"PYTHONHASHSEED": "0"} | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
    )
    try:
        yield _port(process)
    finally:
        process.kill()
        process.communicate()


def _port(process: subprocess.Popen[bytes]) -> int:
    """The port that the server says it is ready at."""
    assert process.stdout is not None
    said, deadline = b"", time.monotonic() + SERVER_START_S
    while not (ready := re.search(rb"http://127\.0\.0\.1:(\d+)/", said)):
        waiting, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(process.stdout.fileno(), 4096) if waiting else b""
        if not more:
            what = f"pydoc's server did not start within {SERVER_START_S:.0f} s, it said: {said.decode() or 'nothing'}"
            raise StageFailed(Problem(what, "check that connections to 127.0.0.1 are allowed"))
        said += more
    return int(ready[1])


def _crawl(port: int, out: BinaryIO, max_pages: int, report: Report) -> int:
    """Write the pages to `out` as a WARC file; returns their number."""
    kept = 0
    _write_record(out, "warcinfo", None, "application/warc-fields", b"software: headwater\r\nformat: WARC 1.1\r\n")
    for kept, (path, response) in enumerate(_walk(port, max_pages), start=1):
        _write_record(out, "response", PYDOC_ADDRESS + path, "application/http; msgtype=response", response)
        report(kept, path)
    if not kept:
        raise StageFailed(Problem("pydoc served no pages", f"try {sys.executable} -m pydoc -p 0 by hand"))
    return kept


def _walk(port: int, max_pages: int) -> Iterator[tuple[str, bytes]]:
    """Paths and whole HTTP responses of at most `max_pages` pages. Pages that fail are passed over."""
    deadline = time.monotonic() + CRAWL_DEADLINE_S
    waiting, seen, kept = deque([PYDOC_START]), {PYDOC_START}, 0
    while waiting and kept < max_pages:
        if time.monotonic() > deadline:
            what = f"the crawl of pydoc had {kept} of {max_pages} pages after {CRAWL_DEADLINE_S:.0f} s"
            raise StageFailed(Problem(what, "lower the source's max_files"))
        path = waiting.popleft()
        page = _get(port, path)
        if page is None:
            continue
        new = [link for link in _links(path, page) if link not in seen]
        seen.update(new)
        waiting.extend(new)
        if path not in PYDOC_LISTS:
            kept += 1
            yield path, b"HTTP/1.0 200 OK\r\nContent-Type: text/html; charset=UTF-8\r\n\r\n" + page


def _get(port: int, path: str) -> bytes | None:
    """The page at `path`, or None if there is none: pydoc answers 200 even where it only has an error to show."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("GET", path)
        page = connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return None if b"<title>Pydoc: Error" in page else MEMORY_ADDRESS.sub(b"", page)


def _links(path: str, page: bytes) -> list[str]:
    """Paths that the page links to on its own host, each once, in their order."""
    targets = (html.unescape(target) for target in re.findall(r'href="([^"]+)"', page.decode("utf-8", "replace")))
    own = (urljoin(path, urldefrag(target).url) for target in targets if not re.match(r"[a-z]+:|//", target))
    return list(dict.fromkeys(link for link in own if not link.endswith(".css") and not PYDOC_AVOIDS.match(link)))


def _write_record(out: BinaryIO, sort: str, uri: str | None, content_type: str, block: bytes) -> None:
    """One WARC 1.1 record (ISO 28500:2017) as a gzip member of its own, so that readers can seek to it."""
    digest = hashlib.sha1(block, usedforsecurity=False).digest()
    fields = {
        "WARC-Type": sort,
        "WARC-Record-ID": f"<urn:uuid:{uuid.uuid4()}>",
        "WARC-Date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"WARC-Target-URI": uri} if uri else {}),
        "WARC-Block-Digest": f"sha1:{base64.b32encode(digest).decode()}",
        "Content-Type": content_type,
        "Content-Length": str(len(block)),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    out.write(gzip.compress(f"WARC/1.1\r\n{head}\r\n".encode() + block + b"\r\n\r\n", compresslevel=6))
