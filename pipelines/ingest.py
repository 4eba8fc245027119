"""`ingest`: raw sources to documents.

reads   the recipe's sources
writes  documents/part-NNNNN.parquet   one row per document (`pipelines.corpus.records.Document`)
        dropped/part-NNNNN.parquet     one row per document that isn't taken, with the rule and the measured value
        crawl/NAME.warc.gz             what was fetched, read like any other file and not fetched twice

Files are read in groups, one task and one part a group. How files fall into groups depends on them alone, so the
parts are the same, byte for byte, on any cluster. No document passes through the driver or the object store. Steps:

    evaluated   runs of words of what the run will be evaluated on     (`pipelines.corpus.contamination`)
    read        a group's documents, cleaned, with the keys by which duplicates meet
    edges, star-N, losers      which documents say the same            (`pipelines.corpus.duplicates`)
    passages, repeats          which passages stand in several         (`pipelines.corpus.passages`)
    write       the documents that are left, and those that are not
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed
from cluster.preflight import Piece
from cluster.progress import console, progress
from cluster.runs import canonical_hash
from pipelines import conversations, filters
from pipelines.corpus import contamination, duplicates, passages
from pipelines.corpus.cleaning import Cleaner
from pipelines.corpus.collect import SourceFile, crawl_pydoc, fingerprint, is_crawled, pages_wanted, resolve
from pipelines.corpus.minhash import Keys, keys_of
from pipelines.corpus.readers import DAMAGE, is_of_repository, kind_of, read_file
from pipelines.corpus.records import Document, Dropped, Page, Refusal
from pipelines.corpus.repositories import Repository, by_repository, read_repository
from pipelines.corpus.tables import index_of
from pipelines.partitions import Step, Summary, Work, disk_problem, facts, writing
from pipelines.recipe import Recipe
from pipelines.schema import DeduplicateSettings, IngestSettings, Source
from pipelines.stage import Demand, Outcome, Stage, StageRun

# A group holds a 64th of all bytes, so that many CPUs share a small corpus, within these bounds.
GROUPS_AIMED_AT = 64
SMALLEST_GROUP_BYTES = 1 << 20
LARGEST_GROUP_BYTES = 128 << 20
MOST_FILES_IN_GROUP = 4096
# A task holds at most this much text before it writes it.
ROW_GROUP_CHARACTERS = 8 << 20
ROWS_AT_ONCE = 1024
# Of a crawled page, its text and its share of the WARC file, for the estimate of disk space.
CRAWLED_PAGE_BYTES = 40_000


Why = tuple[str, float, str]  # reason, value and detail of a drop


class Group(NamedTuple):
    """What one task reads into one part: files, one by one or by repository. `code`: which of the two."""

    source: Source
    code: bool
    units: list[Repository]

    @property
    def size(self) -> int:
        return sum(file.size for unit in self.units for file in unit.files)


def run(stage: StageRun) -> Outcome:
    """Crawl what must be crawled, read everything, tell what is double, and write the documents."""
    settings = stage.recipe.ingest
    work = Work(stage.folder, settings.cpus_per_task)
    with _disk_errors(stage.folder.path):
        found = [(source, _collect(source, stage)) for source in settings.chosen()]
        parts = _read_all(work, stage.recipe, _groups(found))
        losers = _find_duplicates(work, settings.deduplicate, parts)
        repeats = _find_passages(work, settings.deduplicate, parts, losers)
        written = _write_all(work, stage, parts, losers, repeats)
        _refuse_nothing(written)
        for artefact in STAGE.artefacts:
            stage.folder.publish(artefact, {part[artefact]["name"]: part[artefact]["facts"] for part in written})
    return _told(stage, _metrics(found, parts, written))


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


def _groups(found: list[tuple[Source, list[SourceFile]]]) -> list[Group]:
    """Files in order, in groups of bounded size. A file larger than the bound is a group of its own.

    The bound leaves crawls out of account: the dates in a WARC file change its size by a few bytes.
    """
    size = sum(file.size for source, files in found if not is_crawled(source) for file in files)
    bound = min(max(size // GROUPS_AIMED_AT, SMALLEST_GROUP_BYTES), LARGEST_GROUP_BYTES)
    groups: list[Group] = []
    for source, files in found:
        code = [file for file in files if is_of_repository(file.url, source.kind)]
        alone = [Repository(file.url, (), (file,)) for file in files if not is_of_repository(file.url, source.kind)]
        pieces = [piece for repository in by_repository(code) for piece in _pieces(repository, bound)]
        groups += _grouped(source, False, alone, bound) + _grouped(source, True, pieces, bound)
    return groups


def _pieces(repository: Repository, bound: int) -> Iterator[Repository]:
    """A repository, cut between files where it is larger than a group may be."""
    files: list[SourceFile] = []
    for file in repository.files:
        if files and sum(one.size for one in files) + file.size > bound:
            yield repository._replace(files=tuple(files))
            files = []
        files.append(file)
    yield repository._replace(files=tuple(files))


def _grouped(source: Source, code: bool, units: list[Repository], bound: int) -> list[Group]:
    groups: list[Group] = []
    filled: float = math.inf
    for unit in units:
        size = sum(file.size for file in unit.files)
        if filled + size > bound or len(groups[-1].units) == MOST_FILES_IN_GROUP:
            groups.append(Group(source, code, []))
            filled = 0
        groups[-1].units.append(unit)
        filled += size
    return groups


# Reading


def _read_all(work: Work, recipe: Recipe, groups: list[Group]) -> list[Summary]:
    """Have every group read into a part; a summary each."""
    settings = recipe.ingest
    if settings.decontaminate:
        work.each("evaluated", [{}], partial(_evaluated, recipe=recipe))
    priority = {source.name: place for place, source in enumerate(settings.chosen())}
    items = [
        {
            "source": group.source.model_dump(mode="json"),
            "priority": priority[group.source.name],
            "code": group.code,
            "units": [_plain(unit) for unit in group.units],
            "size": group.size,
        }
        for group in groups
    ]
    return work.each(
        "read", items, partial(_read, settings=settings, evaluated=work.step("evaluated")), "bytes", data=True
    )


def _plain(unit: Repository) -> list[Any]:
    """A unit as JSON values, which `_unit` reads."""
    return [
        unit.url,
        [str(path) for path in unit.folders],
        [[str(file.path), file.url, file.size, file.changed] for file in unit.files],
    ]


def _unit(plain: list[Any]) -> Repository:
    url, folders, files = plain
    return Repository(url, tuple(map(Path, folders)), tuple(SourceFile(Path(path), *rest) for path, *rest in files))


def _evaluated(number: int, item: dict[str, Any], step: Step, recipe: Recipe) -> Summary:
    """The runs of words of the held-out conversations, which every model of the run is measured on."""
    runs = contamination.runs_of(conversations.held_out_texts(recipe.sft), recipe.ingest.decontaminate_words)
    contamination.write_runs(runs, step.file(number, "arrow"))
    return {"runs": sum(map(len, runs.values()))}


def _read(number: int, item: dict[str, Any], step: Step, settings: IngestSettings, evaluated: Step) -> Summary:
    """Read a group's files; leave its documents, its drops, and the keys of its documents."""
    cleaner = Cleaner(Source.model_validate(item["source"]), settings)
    runs = contamination.read_runs(evaluated.file(0, "arrow")) if settings.decontaminate else {}
    part = _Part(settings.deduplicate)
    with ExitStack() as files:
        documents = files.enter_context(_table(step.file(number, "documents.parquet"), Document))
        dropped = files.enter_context(_table(step.file(number, "dropped.parquet"), Dropped))
        for rows in _batches(_rows(item, cleaner)):
            kept = [row for row in rows if isinstance(row, Document)]
            shared = contamination.shared([row.text for row in kept], runs)
            clean = [row for row, runs_shared in zip(kept, shared, strict=True) if not runs_shared]
            documents.add(clean)
            dropped.add([row for row in rows if isinstance(row, Dropped)])
            dropped.add([cleaner.contaminated(row, n) for row, n in zip(kept, shared, strict=True) if n])
            part.add(clean)
    keys = part.write(step, number, item["priority"])
    return {"source": cleaner.source.name, "bytes_read": item["size"], "keys": keys, "masked": cleaner.masked}


