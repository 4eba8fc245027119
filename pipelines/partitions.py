"""Work in partitions: each leaves its files, then a marker that says what came of it. What has one isn't done again.

    steps/STEP/NNNNN.NAME.arrow    what partition N leaves to later steps
    steps/STEP/NNNNN.json          its marker, written last

Ray runs one task a partition. No text passes through the driver or the object store: tasks read files and write
files. What a task writes depends on its partition alone, so it may be run again, anywhere, and the bytes are the same.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import logging
import os
import re
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed, Stopped
from cluster.progress import progress
from cluster.runs import StageFolder, canonical_hash, remove, stop_is_asked
from llm.files import hash_file
from llm.shardfile import read_arrow, write_arrow

LOOK_EVERY_S = 1.0  # whether a stop is asked for
ATTEMPTS_LOST = 4  # times that a task is tried again when its process or its node is gone
REMEDY = "see Ray's logs; the parts that are done are kept, the same command goes on"

log = logging.getLogger("headwater")

Summary = dict[str, Any]  # what a task says of its partition: JSON values


@dataclass(frozen=True)
class Step:
    """Where the partitions of a step leave their files."""

    folder: Path

    def file(self, number: int, name: str) -> Path:
        return self.folder / f"{number:05d}.{name}"

    def files(self, name: str = "arrow") -> list[Path]:
        """The files of that name of all partitions, in order."""
        numbers = sorted(one for one in mirror.children(self.folder) if one.endswith(f".{name}"))
        return [self.folder / one for one in numbers]

    def markers(self) -> list[str]:
        """Names of the markers that are there."""
        return [name for name in mirror.children(self.folder) if re.fullmatch(r"\d{5,}\.json", name)]

    def marker(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"


Task = Callable[[int, dict[str, Any], Step], Summary]
Row = dict[str, Any]  # what goes to a task and comes back


@dataclass(frozen=True)
class Work:
    """The steps of a stage at work. `cpus`: what each of its tasks claims."""

    stage: StageFolder
    cpus: float
    begun: list[str] = field(default_factory=list)  # steps of this attempt, in order

    def step(self, name: str) -> Step:
        return Step(self.stage.work / name)

    def each(
        self, name: str, items: list[dict[str, Any]], task: Task, unit: str = "parts", data: bool = False
    ) -> list[Summary]:
        """Do `task(number, item, step)` for each of `items`, those that have a marker left out; all their summaries.

        data: by Ray Data, as sources are read, instead of plain tasks. BadInput and StageFailed that a task raises end
        the work; a full or forbidden disk is told with its remedy. Stopped if that is asked for: what is done is kept.
        """
        step = self.step(name)
        step.folder.mkdir(parents=True, exist_ok=True)
        found = self._done(step, items)
        waiting = [{"number": n, "item": json.dumps(item)} for n, item in enumerate(items) if n not in found]
        sizes = [item.get("size", 1) for item in items]
        done = sum(sizes[number] for number in found)
        rows = self._run(waiting, partial(_do, step=step, task=task), data)
        with progress(name, sum(sizes), unit) as report, closing(rows):
            for row in rows:
                self._raise_told(row, name)
                found[row["number"]] = json.loads(row["said"])
                done += sizes[row["number"]]
                report(done)
        return [found[number] for number in range(len(items))]

    def _done(self, step: Step, items: list[dict[str, Any]]) -> dict[int, Summary]:
        """Summaries of the partitions that have a marker.

        If one is of another item (files have come or gone meanwhile), nothing of this step and of those after it
        counts.
        """
        self.begun.append(step.folder.name)
        said = {int(name[:-5]): json.loads(mirror.read(step.folder / name)) for name in step.markers()}
        if all(n < len(items) and one["item"] == canonical_hash(items[n]) for n, one in said.items()):
            return {number: one["summary"] for number, one in said.items()}
        for name in mirror.children(self.stage.work):
            if name not in self.begun[:-1]:
                remove(self.stage.work / name)
        step.folder.mkdir(parents=True, exist_ok=True)
        return {}

    def _raise_told(self, row: dict[str, Any], name: str) -> None:
        if row["bad"]:
            raise BadInput(*(Problem(*problem) for problem in json.loads(row["bad"])))
        if row["errno"]:
            raise StageFailed(disk_problem(OSError(row["errno"], row["said"]), self.stage.path))
        if row["trace"]:
            log.error("part %d of step '%s':\n%s", row["number"], name, row["trace"])
            problem = Problem(
                f"{self.stage.name}: part {row['number']} of step '{name}' failed: {row['said']}",
                "the whole traceback is in logs/driver.log of the stage; the parts that are done are kept",
            )
            raise StageFailed(problem)

    def _run(self, waiting: list[Row], do: Callable[[Row], Row], data: bool) -> Generator[Row, None, None]:
        """What the tasks say, as they end. Closing it ends the work."""
        import ray
        import ray.exceptions

        try:
            with closing(_streamed(waiting, do, self.cpus) if data else _scheduled(waiting, do, self.cpus)) as rows:
                for row in rows:
                    if stop_is_asked(self.stage.path):
                        raise Stopped(f"{self.stage.name} was asked to stop; the parts that are done are kept")
                    if row is not None:
                        yield row
        except ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[0]
            raise StageFailed(Problem(f"{self.stage.name}: a task was lost: {said}", REMEDY)) from error


def _streamed(waiting: list[Row], do: Callable[[Row], Row], cpus: float) -> Generator[Row, None, None]:
    """By Ray Data, two tasks a core: it hands a task out 0.15 s after another has ended."""
    import ray.data

    if waiting:
        again: Callable[[], dict[str, Any]] = partial(dict, max_retries=ATTEMPTS_LOST)
        rows = ray.data.from_items(waiting, override_num_blocks=len(waiting))
        rows = rows.map(do, num_cpus=cpus / 2, ray_remote_args_fn=again)
        yield from rows.iter_rows()


def _scheduled(waiting: list[Row], do: Callable[[Row], Row], cpus: float) -> Generator[Row | None, None, None]:
    """By tasks of Ray; None now and then while none ends.

    More of them wait at Ray than can run, so that a free core has the next one at once: Ray Data hands a task out when
    another has ended, 0.15 s after it (Ray 2.60), which was a tenth of the time of tasks of 1.5 s.
    """
    import ray

    task = ray.remote(num_cpus=cpus, max_retries=ATTEMPTS_LOST, scheduling_strategy="SPREAD")(_call)
    most = 2 + int(2 * ray.cluster_resources().get("CPU", 1) / cpus)
    left = iter(waiting)
    running: list[Any] = []
    try:
        while True:
            running += [task.remote(do, row) for row in itertools.islice(left, most - len(running))]
            if not running:
                return
            ready, running = ray.wait(running, timeout=LOOK_EVERY_S)
            yield from (ray.get(one) for one in ready) if ready else (None,)
    finally:
        for one in running:
            ray.cancel(one)


# Files of a step


def write_table(path: Path, **columns: np.ndarray | pa.Array) -> None:
    """Write an Arrow file of these columns, whole or not there, and send it where other machines find it."""
    with writing(path) as partial_path:
        write_arrow(partial_path, pa.table(columns))


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The numbers in a file that `write_table` wrote, mapped into memory."""
    table = read_arrow(mirror.fetch(path))
    if not table.num_rows:
        return {name: np.empty(0, table.schema.field(name).type.to_pandas_dtype()) for name in table.column_names}
    return {name: table.column(name).chunk(0).to_numpy() for name in table.column_names}


