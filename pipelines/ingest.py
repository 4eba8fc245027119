"""`ingest`: raw sources to documents.

reads   the recipe's sources
writes  documents/part-NNNNN.parquet   one row per document (`pipelines.readers.Document`)
        dropped/part-NNNNN.parquet     one row per document that wasn't taken, with the reason
        crawl/NAME.warc.gz             what was fetched, read like any other file and not fetched twice

Files are read in groups, one task and one part a group. How files fall into groups depends on them alone, so the
parts are the same, byte for byte, on any cluster. No document passes through the driver.
"""

from __future__ import annotations

import errno
import json
import math
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.data.exceptions
import ray.exceptions

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed, Stopped
from cluster.progress import progress
from cluster.runs import stop_is_asked
from pipelines.collect import SourceFile, crawl_pydoc, fingerprint, is_crawled, pages_wanted, resolve
from pipelines.readers import Bounds, Document, Dropped, Origin, read_file
from pipelines.recipe import Recipe
from pipelines.schema import Source
from pipelines.stage import Demand, Outcome, Stage, StageRun

# A group holds a 64th of all bytes, so that many CPUs share a small corpus, within these bounds.
GROUPS_AIMED_AT = 64
SMALLEST_GROUP_BYTES = 1 << 20
LARGEST_GROUP_BYTES = 128 << 20
MOST_FILES_IN_GROUP = 4096
# A task holds at most this much text before it writes it.
ROW_GROUP_CHARACTERS = 16 << 20
# Of a crawled page, its text and its share of the WARC file, for the estimate of disk space.
CRAWLED_PAGE_BYTES = 40_000
UNFINISHED = ".partial-"


class Group(NamedTuple):
    """Files that one task reads into one part."""

    source: Source
    files: list[SourceFile]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def run(stage: StageRun) -> Outcome:
    """Crawl what must be crawled, read everything, and write the documents."""
    with _disk_errors(stage.folder.path), ExitStack() as artefacts:
        found = {source: _collect(source, stage) for source in stage.recipe.ingest.chosen()}
        targets = [artefacts.enter_context(stage.folder.artefact(name)) for name in STAGE.artefacts]
        summaries = list(_read_all(_groups(found), stage, targets))
        _refuse_nothing(summaries)
        _remove_unfinished(targets)
    return _outcome(found, summaries)


# Collecting and grouping


def _collect(source: Source, stage: StageRun) -> list[SourceFile]:
    """The source's files, crawled first where they have to be."""
    if not is_crawled(source):
        return resolve(source)
    warc = stage.folder.path / "crawl" / f"{source.name}.warc.gz"
    if mirror.exists(warc):
        stage.log.info("%s: %s is complete, not crawled again", source.name, mirror.shown(mirror.fetch(warc)))
    else:
        with progress("crawl", pages_wanted(source), "pages") as report:
            pages = crawl_pydoc(warc, pages_wanted(source), report)
        mirror.send(warc)
        stage.log.info("%s: crawled %d pages into %s", source.name, pages, mirror.shown(warc))
    return [SourceFile(warc, f"crawl:{warc.name}", warc.stat().st_size)]


