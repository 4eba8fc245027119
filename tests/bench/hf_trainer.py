"""The peer transformers.Trainer with DeepSpeed, in an environment of its own.

    torchrun --nproc-per-node 2 hf_trainer.py ORDER

ORDER   JSON, see `workload.Plan.order`
prints  one line of JSON: `losses` and `seconds` of every step
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

# Built with g++ at first use, for inference alone; ours does without it too.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_of(order, folder)  # before the model: DeepSpeed has to be known by then
        model = LlamaForCausalLM.from_pretrained(order["model"])
        model.config.use_cache = False
        trainer = Recording(model=model, args=arguments, train_dataset=dataset_of(order), callbacks=[clock])
        trainer.train()
    losses = torch.tensor(trainer.losses, dtype=torch.float64)
    dist.all_reduce(losses, op=dist.ReduceOp.SUM)
    if dist.get_rank() == 0:
        # Each rank's loss is its share of the mean over all targets, times the number of ranks.
        print(json.dumps({"losses": (losses / dist.get_world_size()).tolist(), "seconds": clock.seconds}))


def arguments_of(order: dict[str, Any], folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=order["global_batch"] // order["workers"],
        max_steps=order["steps"],
        learning_rate=order["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=order["weight_decay"],
        adam_beta1=order["beta1"],
        adam_beta2=order["beta2"],
        max_grad_norm=order["clip_norm"],
        optim="adamw_torch_fused",
        bf16=order["dtype"] == "bf16",
        deepspeed=deepspeed_settings(order),
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def deepspeed_settings(order: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": order["zero_stage"]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def dataset_of(order: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The rows in the order in which they are trained on."""
    count = order["global_batch"] * order["steps"]
    with np.load(order["rows"]) as rows:
        tensors = {name: torch.from_numpy(rows[name][:count]).long() for name in rows.files}
    return [{name: tensor[row] for name, tensor in tensors.items()} for row in range(count)]


class Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next; of the first, from its beginning."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._before = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._before = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._before)
        self._before = now


class Recording(Trainer):
    """Keeps each step's loss, which the Trainer itself only logs rounded."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.losses: list[float] = []

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        loss = super().compute_loss(*given, **named)
        self.losses.append(loss.item())
        return loss


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