def in_range(path: Path, key: str, low: int, high: int) -> dict[str, np.ndarray]:
    """Rows of a file sorted by the uint64 column `key` for which low <= key < high. `high` may be 2^64."""
    columns = read_columns(path)
    first = np.searchsorted(columns[key], np.uint64(low))
    last = len(columns[key]) if high == 1 << 64 else np.searchsorted(columns[key], np.uint64(high))
    return {name: values[first:last] for name, values in columns.items()}


def gather(paths: list[Path], key: str, low: int, high: int) -> dict[str, np.ndarray]:
    """The rows of all those files for which low <= key < high, file after file."""
    parts = [in_range(path, key, low, high) for path in paths]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def ranges(count: int) -> list[dict[str, Any]]:
    """The uint64 numbers in `count` ranges of one size, as items of a step (as text: JSON's numbers may be floats)."""
    bounds = [(number << 64) // count for number in range(count + 1)]
    return [{"low": str(low), "high": str(high)} for low, high in itertools.pairwise(bounds)]


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to; when the block ends the file appears as `path`, and is sent where others find it."""
    partial_path = path.with_name(f".partial-{uuid.uuid4().hex}")
    mirror.make(path.parent)
    try:
        yield partial_path
        os.replace(partial_path, path)
        mirror.send(path)
    finally:
        partial_path.unlink(missing_ok=True)


def facts(path: Path) -> list[Any]:
    """Bytes and SHA-256 of a file, as `StageFolder.publish` wants them."""
    return [path.stat().st_size, hash_file(path)]


# In a task


def _call(do: Callable[[Row], Row], row: Row) -> Row:
    return do(row)


def _do(row: dict[str, Any], step: Step, task: Task) -> dict[str, Any]:
    """Errors that the user can act on are told, not raised: Ray would try again."""
    number = int(row["number"])
    told = {"number": number, "said": "", "errno": 0, "bad": "", "trace": ""}
    try:
        summary = task(number, json.loads(row["item"]), step)
        _mark(step.marker(number), {"item": canonical_hash(json.loads(row["item"])), "summary": summary})
    except OSError as error:
        return {**told, "errno": error.errno or errno.EIO, "said": str(error)}
    except BadInput as error:
        return {
            **told,
            "bad": json.dumps([[one.what, one.remedy] for one in error.problems if isinstance(one, Problem)]),
        }
    except Exception as error:
        return {**told, "said": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    finally:
        _give_back()
    return {**told, "said": json.dumps(summary)}


def _give_back() -> None:
    """Hand what was freed back to the system: a process that waits for its next task would keep it."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):  # of a C library that isn't GNU's
        ctypes.CDLL(None).malloc_trim(0)


def _mark(path: Path, said: dict[str, Any]) -> None:
    """Without fsync, which would wait for the disk to have all that the task wrote: a process that is killed loses
    nothing that it has handed to the system."""
    with writing(path) as partial_path:
        partial_path.write_text(json.dumps(said), encoding="utf-8")


def disk_problem(error: OSError, folder: Path) -> Problem:
    """A failure to write under `folder` as something that the user can act on."""
    remedies = {
        errno.ENOSPC: "free some space there, or use --runs with a roomier folder",
        errno.EDQUOT: "raise the quota, or use --runs with a roomier folder",
        errno.ENOENT: "put --runs on storage that every machine of the cluster sees under the same path",
    }
    remedy = remedies.get(error.errno or 0, "use --runs with a folder that you can write to")
    return Problem(f"cannot write under {folder}: {error}", remedy)