def _groups(found: dict[Source, list[SourceFile]]) -> list[Group]:
    """Files in order, in groups of bounded size. A file larger than the bound is a group of its own.

    The bound leaves crawls out of account: the dates in a WARC file change its size by a few bytes.
    """
    size = sum(file.size for source, files in found.items() if not is_crawled(source) for file in files)
    bound = min(max(size // GROUPS_AIMED_AT, SMALLEST_GROUP_BYTES), LARGEST_GROUP_BYTES)
    groups: list[Group] = []
    for source, files in found.items():
        filled: float = math.inf  # no group goes over from one source to the next
        for file in files:
            if filled + file.size > bound or len(groups[-1].files) == MOST_FILES_IN_GROUP:
                groups.append(Group(source, []))
                filled = 0
            groups[-1].files.append(file)
            filled += file.size
    return groups


# Reading, on the cluster


@dataclass
class Summary:
    """What came of one group: documents and bytes of UTF-8 text by kind, drops by reason."""

    source: str
    bytes_read: int
    documents: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, said: str) -> Summary:
        values = json.loads(said)
        return cls(values["source"], values["bytes_read"], *map(Counter, values["counts"]))

    def say(self) -> str:
        counts = [self.documents, self.text_bytes, self.dropped]
        return json.dumps({"source": self.source, "bytes_read": self.bytes_read, "counts": counts})

    def count(self, row: Document | Dropped) -> None:
        if isinstance(row, Dropped):
            self.dropped[row.reason] += 1
        else:
            self.documents[row.kind] += 1
            self.text_bytes[row.kind] += len(row.text.encode())


def _read_all(groups: list[Group], stage: StageRun, targets: list[Path]) -> Iterator[Summary]:
    """Have every group read into its parts; gives the summaries in the order in which they come."""
    settings, done = stage.recipe.ingest, 0
    read = partial(_read_group, targets=targets, bounds=Bounds(settings.min_characters, settings.max_characters))
    items = ray.data.from_items([_item(*one) for one in enumerate(groups)], override_num_blocks=len(groups))
    work = items.map(read, num_cpus=settings.cpus_per_task)
    size = sum(group.size for group in groups)
    with progress("ingest", size / 1e6, "MB") as report, closing(_rows(work)) as rows:
        for row in rows:
            if stop_is_asked(stage.folder.path):
                raise Stopped("ingest was asked to stop: finished crawls are kept, reading begins anew")
            if row["errno"]:
                raise StageFailed(_disk_problem(OSError(row["errno"], row["said"]), stage.folder.path))
            summary = Summary.of(row["said"])
            done += summary.bytes_read
            report(done / 1e6, summary.source)
            yield summary


def _rows(work: ray.data.Dataset) -> Generator[dict[str, Any], None, None]:
    """Closing it ends the work."""
    try:
        yield from work.iter_rows()
    except (ray.exceptions.RayError, ray.data.exceptions.UserCodeException) as error:
        problem = Problem(f"a reading task failed: {str(error).strip().splitlines()[-1]}", "see Ray's log of the task")
        raise StageFailed(problem) from error


def _item(number: int, group: Group) -> dict[str, Any]:
    return {
        "number": number,
        "source": group.source.model_dump_json(),
        "paths": [str(file.path) for file in group.files],
        "urls": [file.url for file in group.files],
        "bytes": group.size,
    }


def _read_group(item: dict[str, Any], targets: list[Path], bounds: Bounds) -> dict[str, Any]:
    """Runs in a task: reads a group's files, writes its parts. A full or forbidden disk is told, not raised, since
    Ray would try again."""
    source = Source.model_validate_json(item["source"])
    summary = Summary(source.name, int(item["bytes"]))
    origin = Origin(source.name, source.kind, source.licence)
    try:
        with (
            _part(targets[0], item["number"], Document) as documents,
            _part(targets[1], item["number"], Dropped) as dropped,
        ):
            for path, url in zip(item["paths"], item["urls"], strict=True):
                for row in read_file(mirror.fetch(Path(path)), url, origin, bounds):
                    (dropped if isinstance(row, Dropped) else documents).add(row)
                    summary.count(row)
    except OSError as error:
        return {"errno": error.errno or errno.EIO, "said": str(error)}
    return {"errno": 0, "said": summary.say()}


class Part:
    """A Parquet file of rows, written a row group at a time."""

    def __init__(self, path: Path, columns: type[NamedTuple]):
        self._schema = pa.schema([(name, pa.string()) for name in columns._fields])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, str]] = []
        self._characters = 0

    def add(self, row: Document | Dropped) -> None:
        self._rows.append(row._asdict())
        self._characters += sum(map(len, row))
        if self._characters >= ROW_GROUP_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._characters = [], 0

    def close(self) -> None:
        self._writer.close()


@contextmanager
def _part(folder: Path, number: int, columns: type[NamedTuple]) -> Iterator[Part]:
    """Part `number` of an artefact. It appears under its name when it is whole, so a task may be tried again."""
    unfinished, path = folder / f"{UNFINISHED}{number:05d}-{uuid.uuid4().hex}", folder / f"part-{number:05d}.parquet"
    try:
        mirror.make(folder)
        with closing(Part(unfinished, columns)) as part:
            yield part
            part.flush()
        unfinished.replace(path)
        mirror.send(path)
    finally:
        unfinished.unlink(missing_ok=True)


