"""Training under Ray Train and DeepSpeed: the driver's side of pretraining and of every later stage.

`train` starts the workers (`pipelines.worker`), follows them, and starts them again where bad batches are to be left
out. What a killed worker, node or driver costs is what was done since the last checkpoint.
"""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import claims, mirror
from cluster.errors import StageFailed, Stopped
from cluster.progress import console, progress
from cluster.runs import ask_to_stop
from llm import guard
from pipelines import failures, records
from pipelines.schema import TrainingSettings
from pipelines.stage import Demand
from pipelines.stream import RowStream
from pipelines.worker import Job, work


def train(job: Job, title: str, on_record: Callable[[dict[str, Any]], None]) -> None:
    """Run the workers to the end and follow them: a progress bar here, each new record to `on_record`.

    Raises StageFailed with the first failing rank's own words, or Stopped when a signal ended it with state saved.
    """
    failures.forget(job.folder / "logs")
    with _stop_by_signal(job.folder), progress(title, job.settings.steps, "steps") as report:
        tail = records.Tail(job.folder / "metrics.jsonl", after=job.resume_step() - 1)

        def follow(now: bool) -> None:
            for record in tail.new(now=now):
                report(record["step"] + 1, f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s")
                on_record(record)

        left_out = None
        while (step := job.resume_step()) < job.settings.steps:
            known = records.left_out(job.folder)
            if left_out == len(known):
                raise Stopped(f"{title}: asked to stop, state saved at step {step}; the same command goes on")
            if left_out is not None:
                console.print(_told(known[-1]))
            left_out = len(known)
            _attempt(job, follow)


def _attempt(job: Job, follow: Callable[[bool], None]) -> None:
    """Run the workers until they end."""
    outcome: list[BaseException] = []
    thread = threading.Thread(target=_fit, args=(job, outcome), name="train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.25)
        follow(not thread.is_alive())
    if outcome:
        raise outcome[0]


def _told(event: dict[str, Any]) -> str:
    first, end = event["batches"]
    return (
        f"step {event['step']}: {event['why']}; back to step {event['back_to']}, batches {first} to {end - 1} left out"
    )


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


def _rest_of(job: Job) -> RowStream:
    """The stream from the batch on that the next step takes, to the last step's."""
    windows = records.windows(records.left_out(job.folder))
    first, last = (guard.batch_of(step, windows) for step in (job.resume_step(), job.settings.steps - 1))
    return replace(job.stream, first_step=first, last_step=last + 1)


def _datasets(job: Job) -> dict[str, Callable[[], Any]]:
    cpus = job.settings.data_cpus
    streams: dict[str, Callable[[], Any]] = {"train": lambda: _rest_of(job).dataset(cpus)}
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
        disk_bytes=checkpoint
        * (settings.keep_checkpoints + settings.keep_best + 2),  # one more is being written, and one is exported
    )
