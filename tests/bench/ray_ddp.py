"""The peer plain Ray Train: DDP and ray.train.Checkpoint, as Ray's guide puts them together.

    python -m tests.bench.ray_ddp ORDER

ORDER   JSON, see `workload.Plan.order`; with `folder`, which must not exist. All batches lie in memory: after a
        restart there is no wait for the first
writes  FOLDER/events.jsonl   one object for each thing that happened on a rank: `what` (begin, loaded, step), `pid`
        and, on rank 0 for each step, `step`, `loss`, `data_wait_s` and `seconds`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from transformers import LlamaForCausalLM

from tests.bench.loop import batches_of, optimizer_of, train_step

STATE = "state.pt"


def main(order: dict[str, Any]) -> None:
    folder = Path(order["folder"])
    folder.mkdir(parents=True)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        work,
        train_loop_config=order,
        scaling_config=ScalingConfig(num_workers=order["workers"], resources_per_worker={"CPU": 0.75}),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=3)),
    ).fit()


def work(order: dict[str, Any]) -> None:
    """A training worker: from the last reported checkpoint on, or from the beginning."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    tell = partial(_tell, Path(order["folder"]) / "events.jsonl", rank)
    tell("begin")
    torch.set_num_threads(order["threads"])
    model = prepare_model(LlamaForCausalLM.from_pretrained(order["model"]).train())
    optimizer = optimizer_of(model, order)
    first = _restored(model, optimizer)
    tell("loaded")
    batches = batches_of(order)
    for step in range(first, order["steps"]):
        begun = time.perf_counter()
        loss = _global(train_step(model, optimizer, batches[step], rank, world, order))
        tell("step", step=step, loss=loss, data_wait_s=0.0, seconds=time.perf_counter() - begun)
        if (step + 1) % order["save_every"] == 0:
            _report(model, optimizer, step + 1, rank)


def _restored(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put back what the newest checkpoint holds; the step that comes next."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _report(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    """Save on rank 0, and tell Ray Train on all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(folder) / STATE)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=checkpoint)


def _global(loss: float) -> float:
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def _tell(path: Path, rank: int, what: str, **more: Any) -> None:
    if what == "step" and rank:
        return
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps({"what": what, "rank": rank, "pid": os.getpid(), **more}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