def _rows(item: dict[str, Any], cleaner: Cleaner) -> Iterator[Document | Dropped]:
    """What the group's files hold, in order. BadInput at the first thing that can't be read, if that is asked for."""
    source = cleaner.source
    for unit in map(_unit, item["units"]):
        kind = "code" if item["code"] else kind_of(unit.url) if source.kind == "auto" else source.kind
        for found in _read_unit(unit, item["code"], source):
            if not isinstance(found, Refusal):
                yield from cleaner.documents(found)
                continue
            if cleaner.settings.on_error == "fail" and found.reason in DAMAGE:
                what = f"source '{source.name}': {found.url or unit.url}: {found.reason} ({found.detail})"
                raise BadInput(Problem(what, "mend or remove it, or leave such input out with ingest.on_error=skip"))
            yield cleaner.refused(found, unit.url, kind)


def _read_unit(unit: Repository, code: bool, source: Source) -> Iterator[Page | Refusal]:
    """The pages of a repository, or of a file; fetched first, with the index that a dictionary has beside it."""
    for file in unit.files:
        if file.path.name.endswith((".dict", ".dict.dz")) and mirror.exists(index_of(file.path)):
            mirror.fetch(index_of(file.path))
        mirror.fetch(file.path)
    if code:
        return read_repository(unit, source)
    return read_file(unit.files[0].path, unit.files[0].url, source)


