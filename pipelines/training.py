"""Training under Ray Train and DeepSpeed with exact resume: what pretraining and every later stage share.

On the driver, `train` starts the workers and follows them. In each worker, `work` restores the newest whole
checkpoint, enters the stream at its step, and goes on as if nothing had happened. Two files follow every step:
`metrics.jsonl` for people and `ledger.jsonl` for proof, both cut back to the checkpoint on resume.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster import claims, mirror
from cluster.errors import StageFailed, Stopped
from cluster.progress import console, log_to, progress
from cluster.runs import ask_to_stop, stop_is_asked
from llm import checkpoint, zero
from llm.checkpoint import Checkpoint
from llm.vocabulary import load_tokenizer
from pipelines import checkpoints, failures, records
from pipelines.schema import TrainingSettings
from pipelines.stage import Demand
from pipelines.stream import HeldOutRows, RowStream

WRITER_WAIT_S = 60.0

log = logging.getLogger("headwater")

# The objective: (model, batch of tensors (B, T)) -> sum of the loss over the batch's targets, a scalar.
Objective = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
# Builds the model before the first checkpoint exists, or loads it from a checkpoint's folder.
Build = Callable[[Path | None], torch.nn.Module]
# Turns a batch of the stream, at a step, into the batch that is trained on: what reinforcement learning does.
Experience = Callable[["Batch", int], "Batch"]


@dataclass(frozen=True)
class Job:
    """All that a training worker needs to know; plain values, sent to every worker."""

    folder: Path
    settings: TrainingSettings
    build: Build
    objective: Objective
    tokenizer: Path
    stream: RowStream
    facts: dict[str, Any]  # into every checkpoint's manifest
    held_out: HeldOutRows | None = None
    experience: Callable[[torch.nn.Module, Any, torch.device], Experience] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume_step(self) -> int:
        """The step that comes next: 0, or what the newest whole checkpoint says."""
        newest = checkpoints.newest(self.checkpoints)
        return newest.step if newest else 0


# The worker's side


def work(job: Job) -> None:
    """A training worker, from start or checkpoint to the last step. Runs on every rank."""
    import ray.train

    rank, logs = ray.train.get_context().get_world_rank(), job.folder / "logs"
    told = failures.recorded(logs, rank, ray.train.get_context().get_world_size())
    with log_to(logs / f"rank-{rank}.log"), told, sole_writer(job.folder, rank), ExitStack() as files:
        shard = ray.train.get_dataset_shard("train")
        share = job.settings.rows_per_worker
        batches = started(iter(shard.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=2)))
        trainer = Trainer.start(job)
        log.info("rank %d of %d begins at step %d", rank, dist.get_world_size(), trainer.step)
        if rank == 0:
            trainer.flush = files.enter_context(records.followed(job.folder, trainer.step))
        for step in range(trainer.step, job.settings.steps):
            stop = trainer.train_step(step, next_batch(batches, step))
            last = step + 1 == job.settings.steps
            if job.held_out and (last or _due(step, job.settings.evaluate_every)):
                trainer.evaluate(ray.train.get_dataset_shard("held_out"))
            if last or stop or _due(step, job.settings.save_every):
                trainer.save()
                log.info("checkpoint of step %d is whole", trainer.step)
                # Ray Train's own record of how far it is. A barrier, so only here.
                ray.train.report({"step": trainer.step})
            if stop:
                return


def started(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The same batches. The first is fetched at once, in a thread: the stream starts while the model is built."""
    ahead = ThreadPoolExecutor(1, thread_name_prefix="first-batch")
    first = ahead.submit(next, batches)
    ahead.shutdown(wait=False)
    return itertools.chain((first.result() for _ in range(1)), batches)


def _due(step: int, every: int | None) -> bool:
    return every is not None and (step + 1) % every == 0


