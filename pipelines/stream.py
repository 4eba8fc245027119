"""The stream: Ray Data reads token shards and hands every training worker its rows, in order, exactly once.

1. Global batch k is a fixed set of rows (`llm.order`); worker r of W takes its r-th part. W may be another at each
   start of the workers; a batch that doesn't divide by it is filled up with empty rows. Where groups of N workers
   have the same rows, group g takes the g-th of W/N parts, and each of its workers all of it or a part of the tokens.
2. A block holds one worker's rows for a span of steps. Blocks come in groups of W, one a worker, all of one size.
3. `streaming_split(equal=True)` gives each block to the worker with the fewest rows; with order preserved and equal
   blocks that is worker 0, 1, ..., W-1 in each group. The worker checks every row's step all the same.
4. The cursor is the step at which the first span begins: the stream is entered there and nothing before it is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.extensions import ArrowTensorArray
from ray.train import DataConfig

from cluster import mirror
from llm.masking import Kind, Masking, Plan, empty, joined, load_masker, mask_rows
from llm.order import Mixture, batch_rows, spread
from llm.packing import RowReader, split_rows
from pipelines.schema import TrainingSettings

STREAM = "train"  # its name among Ray Train's datasets
REST_S = 0.05
SINGLE_ROWS = 512  # held-out rows of which one token by itself is to be guessed, at most
BLOCK_BYTES = 8 << 20  # of one worker's rows in one span: far below Ray Data's block size, which would be cut


@dataclass(frozen=True)
class RowStream:
    """Rows for steps `first_step` to `last_step` - 1 of a training run over the shard set in `folder`."""

    folder: str
    pad_id: int
    global_batch: int
    workers: int
    share: int  # rows that a worker takes of a batch; all workers' together may be more than there are
    first_step: int
    last_step: int
    seed: int
    mixture: Mixture | None = None
    isolated: bool = True  # whether the pieces of a row are sequences of their own
    masking: Masking | None = None  # what of the rows is hidden, to be filled in
    group: int = 1  # workers that have the same rows
    cut: bool = False  # whether each of them has a part of those rows' tokens

    @classmethod
    def of(
        cls,
        folder: Path,
        pad_id: int,
        settings: TrainingSettings,
        seed: int,
        mixture: Mixture | None = None,
        isolated: bool = True,
        masking: Masking | None = None,
    ) -> RowStream:
        """All steps of a training stage."""
        batch, workers, share = settings.global_batch, settings.workers, settings.rows_per_worker
        return cls(
            *(str(folder), pad_id, batch, workers, share, 0, settings.steps, seed, mixture, isolated, masking),
            *_shared_rows(settings),
        )

    def among(self, settings: TrainingSettings) -> Self:
        """The same batches, dealt out among the workers that `settings` have."""
        return replace(self, workers=settings.workers, share=settings.rows_per_worker)

    @property
    def _reader(self) -> RowReader:
        folder = mirror.here(Path(self.folder))
        return _open(self.folder, self.pad_id, self.isolated, (folder / "packing.arrow").stat().st_mtime_ns)

    def rows_of_batch(self, step: int) -> np.ndarray:
        """Row ids of a global batch, in the order in which workers take them. An id below 0 is filler."""
        return batch_rows(step, self.global_batch, self._reader.index.num_rows, self.seed, self.mixture)

    def plan_of_batch(self, step: int) -> Plan:
        """What becomes of each of those rows. Its place in the stream tells a row's readings from one another."""
        rows = self.rows_of_batch(step)
        readings = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        kinds = self.masking.kinds(rows, readings) if self.masking else np.full(len(rows), Kind.CAUSAL)
        return self._planned(rows, readings, kinds)

    def _planned(self, rows: np.ndarray, readings: np.ndarray, kinds: np.ndarray) -> Plan:
        targets = self._reader.targets(rows)
        if self.masking:
            targets = self.masking.targets(kinds, targets, self._reader.index.targets(rows))
        return Plan(rows, readings, kinds, targets)

    def spans(self) -> list[tuple[int, int]]:
        """Ranges of steps whose rows make a block."""
        row_bytes = 3 * 4 * self._reader.index.row_tokens
        length = max(1, min(32, BLOCK_BYTES // (row_bytes * self.share)))
        starts = range(self.first_step, self.last_step, length)
        return [(start, min(start + length, self.last_step)) for start in starts]

    def part(self, span: tuple[int, int], worker: int) -> dict[str, np.ndarray]:
        """One worker's rows for a span: `step`, `row`, `batch_targets` (targets in the whole global batch), tokens."""
        plans, share = [self._filled(self.plan_of_batch(step)) for step in range(*span)], self.share
        place, part = divmod(worker, self.group)
        mine = joined([plan.part(place * share, (place + 1) * share) for plan in plans])
        tokens = self.read(mine)
        if self.cut:
            tokens = split_rows(tokens, part, self.group)
        return {
            "step": np.repeat(np.arange(*span), share),
            "row": mine.rows,
            "batch_targets": np.repeat([int(plan.targets.sum()) for plan in plans], share),
            **tokens,
        }

    def block(self, span: tuple[int, int], worker: int) -> pa.Table:
        """The same, for Ray Data."""
        return pa.table({name: _column(values) for name, values in self.part(span, worker).items()})

    def _filled(self, plan: Plan) -> Plan:
        return joined([plan, empty(self.workers // self.group * self.share - len(plan.rows))])

    def read(self, plan: Plan) -> dict[str, np.ndarray]:
        """The rows of `plan`: columns of `RowReader.read`, with words hidden and `kind` if the stream is masked."""
        tokens = self._reader.read(plan.rows)
        if self.masking is None:
            return tokens
        masker = load_masker(mirror.here(Path(self.masking.tokenizer)) / "tokenizer.json")
        return mask_rows(tokens, plan, masker, self.masking.seed)

    def dataset(self, cpus: float) -> ray.data.Dataset:
        """The stream as a Ray dataset whose tasks claim `cpus` each."""
        source = _Blocks(self)
        stream = ray.data.read_datasource(source, override_num_blocks=source.size, ray_remote_args={"num_cpus": cpus})
        nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        stream.context.custom_execution_callback_classes = [partial(_Pace, cpus * min(self.workers, nodes))]
        return stream


@dataclass(frozen=True)
class HeldOutRows(RowStream):
    """`num_rows` rows of a held-out set, spread evenly over it, filled up with empty rows to whole batches.

    Of a masked stream each comes masked, and up to SINGLE_ROWS of them once more with one token hidden by itself;
    where only a share of the rows is masked, all come as they are too.
    """

    num_rows: int = 0

    @classmethod
    def of_set(
        cls,
        num_rows: int,
        folder: Path,
        pad_id: int,
        settings: TrainingSettings,
        isolated: bool = True,
        masking: Masking | None = None,
    ) -> HeldOutRows:
        """`num_rows` rows of the set in `folder`, a forward pass of every worker at a time."""
        group, cut = _shared_rows(settings)
        everything = cls(str(folder), pad_id, 1, 1, 1, 0, 0, 0, None, isolated, masking, group, cut, num_rows)
        return everything.among(settings)

    def among(self, settings: TrainingSettings) -> Self:
        batch = settings.forward_rows * settings.shares
        steps = math.ceil(sum(_counts(self.num_rows, self.masking).values()) / batch)
        return replace(
            self, global_batch=batch, workers=settings.workers, share=settings.forward_rows, last_step=steps
        )

    @property
    def _plan(self) -> Plan:
        """All rows, in whatever batches they come. Each is read for the first time, so that it is always the same."""
        chosen = spread(self.num_rows, self._reader.index.num_rows)
        counts = _counts(len(chosen), self.masking)
        rows = np.concatenate([chosen[spread(count, len(chosen))] for count in counts.values()])
        return self._planned(rows, np.zeros_like(rows), np.repeat([*counts], [*counts.values()]))

    def rows_of(self, kind: Kind) -> dict[str, np.ndarray]:
        """Those of one kind, as `read` gives them."""
        plan = self._plan
        return self.read(Plan(*(column[plan.kinds == kind] for column in plan)))

    def targets(self) -> int:
        """How many tokens of these rows carry loss."""
        return int(self._plan.targets.sum())

    def rows_of_batch(self, step: int) -> np.ndarray:
        return self.plan_of_batch(step).rows

    def plan_of_batch(self, step: int) -> Plan:
        part = self._plan.part(step * self.global_batch, (step + 1) * self.global_batch)
        return self._filled(part)


def _shared_rows(settings: TrainingSettings) -> tuple[int, bool]:
    """How many workers have the same rows, and whether each has a part of their tokens."""
    return settings.group, settings.sequence_parallel > 1


def _counts(rows: int, masking: Masking | None) -> dict[Kind, int]:
    """How many held-out rows there are of each kind."""
    causal = {Kind.CAUSAL: rows} if masking is None or masking.share < 1 else {}
    return {**causal, Kind.MASKED: rows, Kind.SINGLE: min(rows, SINGLE_ROWS)} if masking else causal


def _column(values: np.ndarray) -> pa.Array:
    return ArrowTensorArray.from_numpy(values) if values.ndim > 1 else pa.array(values)


class Dealt(DataConfig):
    """Deals the stream out at each start of the workers, when it is known how many they are and where they begin.

    Ray Train is given its name alone, in place of a dataset.
    """

    def __init__(self, made_for: Callable[[int], ray.data.Dataset]):
        """made_for: makes the dataset for a number of workers. Called when rank 0 asks for its shard."""
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))
        self._made_for = made_for

    def configure(self, datasets, world_size, *args, **kwargs):
        return super().configure({STREAM: self._made_for(world_size)}, world_size, *args, **kwargs)


@lru_cache(maxsize=4)
def _open(folder: str, pad_id: int, isolated: bool, written_ns: int) -> RowReader:
    """Kept by the process that reads, never sent with a task. `written_ns` tells a set from one that replaced it."""
    return RowReader(Path(folder), pad_id, isolated)


class _Pace(ExecutionCallback):
    """Ray Data's scheduling loop (Ray 2.60) at the pace of training.

    It waits for tasks, but not for consumers: with every task done and blocks queued for training it spins, and took
    two thirds of a core from the workers. So it rests after each round.

    Of what workers leave of each node it counts whole CPUs. Where that is half a one it saw none, on however many
    nodes, and read one block at a time, each in a process started for it: on 8 nodes training waited 13 s every 32
    steps. So it may have a task on each node at once; which of them has room for one Ray still decides. Not more:
    reading far ahead while two workers started on one machine held them up for 2 s.
    """

    def __init__(self, cpus: float):
        self._least = ExecutionResources(cpu=cpus)

    def before_execution_starts(self, executor) -> None:
        autoscaler = executor._cluster_autoscaler
        counted = autoscaler.get_total_resources
        autoscaler.get_total_resources = lambda: counted().max(self._least)

    def on_execution_step(self, executor) -> None:
        time.sleep(REST_S)


class _Blocks(Datasource):
    """A datasource whose every read task makes one block."""

    def __init__(self, stream: RowStream):
        self._stream = stream
        self._parts = [(span, worker) for span in stream.spans() for worker in range(stream.workers)]

    @property
    def size(self) -> int:
        return len(self._parts)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        return [self._task(span, worker) for span, worker in self._parts]

    def _task(self, span: tuple[int, int], worker: int) -> ReadTask:
        stream = self._stream
        rows = (span[1] - span[0]) * stream.share

        def read() -> Iterator[pa.Table]:
            yield stream.block(span, worker)

        return ReadTask(read, BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None))