def _batches(rows: Iterable[Document | Dropped]) -> Iterator[list[Document | Dropped]]:
    """Rows in lists of bounded size."""
    batch: list[Document | Dropped] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.text)
        if size >= ROW_GROUP_CHARACTERS or len(batch) == ROWS_AT_ONCE:
            yield batch
            batch, size = [], 0
    yield batch


@dataclass
class _Part:
    """What later steps have to know of a part's documents."""

    settings: DeduplicateSettings
    ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    keys: list[Keys] = field(default_factory=list)

    def add(self, documents: list[Document]) -> None:
        bands = self.settings.bands if self.settings.near else 0
        keys = keys_of([row.text for row in documents], self.settings.ngram, bands, self.settings.rows)
        self.keys.append(keys)
        self.ids += [row.id for row in documents]
        self.lengths += [len(row.text) for row in documents]

    def write(self, step: Step, number: int, priority: int) -> int:
        keys, exact = Keys.joined(self.keys), self.settings.exact
        return duplicates.write_keys(step, number, keys, self.ids, self.lengths, priority, exact)


# Telling what is double


def _find_duplicates(work: Work, settings: DeduplicateSettings, parts: list[Summary]) -> Step | None:
    """The step that says which documents go, None if none do."""
    if not (settings.exact or settings.near):
        return None
    return duplicates.find(work, work.step("read"), len(parts), sum(part["keys"] for part in parts))


def _find_passages(
    work: Work, settings: DeduplicateSettings, parts: list[Summary], losers: Step | None
) -> Step | None:
    """The step that says which passages go, None if none do."""
    if not settings.passages:
        return None
    read = work.step("read")
    found = work.each("passages", [{} for _ in parts], partial(_passages, read=read, losers=losers))
    total = sum(summary["passages"] for summary in found)
    return passages.find(work, work.step("passages"), read, len(parts), total) if total else None


def _passages(number: int, item: dict[str, Any], step: Step, read: Step, losers: Step | None) -> Summary:
    """Leave the passages of a part's documents that stay, of those that aren't code."""
    gone = set(_lost(number, losers))
    found = passages.Found()
    for first, batch in _stored(read.file(number, "documents.parquet"), ["text", "kind"]):
        texts, kinds = batch.column("text").to_pylist(), batch.column("kind").to_pylist()
        rows = [row for row, kind in enumerate(kinds, first) if kind != "code" and row not in gone]
        found.add([texts[row - first] for row in rows], rows)
    return {"passages": found.write(step, number)}