@dataclass
class Batch:
    """This rank's rows of one global batch, how long they were waited for, and numbers to log (means over ranks)."""

    rows: np.ndarray  # (R,) row ids
    targets: int  # what the loss of the whole global batch is divided by
    arrays: dict[str, np.ndarray]  # each (R, ...), integers or fp32
    waited_s: float
    figures: dict[str, float] = field(default_factory=dict)

    def part(self, begin: int, end: int, device: torch.device) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(values[begin:end]).to(device) for name, values in self.arrays.items()}
        return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in tensors.items()}


def next_batch(batches: Iterator[dict[str, np.ndarray]], step: int) -> Batch:
    """The rows of `step`, refused if the stream hands over any other."""
    begun = time.monotonic()
    columns = dict(next(batches))
    steps = columns.pop("step")
    if not (steps == step).all():
        raise RuntimeError(f"the stream handed rows of step {sorted(set(steps.tolist()))} to step {step}")
    rows, targets = columns.pop("row"), columns.pop("batch_targets")
    return Batch(rows, int(targets[0]), columns, time.monotonic() - begun)


@dataclass
class Trainer:
    """A rank at work: the engine, how many steps it has taken, and the files that follow it."""

    job: Job
    engine: Any
    tokenizer: Any
    device: torch.device
    step: int
    experience: Experience | None
    attempt: str  # the same on every rank, another at every start
    flush: Callable[[], None] = lambda: None  # after it, all that was appended is safe
    held_out: list[Batch] = field(default_factory=list)

    @classmethod
    def start(cls, job: Job) -> Trainer:
        """Build the model and its engine, and put back what the newest whole checkpoint holds."""
        saved = checkpoints.newest(job.checkpoints)
        step = saved.step if saved else 0
        engine, device = _start_engine(job, saved)
        if dist.get_rank() == 0:
            checkpoints.prune(job.checkpoints, job.settings.keep_checkpoints)
        tokenizer = load_tokenizer(mirror.here(job.tokenizer))
        experience = job.experience(engine.module, tokenizer, device) if job.experience else None
        return cls(job, engine, tokenizer, device, step, experience, _shared_word())

    def train_step(self, step: int, batch: Batch) -> bool:
        """One optimizer step. True if the run is asked to stop."""
        begun = time.monotonic()
        if self.experience:
            batch = self.experience(batch, step)
        rate = self.job.settings.rate(step)
        zero.set_learning_rate(self.engine, rate)
        nats = self._forward_backward(batch)
        self.step = step + 1
        nats, rows, stop, figures = self._gather(nats, batch)
        loss = nats / batch.targets
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}: lower learning_rate or raise warmup_steps")
        if dist.get_rank() == 0:
            timing = self._timing(batch, rows, time.monotonic() - begun)
            self._write({"step": step, "loss": loss, "learning_rate": rate, **figures, **timing}, rows)
        return stop

    def _forward_backward(self, batch: Batch) -> float:
        """Forward, backward and update over this rank's rows; the sum of their loss in nats.

        DeepSpeed averages gradients over ranks and micro-batches. The loss handed to it is scaled so that the result
        is the mean over the targets of the whole global batch, however its rows are dealt out.
        """
        size = self.job.settings.forward_rows
        starts = range(0, len(batch.rows), size)
        scale = dist.get_world_size() * len(starts) / batch.targets
        total = torch.zeros((), device=self.device)
        for start in starts:
            nats = self.job.objective(self.engine, batch.part(start, start + size, self.device))
            self.engine.backward(nats * scale)
            self.engine.step()
            total += nats.detach()
        return total.item()

    def _gather(self, nats: float, batch: Batch) -> tuple[float, list[int], bool, dict[str, float]]:
        """The global batch's loss sum, the rows that the ranks really took, whether the run is asked to stop, and the
        ranks' figures averaged, with the most memory that one of them has held.
        """
        stop = dist.get_rank() == 0 and stop_is_asked(self.job.folder)
        names = sorted(batch.figures)
        figures = [batch.figures[name] for name in names]
        # Row ids are exact in fp64 up to 2^53, so one collective carries everything.
        mine = torch.tensor(
            [nats, float(stop), failures.peak_rss_mb(), *figures, *batch.rows.tolist()],
            dtype=torch.float64,
            device=self.device,
        )
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        table = torch.stack(everyone).cpu()
        means = dict(zip(names, table[:, 3:].mean(dim=0).tolist(), strict=False))
        means["peak_rss_mb"] = float(table[:, 2].max())
        rows = table[:, 3 + len(names) :].flatten().long().tolist()
        return float(table[:, 0].sum()), rows, bool(table[:, 1].any()), means

    def _timing(self, batch: Batch, rows: list[int], seconds: float) -> dict[str, float]:
        tokens = len(rows) * batch.arrays["input_ids"][0].size
        seconds += batch.waited_s
        return {
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "tokens": self.step * tokens,
            "tokens_per_s": tokens / seconds,
            "data_wait_s": batch.waited_s,
            "seconds": seconds,
        }

    def _write(self, record: dict[str, Any], rows: list[int]) -> None:
        records.append(self.job.folder / "ledger.jsonl", {"step": record["step"], "rows": rows, "skipped": []})
        records.append(self.job.folder / "metrics.jsonl", record)

    @torch.no_grad()
    def evaluate(self, shard) -> None:
        """Mean loss over the targets of the held-out rows, in nats, as of the step just taken. Collective.

        The rows come through Ray Data the first time and are kept: starting a stream costs seconds.
        """
        assert self.job.held_out is not None
        if not self.held_out:
            share = self.job.held_out.global_batch // self.job.held_out.workers
            batches = iter(shard.iter_batches(batch_size=share, batch_format="numpy"))
            self.held_out = [next_batch(batches, step) for step in range(self.job.held_out.last_step)]
        self.engine.eval()
        parts = (batch.part(0, len(batch.rows), self.device) for batch in self.held_out)
        total = torch.stack([self.job.objective(self.engine, part).double() for part in parts]).sum()
        dist.all_reduce(total)
        self.engine.train()
        if dist.get_rank() == 0:
            loss = total.item() / self.job.facts["held_out_targets"]
            records.append(self.job.folder / "held_out.jsonl", {"step": self.step - 1, "held_out_loss": loss})

    def save(self) -> None:
        """Write a checkpoint of the state after `self.step` steps. Collective."""
        self.flush()  # first: of the steps before a checkpoint nothing may be missing
        store = checkpoints.store(self.job.checkpoints, self.attempt, self.flush)
        checkpoints.save(self.job.checkpoints, self.step, store, self.engine, self.tokenizer, self.job.facts)
        if dist.get_rank() == 0:
            checkpoints.prune(self.job.checkpoints, self.job.settings.keep_checkpoints)


