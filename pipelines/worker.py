"""A training worker: what pretraining and every later stage do on each rank, with exact resume.

In each worker `work` restores the checkpoint that rank 0 finds to be the newest whole one, enters the stream at its
step, and goes on as if nothing had happened, on however many workers there are this time. Files follow every step:
`metrics.jsonl` for people, `ledger.jsonl` for proof, both cut back to the checkpoint on resume, and `events.jsonl` for
what happened beside.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from cluster import mirror
from cluster.progress import log_to
from cluster.runs import canonical_hash, stop_is_asked
from llm import attention, checkpoint, clocks, flops, guard, matmul, sequence, slices, zero
from llm.checkpoint import Checkpoint
from llm.parts import Share
from llm.vocabulary import load_tokenizer
from llm.watchdog import Watchdog
from pipelines import checkpoints, failures, records, starts
from pipelines.schema import TrainingSettings
from pipelines.stream import STREAM, HeldOutRows, RowStream

WRITER_WAIT_S = 60.0
TELLING_S = 20.0

log = logging.getLogger("headwater")

# The objective: (model, batch of tensors (B, T)) -> sum of the loss over the batch's targets, a scalar.
Objective = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
# Builds the model before the first checkpoint exists, or loads it from a checkpoint's folder; under ZeRO-3 it may hand
# out each rank's share as it goes.
Build = Callable[[Path | None, Share | None], torch.nn.Module]
# Figures of the held-out rows in place of the objective's mean, `held_out_loss` among them: (model, this rank's
# batches of tensors, `row` ids among them) -> name: (sum, count), shape (2,), fp64, to be added up over ranks.
Evaluation = Callable[[torch.nn.Module, list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]
# Texts to show how far a model is: (model, tokenizer) -> prompts and what it continues them with. On rank 0.
Samples = Callable[[torch.nn.Module, Any], list[dict[str, str]]]
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
    evaluation: Evaluation | None = None
    bytes_per_target: float | None = None  # of the text, to tell a loss in bits a byte
    samples: Samples | None = None  # what is written at each evaluation
    counts_flops: bool = False  # whether a step is one forward and backward pass of a model that `llm.flops` knows

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume_step(self) -> int:
        """The step that comes next: 0, or what the newest whole checkpoint says."""
        newest = checkpoints.newest(self.checkpoints)
        return newest.step if newest else 0

    def among(self, workers: int) -> Job:
        """The same job for so many workers."""
        settings = self.settings.among(workers)
        held_out = self.held_out.among(settings) if self.held_out else None
        return replace(self, settings=settings, stream=self.stream.among(settings), held_out=held_out)


class Origin(NamedTuple):
    """Where a start of the workers goes on: the same on every rank. `flush` makes rank 0's records safe."""

    begun: starts.Begun
    saved: Checkpoint | None
    flush: Callable[[], None]


def work(job: Job) -> None:
    """A training worker, from start or checkpoint to the last step. Runs on every rank."""
    import ray.train

    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    job, logs = job.among(world), job.folder / "logs"
    told = failures.recorded(logs, rank, world)
    with log_to(logs / f"rank-{rank}.log"), told, sole_writer(job.folder, rank), ExitStack() as files:
        origin = _taken_over(job, files)
        if origin.begun.step >= job.settings.steps:
            return  # what ended the workers came after the last save
        shard = ray.train.get_dataset_shard(STREAM)  # which begins where that says
        share = job.settings.rows_per_worker
        batches = started(iter(shard.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=2)))
        trainer = Trainer.start(job, origin, files)
        log.info("rank %d of %d begins at step %d", rank, dist.get_world_size(), trainer.step)
        for step in range(trainer.step, job.settings.steps):
            stop, bad = trainer.train_step(step, trainer.next_batch(batches, step))
            if bad:
                trainer.leave_out(step, bad)
                return  # the driver starts the workers again, and they begin before it, unless it is to give up
            last = step + 1 == job.settings.steps
            if job.held_out and (last or _due(step, job.settings.evaluate_every)):
                trainer.evaluate(job.held_out)
            if last or stop or _due(step, job.settings.save_every):
                trainer.save()
            if last or stop:
                trainer.saver.settle()
                ray.train.report({"step": trainer.step})  # Ray Train's own record of how far it is; a barrier
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
    columns = next(batches)
    if not (columns["step"] == step).all():
        raise RuntimeError(f"the stream handed rows of step {sorted(set(columns['step'].tolist()))} to step {step}")
    return _batch_of(columns, time.monotonic() - begun)