def _lost(number: int, losers: Step | None) -> dict[int, Why]:
    """Why each document of a part goes that says what another says: reason, value and detail, by row."""
    if losers is None:
        return {}
    found = duplicates.losers_of(number, losers)
    columns = (found[name].tolist() for name in ("row", "kept", "size", "exact"))
    return {
        row: (
            "duplicate" if exact else "near-duplicate",
            float(size),
            f"documents alike, of which {kept:016x} is kept",
        )
        for row, kept, size, exact in zip(*columns, strict=True)
    }


# Writing


def _write_all(
    work: Work, stage: StageRun, parts: list[Summary], losers: Step | None, repeats: Step | None
) -> list[Summary]:
    """Have every part written without what goes; a summary each."""
    targets = [stage.folder.kept_folder(artefact) for artefact in STAGE.artefacts]
    task = partial(
        _write,
        read=work.step("read"),
        losers=losers,
        repeats=repeats,
        targets=targets,
    )
    return work.each("write", [{"source": part["source"]} for part in parts], task)


def _write(
    number: int,
    item: dict[str, Any],
    step: Step,
    read: Step,
    losers: Step | None,
    repeats: Step | None,
    targets: list[Path],
) -> Summary:
    """Write the documents of a part that stay, and those that don't."""
    lost, gone = _lost(number, losers), passages.repeats_of(number, repeats) if repeats else {}
    paths = [target / f"part-{number:05d}.parquet" for target in targets]
    count = _Count()
    with ExitStack() as files:
        documents = files.enter_context(_table(paths[0], Document))
        dropped = files.enter_context(_table(paths[1], Dropped))
        for _, batch in _stored(read.file(number, "dropped.parquet")):
            dropped.copy(count.all(batch))
        for first, batch in _stored(read.file(number, "documents.parquet")):
            changed = _changed(batch, first, gone, lost)
            why = {row - first: lost[row] for row in range(first, first + batch.num_rows) if row in lost}
            why |= _emptied(changed)
            kept, left = _parted(_with_texts(batch, changed), why)
            documents.copy(count.all(kept))
            dropped.copy(count.all(left))
    named = zip(STAGE.artefacts, paths, strict=True)
    told = {name: {"name": path.name, "facts": facts(path)} for name, path in named}
    return {"source": item["source"], **count.figures(), "passages": sum(map(len, gone.values())), **told}


def _changed(batch: pa.Table, first: int, gone: dict[int, list[int]], lost: Collection[int]) -> dict[int, str]:
    """New texts of the documents whose passages go, by place in the batch."""
    places = (row - first for row in gone if first <= row < first + batch.num_rows and row not in lost)
    texts = batch.column("text")
    return {place: passages.without(texts[place].as_py(), gone[place + first]) for place in places}


def _emptied(changed: dict[int, str]) -> dict[int, Why]:
    """Documents of which nothing is left without the passages that go. What is left of others stays, however short:
    it may be all that there is of a passage that others lost to it."""
    return {
        place: ("repeated passages", 0.0, "characters left without them")
        for place, text in changed.items()
        if not text.strip()
    }


def _with_texts(batch: pa.Table, texts: dict[int, str]) -> pa.Table:
    """The rows with other texts at some places."""
    if not texts:
        return batch
    column = batch.column("text").to_pylist()
    for place, text in texts.items():
        column[place] = text
    return batch.set_column(batch.schema.get_field_index("text"), "text", pa.array(column, pa.string()))


def _parted(batch: pa.Table, why: dict[int, Why]) -> tuple[pa.Table, pa.Table]:
    """The rows that stay, and those that go with why they do, by place."""
    goes = np.zeros(batch.num_rows, dtype=bool)
    goes[list(why)] = True
    lost = batch.filter(pa.array(goes))
    reasons = zip(*(why[place] for place in sorted(why)), strict=True) if why else ((), (), ())
    for name, values in zip(("reason", "value", "detail"), reasons, strict=True):
        lost = lost.append_column(name, pa.array(values, pa.float64() if name == "value" else pa.string()))
    return batch.filter(pa.array(~goes)), lost