def _start_engine(job: Job, saved: Checkpoint | None) -> tuple[Any, torch.device]:
    """The DeepSpeed engine, with `saved`'s weights and optimizer state if there is a checkpoint."""
    from ray.train.torch import get_device

    settings = job.settings
    torch.set_num_threads(settings.threads)
    zero.deepspeed().init_distributed()
    device = get_device()
    model = job.build(saved.model if saved else None).to(device)
    ds_settings = zero.zero_settings(
        stage=settings.zero_stage,
        micro_batch=settings.forward_rows,
        accumulation=settings.rows_per_worker // settings.forward_rows,
        dtype=settings.dtype,
        clip_norm=settings.clip_norm,
    )
    engine = zero.initialise(
        model.bfloat16() if settings.dtype == "bf16" else model,
        ds_settings,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    if saved:
        checkpoint.restore_state(saved, zero.fragments(engine, saved.step))
    return engine, device


def _shared_word() -> str:
    """Drawn by rank 0, known to all."""
    word = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(word)
    return word[0]


@contextmanager
def sole_writer(folder: Path, rank: int) -> Iterator[None]:
    """Let one rank 0 of this machine at a time write to `folder`. (In object storage `flush` sees that one does.)

    A killed driver's workers may live on for some seconds; the next attempt waits for them to go, and says so if they
    do not.
    """
    if rank != 0:
        yield
        return
    with open(folder / ".writer", "w") as handle:
        deadline = time.monotonic() + WRITER_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"another worker still writes to {folder} after {WRITER_WAIT_S} s") from None
                time.sleep(0.2)
        yield


