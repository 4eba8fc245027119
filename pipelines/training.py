"""Training under Ray Train and DeepSpeed: the driver's side of pretraining and of every later stage.

`train` starts the workers (`pipelines.worker`), follows them, and starts them again where bad batches are to be left
out. What a killed worker, node or driver costs is what was done since the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster import claims, mirror
from cluster.errors import PreflightRefused, Problem, StageFailed, Stopped
from cluster.local import forked_workers
from cluster.preflight import Piece, starving_problems
from cluster.progress import console, progress
from cluster.runs import ask_to_stop
from llm import sequence, slices
from llm.architectures import Ids
from pipelines import failures, records, starts
from pipelines.recipe import Recipe
from pipelines.schema import TrainingSettings
from pipelines.stage import Demand
from pipelines.stream import STREAM, Dealt
from pipelines.worker import Job, work

GROW_S = 30.0  # seconds between looks for room for more workers
# Seconds that workers whose number isn't fixed have to start in. Ray counts a lost node as there for up to 20 s, and
# by itself waits a minute for those that it starts on it.
START_S = "25"
# What takes a worker six seconds of a core to import, and has neither threads nor Ray in it.
IMPORTED = (
    "torch.distributed",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
)
TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def train(job: Job, title: str, on_record: Callable[[dict[str, Any]], None]) -> None:
    """Run the workers to the end and follow them: a progress bar here, each new record to `on_record`.

    Raises StageFailed with the first failing rank's own words, or Stopped when a signal ended it with state saved.
    """
    failures.forget(job.folder / "logs")
    with _stop_by_signal(job.folder), progress(title, job.settings.steps, "steps") as report:
        step = job.resume_step()
        tail = records.Tail(job.folder / "metrics.jsonl", after=step - 1)

        def follow(now: bool) -> None:
            for record in tail.new(now=now):
                report(record["step"] + 1, f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s")
                on_record(record)

        if step >= job.settings.steps:
            console.print(f"{title}: all {step} steps were taken before, none is taken now")
        while step < job.settings.steps:
            known = len(records.events(job.folder))
            _attempt(job, follow)
            step = job.resume_step()
            if step < job.settings.steps:
                _go_on(title, step, records.events(job.folder)[known:])


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


def _go_on(title: str, step: int, events: list[dict[str, Any]]) -> None:
    """Say why the workers ended at `step`, by what happened beside; return if they are to be started again."""
    last = events[-1:]
    if not last or last[0]["event"] not in ("skipped", "gave up"):
        raise Stopped(f"{title}: asked to stop, state saved at step {step}; the same command goes on")
    if last[0]["event"] == "gave up":
        raise StageFailed(_given_up(title, last[0]))
    console.print(_told(last[0]))


def _given_up(title: str, event: dict[str, Any]) -> Problem:
    return Problem(
        f"{title}: step {event['step']}: {event['why']}; bad batches were left out {event['skips']} times (max_skips)",
        "lower learning_rate, raise warmup_steps or clip_norm, or look at the data of these steps",
    )


def _told(event: dict[str, Any]) -> str:
    first, end = event["batches"]
    return (
        f"step {event['step']}: {event['why']}; back to step {event['back_to']}, batches {first} to {end - 1} left out"
    )


def _fit(job: Job, outcome: list[BaseException]) -> None:
    from ray.train import TrainingFailedError

    try:
        with _start_timeout(job.settings):
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
    """The Ray Train trainer. The stream is a function: each (re)start of the workers calls it anew."""
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    settings = job.settings
    trainer = TorchTrainer(
        work,
        train_loop_config=job,
        scaling_config=_scaling(settings),
        run_config=RunConfig(
            # A name of its own each time: what Ray Train remembers of an earlier attempt is not what we resume from.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env=_environment(settings),
        ),
        datasets={STREAM: None},
        dataset_config=Dealt(partial(starts.dataset, job.stream, settings, job.folder)),
    )
    return _without_cleaner(trainer)


def _environment(settings: TrainingSettings) -> dict[str, Any]:
    """The runtime environment of the workers, which without GPUs may be forked: CUDA can't be."""
    if settings.gpus_per_worker:
        return {"env_vars": {"DS_ACCELERATOR": "cuda"}}
    return {"env_vars": {"DS_ACCELERATOR": "cpu"}, **forked_workers(IMPORTED)}