@dataclass
class _Count:
    """Documents and bytes of UTF-8 text by kind, drops and their bytes by reason."""

    documents: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_bytes: Counter[str] = field(default_factory=Counter)

    def all(self, rows: pa.Table) -> pa.Table:
        """Counts them, and gives them on."""
        is_dropped = "reason" in rows.column_names
        number, size = (self.dropped, self.dropped_bytes) if is_dropped else (self.documents, self.text_bytes)
        names = rows.column("reason" if is_dropped else "kind")
        sizes = pc.binary_length(rows.column("text").cast(pa.binary()))
        sums = (
            pa.table({"name": names, "size": sizes}).group_by("name").aggregate([("size", "sum"), ("size", "count")])
        )
        for row in sums.to_pylist():
            number[row["name"]] += row["size_count"]
            size[row["name"]] += row["size_sum"]
        return rows

    def figures(self) -> dict[str, dict[str, int]]:
        return {
            "kinds": self.documents,
            "text_bytes": self.text_bytes,
            "reasons": self.dropped,
            "dropped_bytes": self.dropped_bytes,
        }


# Tables of rows


class _Table:
    """A Parquet file of rows, a row group each time that enough text has come."""

    def __init__(self, path: Path, row: type[NamedTuple]):
        hints = get_type_hints(row)
        types = {str: pa.string(), float | None: pa.float64()}
        self._schema = pa.schema([(name, types[hints[name]]) for name in row._fields])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[Any] = []
        self._characters = 0

    def add(self, rows: Iterable[Any]) -> None:
        for row in rows:
            self._rows.append(row)
            self._characters += len(row.text)
            if self._characters >= ROW_GROUP_CHARACTERS:
                self._flush()

    def copy(self, rows: pa.Table) -> None:
        """Write rows that are a table already."""
        if rows.num_rows:
            self._writer.write_table(rows.cast(self._schema))

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._characters = [], 0


@contextmanager
def _table(path: Path, row: type[NamedTuple]) -> Iterator[_Table]:
    """A file of rows, which is there when the block ends."""
    with writing(path) as partial_path, closing(_Table(partial_path, row)) as table:
        yield table