# The driver's side


def train(job: Job, title: str, on_record: Callable[[dict[str, Any]], None]) -> None:
    """Run the workers to the end and follow them: a progress bar here, each new record to `on_record`.

    Raises StageFailed with the first failing rank's own words, or Stopped when a signal ended it with state saved.
    """
    if job.resume_step() == job.settings.steps:
        return  # killed after the last checkpoint, before the stage was marked as done
    outcome: list[BaseException] = []
    failures.forget(job.folder / "logs")
    thread = threading.Thread(target=_fit, args=(job, outcome), name="train", daemon=True)
    with _stop_by_signal(job.folder), progress(title, job.settings.steps, "steps") as report:
        thread.start()
        tail = records.Tail(job.folder / "metrics.jsonl", after=job.resume_step() - 1)
        while thread.is_alive():
            thread.join(timeout=0.25)
            for record in tail.new(now=not thread.is_alive()):
                report(record["step"] + 1, f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s")
                on_record(record)
    if outcome:
        raise outcome[0]
    if job.resume_step() < job.settings.steps:
        raise Stopped(f"{title}: asked to stop, state saved at step {job.resume_step()}; the same command goes on")


def _fit(job: Job, outcome: list[BaseException]) -> None:
    from ray.train import TrainingFailedError

    try:
        _trainer(job).fit()
    except TrainingFailedError as error:
        outcome.append(_explained(error, job.folder))
    except BaseException as error:  # handed to the thread that waits, which raises it
        outcome.append(error)


def _explained(error: Exception, folder: Path) -> StageFailed:
    try:
        return StageFailed(failures.explained(error, folder))
    except StageFailed as silence:  # of the storage, where the ranks' records lie
        return silence


def _trainer(job: Job):
    """The Ray Train trainer. The streams are functions: each (re)start of the workers calls them anew."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = job.settings
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    return TorchTrainer(
        work,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # A name of its own each time: what Ray Train remembers of an earlier attempt is not what we resume from.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cuda" if settings.gpus_per_worker else "cpu"}},
        ),
        datasets=_datasets(job),
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )


def _datasets(job: Job) -> dict[str, Callable[[], Any]]:
    cpus = job.settings.data_cpus
    streams: dict[str, Callable[[], Any]] = {
        "train": lambda: replace(job.stream, first_step=job.resume_step()).dataset(cpus)
    }
    if (held_out := job.held_out) is not None:
        streams["held_out"] = lambda: held_out.dataset(cpus)
    return streams


@contextmanager
def _stop_by_signal(folder: Path) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a request that the workers see; a second one ends at once."""

    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked or claims.lost.is_set():
            raise KeyboardInterrupt
        asked.append(number)
        if mirror.key_of(folder):  # a signal's handler must not wait for storage
            threading.Thread(target=ask_to_stop, args=(folder,), daemon=True).start()
        else:
            ask_to_stop(folder)
        console.print("stopping after this step, saving state (again to end at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def demand(parameters: int, settings: TrainingSettings) -> Demand:
    """What a training stage needs: its workers with Ray Data's share, and room for its checkpoints."""
    # fp32 weights and two moments (12 bytes a parameter), and the model itself.
    checkpoint = parameters * (12 + (4 if settings.dtype == "fp32" else 2))
    return Demand(
        cpus=settings.workers * settings.cpus_per_worker + settings.data_cpus,
        gpus=settings.workers * settings.gpus_per_worker,
        disk_bytes=checkpoint * (settings.keep_checkpoints + 2),  # one more is being written, and one is exported
    )