def _batch_of(columns: dict[str, np.ndarray], waited_s: float = 0.0) -> Batch:
    """columns: what the stream has of one step (`RowStream.part`)."""
    told = ("step", "row", "batch_targets")
    arrays = {name: values for name, values in columns.items() if name not in told}
    return Batch(columns["row"], int(columns["batch_targets"][0]), arrays, waited_s)


class Taken(NamedTuple):
    """What came of a step. stop: the run is asked to stop. bad: why the step must not count, None if it may."""

    stop: bool
    bad: str | None


@dataclass
class Trainer:
    """A rank at work: the engine, how many steps it has taken, and the files that follow it."""

    job: Job
    engine: Any
    tokenizer: Any
    device: torch.device
    step: int
    experience: Experience | None
    saver: checkpoints.Saver
    watchdog: Watchdog
    windows: list[guard.Window]  # batches that no step takes
    skips: int  # how often some were left out so far
    history: deque[float]  # the last losses
    clock: clocks.Clock
    began: int  # the step at which the stream was entered
    held_out: list[Batch] = field(default_factory=list)
    held_out_loss: float | None = None  # of the step just taken, if it was measured
    slowness: clocks.SlowRanks = field(default_factory=clocks.SlowRanks)
    flops_per_token: float | None = None  # once the rows' length is known

    @classmethod
    def start(cls, job: Job, origin: Origin, files: ExitStack) -> Trainer:
        """Build the model and its engine, and put back what the checkpoint of `origin` holds. Collective.

        `files` ends what follows the steps.
        """
        step, keep = origin.begun.step, (job.settings.keep_checkpoints, job.settings.keep_best)
        engine, device = _start_engine(job, origin.saved, _offload_to(job, files))
        losses, left_out = _shared(lambda: _history(job.folder))
        tokenizer = load_tokenizer(mirror.here(job.tokenizer))
        store = checkpoints.store(job.checkpoints, origin.begun.attempt, origin.flush)
        watchdog = _watchdog(job)
        files.callback(watchdog.end)
        return cls(
            job,
            engine,
            tokenizer,
            device,
            step,
            job.experience(engine.module, tokenizer, device) if job.experience else None,
            checkpoints.Saver(job.checkpoints, store, tokenizer, keep),
            watchdog,
            records.windows(left_out),
            len(left_out),
            deque(losses, guard.HISTORY),
            clocks.Clock(device),
            step,
        )

    def next_batch(self, batches: Iterator[dict[str, np.ndarray]], step: int) -> Batch:
        """The rows that `step` takes."""
        self.watchdog.at(step, "data")
        taken = guard.batch_of(step, self.windows)
        # A stream that was entered before a window goes through it: an older checkpoint had to do.
        for left_out in guard.left_out_before(taken, self.windows) if step > self.began else ():
            next_batch(batches, left_out)
        return next_batch(batches, taken)

    def train_step(self, step: int, batch: Batch) -> Taken:
        """One optimizer step."""
        begun = time.monotonic()
        if self.experience:
            self.watchdog.at(step, "experience")
            batch = self.experience(batch, step)
        rate = self.job.settings.rate(step)
        zero.set_learning_rate(self.engine, rate)
        nats = self._forward_backward(batch)
        self.step, self.held_out_loss = step + 1, None
        self.watchdog.at(step, "metrics")
        nats, rows, stop, figures = self._gather(nats, batch)
        loss = nats / batch.targets
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        # DeepSpeed itself leaves out a step whose fp16 gradients overflow, and lowers the scale of the loss.
        own = norm if self.job.settings.dtype != "fp16" else 0.0
        bad = guard.verdict(loss, own, self.history, self.job.settings.spike_sigmas)
        self.history.append(loss)
        if dist.get_rank() == 0 and not bad:
            timing = self._timing(batch, rows, time.monotonic() - begun)
            told = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, **figures, **timing}
            self._write(told | self._bits(loss), rows)
        return Taken(stop, bad)

    def _forward_backward(self, batch: Batch) -> float:
        """Forward, backward and update over this rank's rows; the sum of their loss in nats.

        DeepSpeed averages gradients over micro-batches and over ranks, or groups of ranks that share rows. The loss
        handed to it is scaled so that the result is the mean over the targets of the whole global batch, however its
        rows are dealt out.
        """
        size = self.job.settings.forward_rows
        starts = range(0, len(batch.rows), size)
        scale = zero.averaged_over(self.engine) * len(starts) / batch.targets
        total = torch.zeros((), device=self.device)
        self.clock.begin()
        drops = dist.get_rank() // self.job.settings.tensor_parallel  # those of one group alike
        torch.manual_seed(dropout_seed(self.job.stream.seed, self.step, drops))
        for part, start in enumerate(starts):
            self._at("forward", part)
            nats = self.job.objective(self.engine, batch.part(start, start + size, self.device))
            self._at("backward", part)
            self.engine.backward(nats * scale)
            self._at("optimizer", part)
            if start == starts[-1]:
                self.saver.before_change()
            self.engine.step()
            total += nats.detach()
        self.clock.end()
        return total.item()

    def _at(self, phase: str, part: int) -> None:
        self.watchdog.at(self.step, phase, part)
        self.clock.at(phase)

    def _gather(self, nats: float, batch: Batch) -> tuple[float, list[int], bool, dict[str, float]]:
        """The global batch's loss sum, the rows that the ranks really took, whether the run is asked to stop, and the
        ranks' figures averaged, with the most memory that one of them has held.
        """
        stop = dist.get_rank() == 0 and stop_is_asked(self.job.folder)
        own = batch.figures | {f"{phase}_s": seconds for phase, seconds in self.clock.seconds().items()}
        names = sorted(own)
        # Row ids are exact in fp64 up to 2^53, so one collective carries everything.
        mine = torch.tensor(
            [nats, float(stop), failures.peak_rss_mb(), *(own[name] for name in names), *batch.rows.tolist()],
            dtype=torch.float64,
            device=self.device,
        )
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        table = torch.stack(everyone).cpu()
        figures = dict(zip(names, table[:, 3:].T.tolist(), strict=False))
        self._tell_slow(figures["forward_s"])
        means: dict[str, float] = {name: fmean(values) for name, values in figures.items()}
        means["peak_rss_mb"] = float(table[:, 2].max())
        settings = self.job.settings
        rows = table[:: settings.group, 3 + len(names) :].flatten().long().tolist()[: self.job.stream.global_batch]
        return float(table[:, 0].sum()) / settings.tensor_parallel, rows, bool(table[:, 1].any()), means

    def _tell_slow(self, forward_s: list[float]) -> None:
        """Ranks wait for one another in every other phase, so the forward pass tells which of them is slow.

        With ZeRO-3 they wait for one another's weights in that too, with layers that are cut for one another's sums:
        then none is found.
        """
        slow = self.slowness.add(forward_s)
        if slow is not None and dist.get_rank() == 0:
            log.warning("rank %d is slow: %.2f times the others' forward pass, %d steps long", *slow, clocks.STEPS)
            event = {"step": self.step - 1, "event": "slow rank", "rank": slow[0], "times_the_others": slow[1]}
            records.append(self.job.folder / records.EVENTS, event)

    def _timing(self, batch: Batch, rows: list[int], seconds: float) -> dict[str, float]:
        parts = self.job.settings.sequence_parallel
        tokens = len(rows) * batch.arrays["input_ids"][0].size * parts
        seconds += batch.waited_s
        held_up, self.saver.held_up_s = self.saver.held_up_s, 0.0
        told: dict[str, float] = {
            "tokens": self.step * tokens,
            "tokens_per_s": tokens / seconds,
            "data_wait_s": batch.waited_s,
            "save_wait_s": held_up,
            "seconds": seconds,
        }
        return told | self._utilisation(told["tokens_per_s"], batch.arrays["input_ids"].shape[-1] * parts)

    def _utilisation(self, tokens_per_s: float, row_tokens: int) -> dict[str, float]:
        """FLOP/s of all ranks, and their share of what the devices can do where that is known (`llm.flops`)."""
        if not self.job.counts_flops:
            return {}
        if self.flops_per_token is None:
            self.flops_per_token = flops.model_flops_per_token(self.engine.module.config, row_tokens)
        peak = self.job.settings.peak_flops
        if peak is None and self.device.type == "cuda":
            peak = flops.peak_flops(torch.cuda.get_device_name(self.device), self.job.settings.dtype)
        share = flops.mfu(tokens_per_s, self.flops_per_token, peak * dist.get_world_size()) if peak else None
        return {"flops_per_s": tokens_per_s * self.flops_per_token} | ({"mfu": share} if share is not None else {})

    def _bits(self, loss: float) -> dict[str, float]:
        per_target = self.job.bytes_per_target
        return {"bits_per_byte": loss / math.log(2) / per_target} if per_target else {}

    def _write(self, record: dict[str, Any], rows: list[int]) -> None:
        step = record["step"]
        left_out = guard.left_out_before(guard.batch_of(step, self.windows), self.windows)
        skipped = [row for batch in left_out for row in self.job.stream.rows_of_batch(batch).tolist()]
        records.append(self.job.folder / "ledger.jsonl", {"step": step, "rows": rows, "skipped": skipped})
        records.append(self.job.folder / "metrics.jsonl", record)

    def leave_out(self, step: int, why: str) -> None:
        """Have the batches since the last checkpoint, the one of `step` among them, left out from now on. Collective.

        Where they were left out before and it was no help, the checkpoint itself may be what is bad: it goes. After
        `max_skips` times the driver is told that this is no use.
        """
        self.watchdog.at(step, "save")
        self.saver.settle()
        if dist.get_rank() == 0 and self.skips >= self.job.settings.max_skips:
            gave_up = {"step": step, "event": "gave up", "why": why, "skips": self.skips}
            records.append(self.job.folder / records.EVENTS, gave_up)
        elif dist.get_rank() == 0:
            back_to = checkpoints.before(self.job.checkpoints, records.left_out(self.job.folder))
            batches = [guard.batch_of(back_to, self.windows), guard.batch_of(step, self.windows) + 1]
            event = {"step": step, "event": "skipped", "why": why, "back_to": back_to, "batches": batches}
            log.warning("step %d: %s; back to step %d, batches %d to %d left out", step, why, back_to, *batches)
            records.append(self.job.folder / records.EVENTS, event)

    @torch.no_grad()
    def evaluate(self, rows: HeldOutRows) -> None:
        """Mean loss over the targets of the held-out rows, in nats, as of the step just taken. Collective.

        Each rank reads its own, once: they are few, and a stream would cost seconds and processes.
        """
        self.watchdog.at(self.step - 1, "evaluation")
        if not self.held_out:
            spans = [(step, step + 1) for step in range(rows.last_step)]
            self.held_out = [_batch_of(rows.part(span, dist.get_rank())) for span in spans]
        self.engine.eval()
        sums = (self.job.evaluation or self._mean_nats)(self.engine, [self._tensors(batch) for batch in self.held_out])
        for pair in sums.values():
            dist.all_reduce(pair)
        means = {name: (total / count).item() for name, (total, count) in sums.items() if count}
        self.held_out_loss = means["held_out_loss"]
        if dist.get_rank() == 0:
            records.append(self.job.folder / "held_out.jsonl", {"step": self.step - 1, **_nested(means)})
            for sample in self.job.samples(self.engine.module, self.tokenizer) if self.job.samples else ():
                records.append(self.job.folder / "samples.jsonl", {"step": self.step - 1, **sample})
        self.engine.train()

    def _tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(batch.rows).to(self.device)
        return {**batch.part(0, len(batch.rows), self.device), "row": rows}

    def _mean_nats(self, model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The objective's loss a target, (sum, count) as an `Evaluation` gives it."""
        nats = torch.stack([self.job.objective(model, batch).double() for batch in batches]).sum()
        total = nats / self.job.settings.tensor_parallel  # as many ranks have the same rows
        targets = self.job.facts["held_out_targets"] if dist.get_rank() == 0 else 0
        return {"held_out_loss": torch.stack([total, total.new_tensor(float(targets))])}

    def save(self) -> None:
        """Begin a checkpoint of the state after `self.step` steps. Collective."""
        self.watchdog.at(self.step - 1, "save")
        facts = dict(self.job.facts)
        if self.held_out_loss is not None:
            facts["held_out_loss"] = self.held_out_loss
        self.saver.begin(self.engine, self.step, facts)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What the generators of a rank, or a group of ranks, begin a step with: dropout is the same after a restart."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def _nested(figures: dict[str, float]) -> dict[str, Any]:
    """Figures named KEY/NAME as {KEY: {NAME: figure}}."""
    found: dict[str, Any] = {}
    for name, figure in figures.items():
        key, _, inner = name.partition("/")
        found.update({key: {**found.get(key, {}), inner: figure}} if inner else {key: figure})
    return found


def _taken_over(job: Job, files: ExitStack) -> Origin:
    """Choose on rank 0 where to go on and make the records ready for it, so that no earlier start's count. Collective.

    All ranks take the checkpoint that rank 0 has found: looking for itself, one might find another, just published.
    """
    from ray.train.torch import get_device

    if get_device().type == "cuda":
        torch.cuda.set_device(get_device())  # for collectives; DeepSpeed sets it later
    own = _chosen(job, files) if dist.get_rank() == 0 else None
    begun = _shared(lambda: own and own.begun)
    if own:
        return own
    return Origin(begun, begun.checkpoint and checkpoints.fetched(job.checkpoints / begun.checkpoint), lambda: None)


def _chosen(job: Job, files: ExitStack) -> Origin:
    saved = checkpoints.newest(job.checkpoints)
    attempt = uuid.uuid4().hex[:8]
    begun = starts.Begun(attempt, saved.step, saved.path.name) if saved else starts.Begun(attempt)
    starts.begin(job.checkpoints, begun)
    checkpoints.set_aside_damaged(job.checkpoints, saved)
    checkpoints.prune(job.checkpoints, job.settings.keep_checkpoints, job.settings.keep_best)
    flush = files.enter_context(records.followed(job.folder, begun.step))
    if saved:
        records.append(job.folder / records.EVENTS, {"step": begun.step, "event": "restart"})
    return Origin(begun, saved, flush)


def _offload_to(job: Job, files: ExitStack) -> str:
    """Where this rank's offloaded state goes: "cpu", or a folder of its own, which is removed with `files`."""
    if job.settings.offload_to == "cpu":
        return "cpu"
    stage = canonical_hash(str(job.folder))[:12]  # a killed rank's folder is taken over by the next of its number
    folder = Path(job.settings.offload_to, f"headwater-{stage}", f"rank-{dist.get_rank()}")
    files.callback(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def _start_engine(job: Job, saved: Checkpoint | None, offload_to: str) -> tuple[Any, torch.device]:
    """The DeepSpeed engine, with `saved`'s weights and optimizer state if there is a checkpoint."""
    from ray.train.torch import get_device

    settings = job.settings
    torch.set_num_threads(settings.threads)
    zero.deepspeed().init_distributed()
    device = get_device()
    ds_settings = zero.zero_settings(
        stage=settings.zero_stage,
        micro_batch=settings.forward_rows,
        accumulation=settings.rows_per_worker // settings.forward_rows,
        dtype=settings.dtype,
        clip_norm=settings.clip_norm,
        offload=settings.offload,
        offload_to=offload_to,
    )
    share = zero.sharer(ds_settings, settings.dtype) if settings.zero_stage == 3 else None
    model: Any = job.build(saved.model if saved else None, share)
    if settings.tensor_parallel == 1:  # else DeepSpeed moves each rank's slices alone
        model = model.to(device)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = settings.sequence_parallel
    if device.type == "cpu" and settings.dtype == "fp32":
        matmul.use_the_fastest()
    if device.type == "cpu" and parts == 1 and not settings.compile:  # a compiler would stop at each of its blocks
        attention.attend_by_pieces(model)
    engine = zero.initialise(
        model.bfloat16() if settings.dtype == "bf16" else model,
        ds_settings | slices.settings(model.config, settings.tensor_parallel),
        mpu=sequence.share_rows(model, parts, settings.forward_rows) if parts > 1 else None,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        optimizer=settings.optimizer,
    )
    if saved:
        checkpoint.restore_state(saved, zero.fragments(engine))
        zero.set_counters(engine, saved.counters)
    if settings.compile:
        engine.compile()
    return engine, device


def _shared(known: Callable[[], Any]) -> Any:
    """What rank 0 knows, to all. Collective."""
    told = [known() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    return told[0]


def _history(folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """The last losses, and what was left out."""
    losses = [record["loss"] for record in records.read_lines(folder / "metrics.jsonl")[-guard.HISTORY :]]
    return losses, records.left_out(folder)


def _watchdog(job: Job) -> Watchdog:
    """Ends this process when training stands still, so that Ray Train starts the workers again."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def tell(words: str) -> None:
        log.error(words)
        failures.tell_late(job.folder / "logs", rank, world, words)

    def late(words: str) -> None:
        telling = threading.Thread(target=tell, args=(words,), daemon=True)
        telling.start()
        telling.join(TELLING_S)  # what it is written to may be what hangs
        os._exit(1)

    store = dist.distributed_c10d._get_default_store()
    return Watchdog(store, rank, world, job.settings.deadline_s, late)


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