def _stored(path: Path, columns: list[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a file, a row group at a time, with the number of the first one."""
    first = 0
    with pq.ParquetFile(mirror.fetch(path)) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns)
            yield first, rows
            first += rows.num_rows


# What is said at the end


def _refuse_nothing(written: list[Summary]) -> None:
    if any(part["kinds"] for part in written):
        return
    dropped = _total(written, "reasons")
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "no pages in any file"
    remedy = "name other sources, or lower ingest.min_characters; `headwater look filters RUN` shows what went"
    raise BadInput(Problem(f"no document was left of the sources ({reasons})", remedy))


def _told(stage: StageRun, metrics: dict[str, Any]) -> Outcome:
    """With what was dropped as a table, on the terminal and on the dashboard."""
    rows = filters.of_run(stage.folder.path, metrics)
    if rows:
        console.print(filters.table(rows, metrics))
    files, sources = _counted(metrics["files"], "file"), _counted(len(metrics["sources"]), "source")
    return Outcome(
        read=f"{files}, {metrics['bytes_read'] / 1e6:.1f} MB, {sources}",
        wrote=f"{_counted(metrics['documents'], 'document')}, {sum(metrics['dropped'].values()):,} dropped",
        figure=f"{metrics['text_bytes'] / 1e6:.1f} MB of text",
        metrics=metrics,
        tables={"filters": filters.flat(rows)},
    )


def _metrics(
    found: list[tuple[Source, list[SourceFile]]], parts: list[Summary], written: list[Summary]
) -> dict[str, Any]:
    kinds, text_bytes, reasons = (_total(written, name) for name in ("kinds", "text_bytes", "reasons"))
    return {
        "files": sum(len(files) for _, files in found),
        "bytes_read": sum(part["bytes_read"] for part in parts),
        "documents": kinds.total(),
        "text_bytes": text_bytes.total(),
        "sources": {source.name: _of_source(source, written) for source, _ in found},
        "kinds": {kind: {"documents": kinds[kind], "text_bytes": text_bytes[kind]} for kind in sorted(kinds)},
        "dropped": dict(sorted(reasons.items())),
        "dropped_bytes": dict(sorted(_total(written, "dropped_bytes").items())),
        "masked": dict(sorted(_total(parts, "masked").items())),
        "repeated_passages": sum(part["passages"] for part in written),
    }


def _of_source(source: Source, written: list[Summary]) -> dict[str, Any]:
    own = [part for part in written if part["source"] == source.name]
    totals = {name: _total(own, name) for name in ("kinds", "text_bytes", "reasons")}
    return {
        "documents": totals["kinds"].total(),
        "text_bytes": totals["text_bytes"].total(),
        "dropped": dict(sorted(totals["reasons"].items())),
    }


def _total(parts: list[Summary], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part[name])
    return total


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Failures to write under `folder` as something that the user can act on."""
    try:
        yield
    except OSError as error:
        raise StageFailed(disk_problem(error, folder)) from error


# How the driver sees it


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What will be evaluated counts where documents that have it are dropped."""
    own = recipe.ingest.identity()
    if not recipe.ingest.decontaminate:
        return own
    sets = [source.identity() for source in recipe.sft.sources]
    return {**own, "evaluated": {"sources": sets, "held_out": recipe.sft.held_out}}


def _sources(recipe: Recipe, verify: bool) -> dict[str, str]:
    read = {source.name: _content(source, verify) for source in recipe.ingest.chosen()}
    if not recipe.ingest.decontaminate:
        return read
    evaluated = {
        f"evaluated/{source.name}": conversations.fingerprint(source, verify) for source in recipe.sft.sources
    }
    return {**read, **evaluated}


def _content(source: Source, verify: bool) -> str:
    """The fingerprint of a source; of code also its repositories, which files that aren't taken may decide."""
    found = fingerprint(source, verify)
    if is_crawled(source):
        return found
    code = [file for file in resolve(source) if is_of_repository(file.url, source.kind)]
    return canonical_hash([found, [one.url for one in by_repository(code)]]) if code else found


def _check(recipe: Recipe) -> list[Problem]:
    """Sources that can't be found or listed, or of which nobody said under what licence they are: all of them."""
    return [problem for source in recipe.ingest.chosen() for problem in [*_unlicensed(source), *_problems(source)]]


def _unlicensed(source: Source) -> list[Problem]:
    if source.licence or source.licence_column:
        return []
    setting = "ingest.folder_licence=..." if source.name == "folder" else "`licence: ...` to the source"
    what = f"source '{source.name}' ({source.path}) declares no licence"
    return [Problem(what, f"add {setting}, or 'unknown' there to take it all the same")]


def _problems(source: Source) -> list[Problem]:
    try:
        _size(source)
    except BadInput as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    return []


def _demand(recipe: Recipe) -> Demand:
    """Documents are there twice before the last step is done; compressed, so in the space of one plain copy each."""
    usable = [source for source in recipe.ingest.chosen() if not _problems(source)]
    task = Piece("task", "ingest.cpus_per_task", recipe.ingest.cpus_per_task)
    return Demand((task,), disk_bytes=2 * sum(map(_size, usable)))


def _size(source: Source) -> int:
    """Bytes of the source's files, an estimate for those still to be crawled."""
    if is_crawled(source):
        return pages_wanted(source) * CRAWLED_PAGE_BYTES
    return sum(file.size for file in resolve(source))


STAGE = Stage(
    name="ingest",
    version=2,
    needs=(),
    artefacts=("documents", "dropped"),
    identity=_identity,
    run=run,
    demand=_demand,
    check=_check,
    sources=_sources,
)