def _without_cleaner(trainer):
    """Ray Train without the actor that frees what a lost controller has reserved: our driver ends with it, and then
    Ray frees it. One process fewer to start, and to wait for while it wakes up.
    """
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    made = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [
        one for one in made() if not isinstance(one, PlacementGroupCleanerCallback)
    ]
    return trainer


def _scaling(settings: TrainingSettings):
    from ray.train import ScalingConfig

    gpus = {"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}
    least, most = settings.least_workers, settings.workers
    return ScalingConfig(
        num_workers=most if least == most else (least, most),
        use_gpu=bool(gpus),
        resources_per_worker={"CPU": settings.cpus_per_worker, **gpus},
        elastic_resize_monitor_interval_s=GROW_S,
    )


@contextmanager
def _start_timeout(settings: TrainingSettings) -> Iterator[None]:
    """START_S where the number of workers isn't fixed, unless the user has set another; for this stage alone."""
    if settings.least_workers == settings.workers or TIMEOUT_VARIABLE in os.environ:
        yield
        return
    os.environ[TIMEOUT_VARIABLE] = START_S
    try:
        yield
    finally:
        del os.environ[TIMEOUT_VARIABLE]


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


def refuse_starving(who: str, settings: TrainingSettings) -> None:
    """PreflightRefused where as many workers as the cluster has room for would leave Ray Data none."""
    import ray

    if settings.least_workers == settings.workers:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if problems := starving_problems(who, worker_of(who, settings), settings.data_cpus, nodes):
        raise PreflightRefused(*problems)


def cutting_problems(recipe: Recipe, stage: str) -> list[Problem]:
    """Why the workers of a stage can't share rows or layers as its settings say."""
    settings = getattr(recipe, stage)
    if settings.group == 1:
        return []
    config = recipe.model.shape.config(Ids(recipe.tokenizer.ids))
    if settings.tensor_parallel > 1:
        name, why = "tensor_parallel", slices.why_not(config, settings.group)
        remedy = "take a number that divides the model's heads and the width of its blocks, another model, or 1"
    else:
        name, why = "sequence_parallel", sequence.why_not(config, settings.group, recipe.shards.sequence_length)
        remedy = "take a number that divides the model's heads and the rows, or 1"
    return [Problem(f"{stage}.{name} is {settings.group}: {why}", remedy)] if why else []


def worker_of(who: str, settings: TrainingSettings) -> Piece:
    """A worker of a training stage, as it has to be placed."""
    names = f"{who}.workers, {who}.cpus_per_worker or {who}.gpus_per_worker"
    least, most = settings.least_workers, settings.workers
    return Piece("worker", names, settings.cpus_per_worker, settings.gpus_per_worker, least, most)


def demand(who: str, recipe: Recipe) -> Demand:
    """What a training stage needs: its workers with Ray Data's share, and room for its checkpoints."""
    settings, parameters = getattr(recipe, who), recipe.model.shape.parameters(recipe.tokenizer.ids)
    # fp32 weights and two moments (12 bytes a parameter), and the model itself.
    checkpoint = parameters * (12 + (4 if settings.dtype == "fp32" else 2))
    return Demand(
        (worker_of(who, settings), Piece("reading task", f"{who}.data_cpus", settings.data_cpus)),
        disk_bytes=checkpoint
        * (settings.keep_checkpoints + settings.keep_best + 2),  # one more is being written, and one is exported
    )