# What is said at the end


def _remove_unfinished(targets: Iterable[Path]) -> None:
    """Files of tasks that were killed, and whose group was then read by another."""
    for target in targets:
        for unfinished in target.glob(f"{UNFINISHED}*"):
            unfinished.unlink()


def _refuse_nothing(summaries: list[Summary]) -> None:
    if any(summary.documents for summary in summaries):
        return
    dropped = _total(summary.dropped for summary in summaries)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "no pages in any file"
    remedy = "name other sources, or lower ingest.min_characters"
    raise BadInput(Problem(f"no document was left of the sources ({reasons})", remedy))


def _outcome(found: dict[Source, list[SourceFile]], summaries: list[Summary]) -> Outcome:
    files = sum(map(len, found.values()))
    bytes_read = sum(summary.bytes_read for summary in summaries)
    documents = _total(summary.documents for summary in summaries)
    text_bytes = _total(summary.text_bytes for summary in summaries)
    dropped = _total(summary.dropped for summary in summaries)
    return Outcome(
        read=f"{_counted(files, 'file')}, {bytes_read / 1e6:.1f} MB, {_counted(len(found), 'source')}",
        wrote=_counted(documents.total(), "document"),
        figure=f"{text_bytes.total() / 1e6:.1f} MB of text",
        metrics={
            "files": files,
            "bytes_read": bytes_read,
            "documents": documents.total(),
            "text_bytes": text_bytes.total(),
            "sources": {source.name: _of_source(source, summaries) for source in found},
            "kinds": {kind: _figures(documents[kind], text_bytes[kind]) for kind in sorted(documents)},
            "dropped": dict(sorted(dropped.items())),
        },
    )


def _of_source(source: Source, summaries: list[Summary]) -> dict[str, int]:
    own = [summary for summary in summaries if summary.source == source.name]
    documents = sum(summary.documents.total() for summary in own)
    text_bytes = sum(summary.text_bytes.total() for summary in own)
    return {**_figures(documents, text_bytes), "dropped": sum(summary.dropped.total() for summary in own)}


def _figures(documents: int, text_bytes: int) -> dict[str, int]:
    return {"documents": documents, "text_bytes": text_bytes}


def _total(counts: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counts, start=Counter())


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Failures to write under `folder` as something that the user can act on."""
    try:
        yield
    except OSError as error:
        raise StageFailed(_disk_problem(error, folder)) from error


def _disk_problem(error: OSError, folder: Path) -> Problem:
    remedies = {
        errno.ENOSPC: "free some space there, or use --runs with a roomier folder",
        errno.EDQUOT: "raise the quota, or use --runs with a roomier folder",
        errno.ENOENT: "put --runs on storage that every machine of the cluster sees under the same path",
    }
    remedy = remedies.get(error.errno or 0, "use --runs with a folder that you can write to")
    return Problem(f"cannot write documents under {folder}: {error}", remedy)


# How the driver sees it


def _sources(recipe: Recipe, verify: bool) -> dict[str, str]:
    return {source.name: fingerprint(source, verify) for source in recipe.ingest.chosen()}


def _check(recipe: Recipe) -> list[Problem]:
    """Sources that can't be found or listed, all of them."""
    return [problem for source in recipe.ingest.chosen() for problem in _problems(source)]


def _problems(source: Source) -> list[Problem]:
    try:
        _size(source)
    except BadInput as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    return []


def _demand(recipe: Recipe) -> Demand:
    """Text takes at most the space of the files that it comes from: parts are compressed."""
    usable = [source for source in recipe.ingest.chosen() if not _problems(source)]
    return Demand(cpus=recipe.ingest.cpus_per_task, disk_bytes=sum(map(_size, usable)))


def _size(source: Source) -> int:
    """Bytes of the source's files, an estimate for those still to be crawled."""
    if is_crawled(source):
        return pages_wanted(source) * CRAWLED_PAGE_BYTES
    return sum(file.size for file in resolve(source))


STAGE = Stage(
    name="ingest",
    version=1,
    needs=(),
    artefacts=("documents", "dropped"),
    identity=lambda recipe: recipe.ingest.identity(),
    run=run,
    demand=_demand,
    check=_check,
    sources=_sources,
)
