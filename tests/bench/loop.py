"""The peer without a framework: a training loop as one writes it, alone or with DDP under torchrun.

    python -m tests.bench.loop ORDER   or   torchrun --nproc-per-node 2 loop.py ORDER

ORDER   JSON, see `workload.Plan.order`; all batches lie in memory. `rates`: the learning rate of each step, where it
        changes; `keep`: a folder for the trained model
prints  one line of JSON: `losses` and `seconds` of every step, `saves`: seconds of each save of model and optimizer
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

IGNORED = -100


def main(order: dict[str, Any]) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(order["threads"])
    if world > 1:
        dist.init_process_group("gloo")
    model = LlamaForCausalLM.from_pretrained(order["model"]).train()
    optimizer = optimizer_of(model, order)
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    batches = batches_of(order)
    losses, seconds, saves = [], [], []
    for step in range(order["steps"]):
        begun = time.perf_counter()
        for group in optimizer.param_groups if "rates" in order else ():
            group["lr"] = order["rates"][step]
        losses.append(train_step(trained, optimizer, batches[step], rank, world, order))
        seconds.append(time.perf_counter() - begun)
        if order["save_every"] and (step + 1) % order["save_every"] == 0:
            saves.append(_save(model, optimizer, Path(order["save_to"]), rank, world))
    told = {"losses": _summed(losses, world), "seconds": seconds, "saves": saves}
    if rank == 0:
        if "keep" in order:
            model.save_pretrained(order["keep"])
        print(json.dumps(told))
    if world > 1:
        dist.destroy_process_group()


def optimizer_of(model: nn.Module, order: dict[str, Any]) -> torch.optim.Optimizer:
    """Fused AdamW; decay for matrices only."""
    matrices = [one for one in model.parameters() if one.dim() >= 2]
    vectors = [one for one in model.parameters() if one.dim() < 2]
    groups = [{"params": matrices, "weight_decay": order["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=order["learning_rate"], betas=(order["beta1"], order["beta2"]), fused=True)


def batches_of(order: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Global batches in order, each of tensors (B, T) int64."""
    size, steps = order["global_batch"], order["steps"]
    with np.load(order["rows"]) as rows:
        whole = {name: torch.from_numpy(rows[name][: size * steps]).long() for name in rows.files}
    return [{name: all_[step * size : (step + 1) * size] for name, all_ in whole.items()} for step in range(steps)]


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    rank: int,
    world: int,
    order: dict[str, Any],
) -> float:
    """One update by this rank's rows of the global batch; their part of its mean loss in nats."""
    targets = int((batch["labels"][:, 1:] != IGNORED).sum())
    share = order["global_batch"] // world
    mine = {name: tensor[rank * share : (rank + 1) * share] for name, tensor in batch.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=order["dtype"] == "bf16"):
        logits = model(input_ids=mine["input_ids"], position_ids=mine["position_ids"], use_cache=False).logits
    flat = logits[:, :-1].float().flatten(0, 1)
    loss = F.cross_entropy(flat, mine["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum") / targets
    optimizer.zero_grad()
    (loss * world).backward()  # DDP averages over ranks
    nn.utils.clip_grad_norm_(model.parameters(), order["clip_norm"])
    optimizer.step()
    return loss.item()


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, rank: int, world: int) -> float:
    """Seconds that all ranks wait until rank 0 has saved the model and the optimizer's state."""
    begun = time.perf_counter()
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    if world > 1:
        dist.barrier()
    return time.perf_counter() - begun


def _summed(losses: list[float], world: int) -> list[float]:
    """Over the ranks."""
    total = torch.tensor(losses, dtype=torch.float64)
    if world > 1:
        dist.all_reduce(total)
    return total.tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
